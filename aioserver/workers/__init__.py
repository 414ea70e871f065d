"""Workers: several processes that serve one port, and their parent.

Each *worker* is a process with a server of the folder `server`. Their *parent* holds the port, and
has no event loop, since it forks. Its *supervisor* decides which of them run: there is a *seat*
for each. The *slots* of a seat distinguish its worker, a successor, and the *former* workers that
still have answers. A worker that is replaced *hands over*: others accept connections already, and
it refuses nothing before its own connections have ended.

The *fork server* starts workers as forks of the parent. Its *image* is the state of the modules
that the parent has imported, with which such a worker starts.

The workers share limits, such as the places for connections, through leases of a *private server*.
The *balance* decides which worker accepts the next connection, by the *loads* of all workers, which
are in shared memory.
"""
