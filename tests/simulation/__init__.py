"""The whole server in virtual time, on a network in memory: what sockets and real seconds do not show.

seed: decides all that a run draws. plan: what a run tries. world: the server, its provider and its clients.
dial: how one connection is made, with its faults. habit: what a client does beside asking and reading.
violation: a promise of the server that was broken.
"""
