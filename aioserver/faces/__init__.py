"""Faces: the protocols by which clients reach us, one a file.

A *face* is a protocol that we show to clients: WebSocket, SSE, and OpenAI's API in two files. A
*wing*, a feature that the core does not need, may bring a face of its own. The operating pages,
the session of a browser and the web pages, whose files are `assets`, are handlers like theirs.
Each file has `routes(context)`, whose handlers are bound to the *context*: the objects of the
server that a face may use.

*Admission* bounds how many connections are open at once. A handler first *prepares*: it reads the
request and checks it, while a *hold* counts the bytes of its body. Then it *enters*: it gets a
*place*, or queues for one. With its place it *serves*. A WebSocket queues for its place after its
handshake, the *upgrade* of its connection, and keeps it until it closes; an *idle* one may have to
give way. The *intake* of a body bounds how much of it is in memory; *client messages* are counted
on a WebSocket, frame by frame.

Beyond our own faces, other paths below `/v1` *pass through* to a provider. *Polling* is to ask now
and then how far an answer is. The operating pages tell the *status* of the server.

To serve, a handler turns the request into a question or a provider request, gets its *stream* from
the gateway, and *follows* that stream. In this *streaming* a writer sends the events to the
client, in the *format* of this face. An answer without events is sent as a *whole*. A *ready*
response has a head of our own making, sent together with its first bytes. Silence is filled by
*heartbeats*, and on a WebSocket by *pings*.

A face knows HTTP and no provider. It renders errors, and has no table of them; the *form* of an
API is the shape in which its clients expect errors and the list of models.
"""
