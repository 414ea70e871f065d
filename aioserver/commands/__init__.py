"""The commands of `python -m aioserver` that run a server or prepare one: a module for each.

- A **command** is the click command in the module's `command`: its options, its help, and a
  function that returns the exit code. `aioserver.__main__` has the table of commands, and imports
  the module of a command only when that command is typed.
- **Options** that several commands take are in `options`.
- **serve** is the server itself: it reads the **configuration**, listens, and runs until a signal.
  **init** writes a configuration to start from, perhaps from one of LiteLLM (`litellm`); **check**
  validates a configuration, and **key** makes a client key.
- Commands that look at a server from outside are in the folder `tools`.

Results go to stdout, explanations and errors to stderr. An error is one line without a traceback,
and says what to do. A server continues if its **output** cannot be written.

A file that a command writes is *replaced* as a whole. *Completion* is a shell's proposal for a
half-typed word.
"""
