"""The description of the API: without it there is no `/openapi.json`.

The *document* describes our own faces in OpenAPI 3.1. It is made of the server's routes: each is
an *operation* with a *schema* of its body. The *policies* of the guard become its *security*.
"""
