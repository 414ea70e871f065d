"""OpenAI's Responses API, `/v1/responses`: without it a client has chat completions.

A request makes a *response*, whose *items* are its input and its output. Its *events* go into the
log as the provider sends them. If a provider has chat completions only, the *bridge* makes events
of its chunks. The *attempt* of a request *learns* the capabilities of its provider, from the
settings or from answers.

A response may be *continued* by its id. The *draft* of a response keeps the content of its request
until the response has ended; it is then a *stored response*, which refers to the response that it
continued. *Shared responses* are those of other instances, in chains of keys in Redis.
*Compaction* replaces a conversation by its summary.

The *face* serves a response from its log, the *stored face* serves a stored one. Over a WebSocket,
requests come as *frames*; a *lane* of a connection has one response under way, and *holds* its
latest one. A response in the *background* continues without a client. Its *sinks* fill the log,
and its *path* takes events to the client.
"""
