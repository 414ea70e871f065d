"""A soak test: a real server process under a moderate load of everything, for half an hour.

- The **load** is clients that come and go: they ask on every face, cancel, leave, come back, and
  check each text they read (`clients.py`). A part of what they ask fails, in each way that the
  simulated provider can (`load.py`).
- Beside it **probes** ask a provider that does not fail. They measure the first token, a
  **window** of a minute at a time, and each of their answers must be whole.
- Every few seconds a **sample** is taken of the server's own numbers, `/stats`.
- The **claims** are about samples and windows: flat memory, the same latency at the end as at the
  start, and nothing left when the clients have gone (`claims.py`).

A run is a file of JSON lines; `plot.py` makes a picture of one.
"""
