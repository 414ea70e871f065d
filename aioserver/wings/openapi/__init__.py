"""The description of the API: without it `/openapi.json` is not there.

The *document* describes our own faces as OpenAPI 3.1 has them. It is made of the routes that the
server has, each of which is an *operation* with a *schema* of its body, and of the *policies* of
the guard, which become its *security*.
"""
