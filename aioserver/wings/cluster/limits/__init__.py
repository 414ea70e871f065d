"""Limits that all instances of a cluster keep together.

An instance is a *member* while its *lease* lasts, which each of its calls renews. One call, the
*renewal*, carries everything that an instance reports about limits: a script in Lua that the
server runs in one piece. The tests have a *reference model* of it in Python.

The instances share the places of a provider, and the concurrent answers of a key. The server
*grants* an instance a number of places of each: a request that finds a granted one free starts at
once, without a call. An instance whose requests wait *wants* places; the others *give* back unused
places, and while others *starve*, each place that ends as well. A rate is shared in the same way:
its *slots* are moments at which a request may start.

An instance that the server answers is *joined*. After a failed call it is *suspect* (state
`unheard`), and continues with its grants until its lease expires. Then it is *partitioned* (state
`alone`), and each limit is its *fixed share* of the whole. A server that has lost its state, or
did not run for a while, has a *grace period* of some seconds. It grants nothing until all living
instances have reported their places (Gray and Cheriton, "Leases", 1989).

The *renewer* carries renewals over a *connection* to the server, and receives *subscriptions*. A
*leased* capacity is that of a resource whose places are granted. A *shared budget* is that of a
key's tokens: an instance asks a second script for them. *Shared tokens* are a provider's.
"""
