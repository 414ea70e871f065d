"""Authentication and access: which requests are admitted, and for which caller.

A *client* is whoever is connected. The *caller* is the key that its request came with; without
keys all clients are one caller. At a provider the requests of a caller wait in its *flow*, and
within that in a *subflow* for each user that they name.

A request arrives under a *host*, the name by which the client has called us, and from an
*address*, which a trusted *proxy* in front may report. A request of a web page has an *origin*,
the page's own address; other pages may use this server only if they are allowed to.

*Access* holds the valid *keys*, the hosts that are answered and the proxies that are trusted. A
browser exchanges its key for a *session*, which it keeps in a cookie.

The *guard* stands in front of every handler. It finds the caller by key or session, and compares
it with the *policy* of the route: open, for any key, or for admins. It decides and raises; the
folders `faces` and `server` answer and log.

A wing may let callers show *tokens* of somebody else in place of keys. Access knows them by a
contract alone.
"""
