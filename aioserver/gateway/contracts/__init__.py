"""Contracts: the additions of wings to the gateway, as protocols that the gateway calls.

The *histories* have, by conversation, the turns before a question, each with its *answer*. A
*keeper* loads what one request continues, and stores its answer. *Hooks* may refuse or change
requests, and see answers. *Caches* finds the prompts that a provider has read anew, although its
cache could have had them.

If several processes serve together, each is an *instance*. The *instances* know each other's
streams: a request *claims* its id, which belongs to one of them, and is passed on to that one.
*Sharing* lets all instances share the limits of providers and keys. *Commands* reach their common
store, and bound how long its answers are awaited.
"""
