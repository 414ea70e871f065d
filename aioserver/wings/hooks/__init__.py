"""Hooks: without them no program of the operator can check requests and answers.

A *hook* is such a program, behind a URL or in Python. It *decides* about each request before a
provider is asked: the request passes, is *refused*, or continues with another body. A hook is also
*shown* each answer, in parallel to the answer's way to the client, and may end it. If a hook
cannot decide, a *closed* one refuses, and an *open* one lets the request pass.

The *hook set* has the hooks of the settings that were applied last, and asks them one after
another; the answer of each is its *decision*. A *hook client* is either an *HTTP hook*, with
connections of its own, or a *Python hook*, a class of the operator's. A *tapped log* is the log of
an answer that hooks see, by a *tap* for each hook; the *backlog* bounds the events that hooks have
not taken yet.
"""
