"""Streams: the log of one answer, and its way to the clients' sockets.

A *stream* is the log of one answer: *events*, numbered 1, 2, 3 …, of which those that arrived
together form one *entry*. A task of the gateway, the *producer*, appends what the provider sends.

Any number of *readers* follow a stream. The reader for a client is a *cursor*, an index into the
log. Each client's socket has one *writer*, which renders what its cursors have not seen yet, in
the *format* of the client's protocol: the provider's own bytes, an event stream, or WebSocket
messages. An ordinary event takes the *fast path*: one call from the provider's socket to the
client's. Every other event takes the *slow path*: log, cursor, writer.

The *store* finds a stream by its caller and request id, and bounds the memory of all streams. Only
a *private* stream cannot be found: nobody but the client that asked for it reads it.

The *lifetime* of a stream depends on its readers. A stream that runs without a reader is
*detached*: it goes on for its *window*, a number of seconds, and is then cancelled. A client that
comes back in time can *resume*: it reads on after the last event that it has seen. A stream that
has ended is kept for its window, too. With a window of 0 no client can come back, and nothing is
kept; the provider is then *paused* while its client reads too slowly. Otherwise a reader that
falls behind the kept events is *dropped*, with an error as its last event.

If several processes serve together, a stream stays in its *owner*, the process that made it, to
which clients of the others are led.

*Contracts* are the protocols by which a log knows its readers, its source and its store. An
*ending* does every step, even if another step raises. The *outbox* collects the writes of one turn
of the event loop, which go out together.
"""
