"""Authentication and access: which requests are admitted, and for which caller.

A *client* is a program that is connected. The *caller* is the key that its request came with;
without keys all clients are one caller. At a provider the requests of a caller wait in its *flow*,
and within that in a *subflow* for each user that they name.

A request arrives under a *host*, the name by which the client has called us, and from an
*address*, which a trusted *proxy* in front may report. A request of a web page has an *origin*,
the page's own address; other pages may use this server only if they are allowed to.

*Access* holds the valid *keys*, the hosts for which requests are answered, and the trusted
proxies. A browser exchanges its key for a *session*, which it keeps in a cookie.

The *guard* stands in front of every handler. It finds the caller by key or session, and compares
it with the *policy* of the route: open, for any key, or for admins. It decides and raises; the
folders `faces` and `server` answer and log.

A wing may accept *tokens* of an issuer in place of keys. Access knows it by a contract alone.
"""
