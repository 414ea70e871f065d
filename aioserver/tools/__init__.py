"""Tools: commands that look at a server from outside, and a simulated provider.

**top**, **bench**, **chat** and **doctor** are clients of a running server. **remote** is their
common part: the URL and the key, a session, and the errors of a server. **provider** is a
simulated LLM provider to serve with, or to break on purpose. **usage** adds up the ledger, **why**
shows where the time of one request went, and **health** says whether the server on this machine
answers.

As in the folder `commands`, a command is the click command in its module's `command`, and
`aioserver.__main__` has the table.
"""
