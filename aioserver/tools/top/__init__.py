"""`aioserver top`: the live state of a running server in a terminal.

- `command` is the command line: the screen until Ctrl-C, or one snapshot.
- `feed` follows the server's `/events`, where a **snapshot** of all its numbers comes every
  second, and an **incident** whenever something happened. It connects again after a loss, and
  keeps what is known in a **state**: the last snapshot, the last incidents, and why no more of
  them come.
- `screen` draws the state with rich, an optional package, and on top the **verdict**, by which the
  server sums its state up: what is wrong, what clients feel of it, and what to do. Whatever came
  from the server is drawn as text, without control characters: a hostile server cannot write to
  the terminal.
"""
