"""`aioserver bench`: load a running server with chat clients, and report how it answered.

- `command` is the command line. It makes a **plan**: so many **clients**, each with so many
  requests, or for so many seconds, over one face of the server.
- `load` carries the plan out: a **run** starts the clients and waits for them.
- `clients` has a **client** of any face. It sends the same **question** with every request and
  reads the answer of the face to its end, over WebSocket and SSE by the client library.
- `results` has the counts of a run, and its **samples**: latency, time to the first token, and the
  gap between two events. An **attempt** is one request as its client sees it. It is **ok** (a
  complete answer), **refused** (the server said "not now": 429 or 503) or **incomplete** (any
  other end).
- `limits` finds which limit of the server was met, from refusals, from `queued` frames, and from
  the **peaks** in the numbers that the server publishes.
- `table` draws the progress bar and the report with rich, an optional package; `--json` works
  without.
"""
