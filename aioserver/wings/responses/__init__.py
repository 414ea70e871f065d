"""OpenAI's Responses API, `/v1/responses`: without it a client has chat completions.

A request makes a *response*, whose *items* are its input and its output. Its *events* go into the
log as the provider sends them; a provider that has chat completions only is behind the *bridge*,
which makes events of its chunks. What a provider has is *learned*, from the settings or from its
answers, by the *attempt* of a request.

A response may be *continued* by its id. The *draft* of a response keeps what its request says
until the response has ended; it is then a *stored response*, which refers to the one that it
continued. *Shared responses* are those that other instances have, in chains of keys in Redis.

The *face* serves a response from its log, the *stored face* one that is stored. Over a WebSocket,
requests come as *frames*; a *lane* of a connection has one under way, and *holds* its latest
response.
"""
