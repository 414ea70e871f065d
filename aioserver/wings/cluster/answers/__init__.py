"""Answers that any instance of a cluster serves, whichever of them makes them.

A stream's log stays in the instance that makes it, its *owner*, which the *claim* names. Each
instance has a *peer listener* on a socket of its own, in the *peer network*. A connection to it
begins with a *greeting*; a *fan-out* asks all instances one question. A request for an answer of
another instance is passed on to the owner: the *tunnel* passes the owner's bytes back, unread. A
WebSocket that reads such an answer has a tunnel of its own for it. At the owner a *peer reader*
writes the messages of that socket.

Logs that have ended are *handed over* to the server when their owner stops, and *adopted* by the
instance that is asked for them: *kept logs*. *Remote streams* are those of all instances, and
*faults* are errors as they go from one to another.
"""
