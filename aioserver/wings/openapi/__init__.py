"""The description of the API: without it there is no `/openapi.json`.

The *document* describes our own faces in OpenAPI 3.1. It is made of the routes that the server
has, each of which is an *operation* with a *schema* of its body, and of the *policies* of the
guard, which become its *security*.
"""
