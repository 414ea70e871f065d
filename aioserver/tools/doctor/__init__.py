"""`aioserver doctor`: finds what keeps a client from getting an answer.

- A **check** is a row of one table (checks.py): its subject, the fact that it needs, its function.
  The function yields **results**, each with what to do, and each is a line of the **report**.
- **Facts** are the arguments of the command, and the values that earlier checks have found.
- Without a URL, the checks concern a server that would start here: the configuration, the limits of
  this machine, and the **network** between it and each of its **providers**.
- With the URL of a running **server**, the checks concern the connection from a client to it,
  through any proxy. They find the requests that pass, the bursts in which events arrive, and the
  time for which a silent connection stays open.
"""
