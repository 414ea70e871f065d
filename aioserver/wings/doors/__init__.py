"""Doors: without them no token of an issuer is accepted, no hook is asked, and `/openapi.json` is
not there; keys work as before.

A *token* is a signed statement of an *issuer* about its bearer (RFC 7519). Its *claims* name the
caller and its *roles*; the first role that the configuration lists says which limits count.
"""
