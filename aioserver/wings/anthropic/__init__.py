"""Anthropic's Messages API, `/v1/messages`: without it a provider that speaks that API alone
cannot be used.

A request goes to a provider that speaks the API, and the provider's bytes come back; one that has
chat completions only is behind the *bridge*, which makes events of its chunks. Which of both a
provider has is *learned*, from the settings or from its answers, by the *attempt* of a request.
The *wire* says what the API's paths, errors and events mean, and the *api* what of it a provider's
requests and answers need. The *sinks* know a good end of an answer from a bad one. The *history*
of a request may have what a bridge has written. The *face* takes the requests, and the *form*
gives this server's own errors and its list of models the form that clients of the API know.
"""
