"""Answers that any instance of a cluster serves, whichever of them makes them.

A stream's log stays in the instance that makes it, its *owner*, which the *claim* names. Each
instance has a *peer listener* on a socket of its own, in the *peer network*. A connection to it
begins with a *greeting*; a *fan-out* asks all instances one question. A GET for an answer of
another instance is passed on to the owner: the *tunnel* passes the owner's bytes back, unread. A
WebSocket that reads such an answer has a tunnel of its own for it. At the owner a *peer reader*
writes the messages of that socket.

For all other requests instances send each other *messages* over the server's pub/sub: the *bus*. A
client that reads the stream at another instance has a *mirror* there. The owner's side of it is a
*link*, a reader like any other, which sends the log as *blocks* of bytes for as long as it has
*credit*. Logs that have ended are *handed over* to the server when their owner stops.

An instance's *peers* are the other ones. The *log codec* writes logs as bytes, and *remote
streams* are those of all instances.
"""
