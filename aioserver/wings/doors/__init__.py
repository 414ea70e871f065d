"""Doors: without them no token of an issuer is accepted, no hook is asked, and `/openapi.json` is
not there; keys work as before.

A *token* is a signed statement of an *issuer* about its bearer (RFC 7519). Its *claims* name the
caller and its *roles*; the first role that the configuration lists says which limits count.

A *hook* is a program of the operator's, behind a URL or in Python. It *decides* about each request
before a provider is asked: it passes, is refused, or goes on with another body. It is also *shown*
each answer, beside its way to the client, and may end it. A *closed* hook refuses what it cannot
decide, and an *open* one lets it pass.
"""
