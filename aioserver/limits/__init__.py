"""Limits: admission gates, quotas, rates and timers. No queue, wait or rate is without a bound.

A request enters the server through a *gate*. A gate has a bounded number of *places*. A request
that finds none free is a *waiter* in the gate's *queue*, which is bounded as well, and so is each
wait: it ends at its *deadline*. Beyond these bounds a request is *refused*, and learns when to
come back. A place that is *released* is handed to the next waiter.

A new answer is counted in the *quota* of its *caller*, the key that the request came with: answers
at the same time, new answers per minute, and tokens. A quota is a *resource* with a *rate*, and a
request has one *ticket*, by which it *bids* for a resource. The *scheduler* *grants* it a place, or
lets it wait in the queue of the resource, if that has one.

Each provider has a gate of its own, which callers share. The *fair queue* decides which waiter is
next: by the *weight* of its caller, and among the *flows* of one caller, its users, in turn. A
provider's gate also has a *pace*, which limits the *rate* of starts: two of them are an *interval*
apart, and a *tolerance* allows a *burst* after a rest. A last gate counts a provider's
connections.

Where several processes share a limit and nobody says who uses how much, each has a *fixed share*.

While the answer is sent, a *watchdog* aborts a socket that accepts nothing, and one *timer wheel*
runs the timers of all connections: pings and heartbeats.
"""
