"""`aioserver top`: the live state of a running server in a terminal.

- `command` is the command line: the screen until Ctrl-C, or one snapshot.
- `feed` follows the server's `/events`, where a **snapshot** of all its numbers comes every
  second, and an **incident** whenever something happened. It connects again after a loss, and
  keeps what is known in a **state**: the last two snapshots, the last incidents, and why no more
  of them come.
- `verdict` sums a snapshot up in one line, the most serious finding first: all is well, a gate is
  full, the server refuses requests.
- `screen` draws the state with rich, an optional package. Whatever came from the server is drawn
  as text, without control characters: a hostile server cannot write to the terminal.
"""
