"""Anthropic's Messages API, `/v1/messages`: without it a provider that speaks that API alone
cannot be used.

Nothing is translated: a request goes to a provider that speaks the API, and the provider's bytes
come back. The *wire* says what the API's paths, errors and events mean, and the *api* what of it a
provider's requests and answers need. The *sink* knows a good end of an answer from a bad one. The
*face* takes the requests, and the *form* gives this server's own errors and its list of models the
form that clients of the API know.
"""
