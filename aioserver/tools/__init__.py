"""Tools: commands that look at a server from outside, and one that is a provider to look at.

**top**, **bench**, **chat** and **doctor** are clients of a running server. **remote** is what
they share: the URL and the key, a session, and the errors that a server answers with. **provider**
is a simulated LLM provider to serve with, or to break on purpose. **usage** adds up the ledger,
and **health** says whether the server here answers.

As in the folder `commands`, a command is the click command in its module's `command`, and
`aioserver.__main__` has the table.
"""
