"""`aioserver top`: the live state of a running server in a terminal.

- `command` is the command line: the screen until Ctrl-C, or one snapshot.
- `feed` follows the server's `/events`, where a **snapshot** of all its numbers comes every
  second, and an **incident** whenever something happened. It connects again after a loss, and
  keeps a **state**: the last snapshot, the last incidents, and the reason if no more of them come.
- `screen` draws the state with rich, an optional package. On top is the **verdict**, in which the
  server sums its state up: the fault, its effect on clients, and the remedy. Text from the server
  is drawn without control characters: a hostile server cannot write to the terminal.
"""
