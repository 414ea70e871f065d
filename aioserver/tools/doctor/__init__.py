"""`aioserver doctor`: what stands between a client and an answer.

- A **finding** is one line of the report: what was looked at, and whether it is well. The
  **report** has all of them, in the order in which they were made.
- Without a URL, the findings are about a server that would start here: the configuration, this
  **machine**, and the **network** between it and each of its **providers**.
- With the URL of a running **server**, they are about the road from a client to it, through
  whatever proxy stands in front: the requests that it lets pass, the **arrivals** of streamed
  events, and the **silence** that it bears.

- A **certificate** is that of the listener, and a **group** has the members that can answer for one
  name of a model. The `command` is the command line.
"""
