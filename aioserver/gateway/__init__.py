"""The gateway: from a client's question to an answer, by whichever provider gives it.

A face makes a *request* of what the client asks: a chat, or a body that is passed on. The *router*
finds its *route*: a *group* of *members*, each a provider and the model that it is asked for. A
request that names a provider is *pinned* to it. *Affinity* says to which member a conversation
belongs: the one whose cache has its beginning.

A chat becomes a *prompt*: the messages that a provider gets. Those before the question are the
history of its *conversation*, to which the question and its answer are appended.

A new answer has a *stream*, its log, and a *producer*: the task that fills the log, whether or not
a client reads it. A request whose id is known gets the stream that is there already. A *call* has
neither: without streaming, if no client can come back for the answer, the handler's task waits for
it.

The gateway knows the additions of wings by the *contracts* alone, which have a folder of their
own. *Bridging* makes *bridged* attempts: their request is translated, since the provider has chat
completions only. A streamed attempt may ask for *stream usage* that its client has not asked for.

The producer has the router make *attempts*. The *candidates* of an attempt are the members that
may still answer; it starts at the first of them that has a place. After a fault that allows it,
the same provider is asked again after a *backoff* (a *retry*), or another member or the next of
the *fallbacks* is asked (a *failover*). Once there is content in the log neither happens: the
client would read two answers. But an answer that breaks off after text may get a *continuation*:
another attempt, a *hop*, asks for the rest, which begins at a *seam*. However the producer ends,
its log then gets its last event, and its request a line in the request log.
"""
