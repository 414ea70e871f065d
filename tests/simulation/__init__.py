"""The whole server in virtual time, on a network in memory: what sockets and real seconds do not
show.

seed: decides all that a run draws (clock.py). plan: what a run tries (plan.py, configuration.py).
world: the servers, their providers and their clients, and one run of them (world.py). instance:
one server. balancer: chooses the instance for each connection of a client. dial: how one
connection is made, with its faults (dials.py); link: a connection of the server to a provider.
listener, transport: the network (network.py, transport.py). client: who asks, and reads
(client.py, own_faces.py, openai_faces.py, returning.py); silent: who says nothing (silence.py).
habit: what a client does beside asking and reading. talk: what an agent says and is answered in
messages (messages.py, message_events.py), by engines of odd habits (engine_shapes.py). Agents with
the patience of those that exist are in agents.py.

cluster: instances that share a server, and what happens to them (cluster.py). member: one of them
(membership.py). shared server: the Redis or Valkey of a run, with its faults (shared_server.py).
What holds of all of them is in together.py; how methods are noted, in noting.py.

violation: a promise of the server that was broken. What a client may read is in truth.py; what a
server may hold in watch.py, how long it may wait in deadlines.py, whom it serves next in
fairness.py, whom it lets in in doors.py (sick_hook.py), what holds of all servers together in
sums.py, what attempts cost in bills.py, and what is told of prompts in prompts.py; book: the ledger
of a server (book.py).
breakage: a server that breaks a promise, as proof that it is noticed (breakages.py).

swarm: the command (swarm.py); shrink.py finds the smallest part of a run that still fails.
"""
