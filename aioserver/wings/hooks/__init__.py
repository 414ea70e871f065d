"""Hooks: without them no program of the operator's is asked about requests, or shown answers.

A *hook* is such a program, behind a URL or in Python. It *decides* about each request before a
provider is asked: the request passes, is *refused*, or goes on with another body. A hook is also
*shown* each answer, beside the answer's way to the client, and may end it. A *closed* hook refuses
what it cannot decide, and an *open* one lets it pass.

The *hook set* has the hooks of the settings that were applied last, and asks them one after
another; what one says is its *decision*. A hook that is *asked* is either an *HTTP hook*, with
connections of its own, or a *Python hook*, a class of the operator's. A *shown log* is the log of
an answer that hooks see; the *backlog* bounds what they have not taken yet.
"""
