"""Limits: who may use what, and how a request waits for it. Every queue, wait and rate has a
bound.

A *resource* is something of which only so many can be used at once: the places in front of the
handlers, a key, a provider, the connections to a provider. It has a *capacity*, a bounded *queue*,
and perhaps a *rate*: how fast starts may follow each other. A *class* is a kind of request with its
own part of both, as *batch* is.

A request has one *ticket*, from its arrival to its end. It *bids* for a resource, or for several
at once, and gets one *grant*, which is released when the use has ended. A bid that cannot be
granted waits in the queue of its resource, and takes one *slot* of it; beyond the queue's bounds
it is *refused*, and the refusal says when to come back. The *scheduler* is the one place where
tickets wait: it starts the next one, ends those whose *deadline* has come, and tells positions.

The *fair queue* decides which ticket is next: classes by their weights, then callers by the *work*
that they have had, then the *flows* of a caller, its users.

A key is a resource whose rate counts starts and tokens: its *quota*. The tokens that it may spend
in a minute, and in *periods* of the calendar (a day, a week, a month), are its *budget*, from which
an *estimate* is reserved before the start. A rate of starts follows GCRA: two starts are an
*interval* apart, and a *tolerance* allows a *burst* after a rest.

A *supply* owns the capacity of a resource that several processes share. While no supply divides
it, each process has a *fixed share*. *Shares* bound how much of a common store each owner fills.

A *guard* ends at the deadline what is no wait: an answer, or the call of a hook. While an answer
is sent, a *watchdog* aborts a socket that accepts nothing, and one *timer wheel* runs the timers
of all connections: pings and heartbeats.
"""
