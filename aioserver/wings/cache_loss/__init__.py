"""Cache losses: without them nobody is told why a turn of a conversation was read anew.

The prompt of a *turn* has *regions*: the tools, the blocks of the system prompt, the messages. A
*conversation* has the digests of the regions of its last turn. The new turn is compared with them.
Once its usage reports the tokens from the provider's cache, the *verdict* says why these were
fewer than possible.
"""
