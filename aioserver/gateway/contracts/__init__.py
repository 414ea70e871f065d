"""Contracts: what wings add to the gateway, as the gateway knows it.

The *histories* have the turns in front of a question, each with its *answer*, by conversation. A
*keeper* is what one request continues, and what it keeps of its answer. *Hooks* are asked about
requests, and are shown answers.

Where several processes serve together, each is an *instance*. The *instances* know the streams of
the others: a request *claims* its id, which belongs to one of them, and a *mirror* is another
one's log as it is read here. *Sharing* makes the limits of providers and keys those of all
instances. *Commands* reach the store that they share, and bound how long its answers are awaited.
"""
