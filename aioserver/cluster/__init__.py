"""The cluster: what several processes, on one machine or many, share through a Redis server.

An *instance* is one process of the server; its name says where it runs, and is never used again. Instances
talk by *messages* over the server's pub/sub: the *bus*.

A stream's log stays in the instance that makes it, its *owner*. The *claim* in Redis says which one that is. A
client that reads the stream at another instance has a *mirror* there; the owner's side of it is a *link*,
a reader like any other, which sends the log as *blocks* of bytes for as long as it has *credit*. Logs that
have ended are *handed over* to Redis when their owner stops. The turns of *conversations* that clients
name are in Redis, too.
"""
