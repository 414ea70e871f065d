"""The protocols: bytes in, objects out, and back.

Nothing here uses sockets or a clock, or knows the server. Long work is done in *steps*, between
which the event loop runs.

A client sends *commands* (chat, cancel, resume, ping), each of them a JSON *frame* on a WebSocket,
or the body of an HTTP request. A command names its request by a *request id*, which the client has
chosen.

A provider answers with an *event stream* (text/event-stream). The *splitter* cuts its bytes into
*blocks* of complete *events*, wherever a read from the socket ends. The *data* of an event is one
of OpenAI's chat objects. It has a *delta* for each *choice*: a piece of text, reasoning or tool
calls. At the end come the *finish reason* and the *usage*: how many *tokens* were read, from a
*cache* or not, and written. It can also be an *error object*.

The *reading* of an answer turns each event into *chunks*, our own form of these pieces, and keeps
what the conversation needs. The *parts* of a turn say what an event contains: text, a call, an
end. The *shape* of an answer is the bytes that the provider repeats around every text: an event of
that shape need not be parsed.

An answer so far, its *transcript*, may be continued by another one. The *rest* begins at the
*seam*.

Chunks go to the clients in frames of ours: request id, *event id* (from 1, to resume after it),
*status* and chunk.

A *JSON body* is read without objects for its values, once it is *sound*: UTF-8 without lone
surrogates. The *model body* has the members of a request that we read. The *request options* are
further wishes of its client: deadlines, a class. *Client headers* go on to the provider, and
*stream options* ask for the usage. A *prefix* identifies the beginning of a prompt, and *regions*
divide a whole prompt: tools, system, messages. A *passable* path is passed on as it is, whatever
its body. A *whole answer* is one that was not streamed. *Addresses* are those of the Internet
Protocol. The folder *bridging* has the parts of a translation between two APIs.
"""
