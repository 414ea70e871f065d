"""The cluster: without it each process serves alone, with limits, streams and conversations of its
own.

Several processes and machines share these through one Redis or Valkey server. An *instance* is one
process of the cluster; its name says where it runs, and a process that is started again is another
instance. It is a *member* while its *lease* lasts, which each of its calls renews. One call, the
*renewal*, carries everything that an instance reports about limits: a script in Lua that the
server runs in one piece. The tests have a *reference model* of it in Python.

What is shared are *limits*: the places of a provider, the concurrent answers of a key. The server
*grants* an instance a number of places of each: a request that finds a granted one free starts at
once, without a call. An instance whose requests wait *wants* places; the others *give* back unused
places, and while others *starve*, each place that ends as well. A rate is shared in the same way:
its *slots* are moments at which a request may start.

An instance that the server answers is *joined*. After a failed call it is *suspect* (state
`unheard`), and continues with its grants until its lease expires. Then it is *partitioned* (state
`alone`), and each limit is its *fixed share* of the whole. A server that has lost its state, or
did not run for a while, has a *grace period* of some seconds. It grants nothing until all living
instances have reported their places (Gray and Cheriton, "Leases", 1989).

Instances send each other *messages* over the server's pub/sub: the *bus*. A stream's log stays in
the instance that makes it, its *owner*, which the *claim* names. A client that reads the stream at
another instance has a *mirror* there. The owner's side of it is a *link*, a reader like any other,
which sends the log as *blocks* of bytes for as long as it has *credit*. Logs that have ended are
*handed over* to the server when their owner stops. The turns of *conversations* that clients name
are there, too.

The *renewer* carries renewals over a *connection* to the server, and receives *subscriptions*. An
instance's *membership* lasts from its start to its end; its *peers* are the other ones. A *leased*
capacity is that of a resource whose places are granted. Of a key's tokens, the *shared budget* is
the prefetched part of an instance, and the *shared tally* is its knowledge of the server's count;
*shared tokens* are a provider's. The *log codec* writes logs as bytes, *remote streams* are those
of all instances, and *totals* the operating pages of all.
"""
