"""`aioserver doctor`: what stands between a client and an answer.

- A **check** is a row of one table (checks.py): the subject that it looks at, the facts that it
  needs, the function that looks, and what to do about what it finds. It yields **results**, each of
  which is a line of the **report**.
- **Facts** are what was asked of the doctor, and what the checks before have found out.
- Without a URL, the checks are about a server that would start here: the configuration, this
  **machine**, and the **network** between it and each of its **providers**.
- With the URL of a running **server**, they are about the way from a client to it, through
  whatever proxy stands in front: the requests that it lets pass, the **arrivals** of streamed
  events, and the silence that it bears.
"""
