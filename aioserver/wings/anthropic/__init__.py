"""Anthropic's Messages API, `/v1/messages`: without it a provider that speaks only that API cannot
be used.

A request goes to a provider that speaks the API, and the provider's bytes come back. If a provider
has chat completions only, the *bridge* makes events of its chunks. The *attempt* of a request
*learns* which of the two APIs a provider has, from the settings or from answers. The *wire* defines
the API's paths, errors and events, and the *api* the part of it that a provider's requests and
answers need. The *sinks* distinguish a good end of an answer from a bad one. The *history* of a
request may have blocks that a bridge has written. The *face* takes the requests, and the *form*
gives this server's own errors and its list of models the form that clients of the API expect. The
*transcript* is the content of a message so far, from which another attempt continues.
"""
