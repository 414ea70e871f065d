"""The server: one process that listens, runs the faces, and changes and ends in good order.

A *preflight* checks, before anything is opened, that this process can serve. `open_server` then
makes the *server*: the object that holds everything with the lifetime of the server, and its
*application*, aiohttp's object with the routes of the faces. The table of *wings* names the
features that stand on the core: they are opened before all else, and closed last.

A *runner* runs the application. It *listens*: the kernel queues connections up to the *backlog*,
and the runner accepts them, on sockets that it has opened or that systemd has passed on. A
*connection* is aiohttp's, with our limits and errors. It serves a request *directly* if it is
idle, without waking aiohttp's loop. The *dispatcher* finds the handler of a request, and the
*middleware* is in front of it: limits of the head, the guard, CORS, and errors that become
responses.

A *listener* may speak *TLS*: its *certificate* identifies it to clients, and is read again when it
is renewed. *Paths* that do not exist get an answer with the path that was probably meant.

A *reload* puts another configuration in effect, with no connection dropped. A *stop* is the
request that the process ends. At the end the server is first not *ready* any more, then *drains*:
it refuses new work, and running work may finish. The *notifier* reports all of this to systemd.

Several such processes may serve one port: the folder `workers`.
"""
