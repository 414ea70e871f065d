"""Tokens of an issuer (JWT): without them callers can be identified only by keys.

A *token* is a signed statement of an *issuer* about its bearer (RFC 7519). Its *claims* name the
caller and its *roles*; the first role that the configuration lists decides which limits apply.

The issuer's public keys, its *key set*, are fetched from it or read from a file, and verify the
*signature* of a token. A key has an id, the *kid*, which a token names. A caller whose token was
verified is remembered until the token ends; a browser exchanges its token for a session.
"""
