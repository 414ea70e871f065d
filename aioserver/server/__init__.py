"""The server: one process that listens, runs the faces, and changes and ends in good order.

A *preflight* checks, before anything is opened, that this process can serve. `open_server` then makes
the *server*: the object that holds everything that lives as long as itself, and its *application*,
aiohttp's object with the routes of the faces.

A *runner* runs the application. It *listens*: the kernel queues connections up to the *backlog*, and
the runner accepts them, on sockets that it has opened or that systemd has passed on. A *connection* is
aiohttp's, with our limits and errors. The *dispatcher* finds the handler of a request, and the
*middleware* is in front of it: limits of the head, the guard, CORS, and errors that become responses.

A *reload* puts another configuration in effect, with no connection dropped. At the end the server is
first not *ready* any more, then *drains*: it refuses new work, and what runs may finish. The
*notifier* reports all of this to systemd.

Several *workers* may serve one port, each such a process. Their *parent* holds the port, and its
*supervisor* decides which of them run: there is a *seat* for each, with two *slots*, in which a worker and
its successor are told apart. A worker that is replaced *hands over*: others accept connections
already, and it refuses nothing before its own have ended. Places move between the slots by way of the *shared page*, and
the *balance* decides which worker accepts the next connection. A *shared server* carries what else they share.
"""
