"""Conversations that the server keeps: without them a client sends what came before itself.

A *turn* is a question and its answer. The turns of a *conversation* are in *memory*, bounded, and
in a *storage*, if the settings ask for one. The *history* is both: it has the turns in front of a
question, and gets the new one when its answer has ended. A *retention policy* says which turns are
kept. The *face* lists, reads and deletes them for their caller.

One storage is an SQLite *file*, which survives a restart. It has tables of a *version*, and is
brought to the newest by *migrations*. Each process has two *connections* to it, each with a
thread: one reads, and one writes. What is to be written, a turn or a deletion, waits in a *queue*,
and all that waits is written in one transaction; an answer ends when its turn is *committed*. A
*sweep* applies the bounds to conversations that nobody goes on with. What is wrong with the file
is a *trouble*: it costs the history, never the chat. The module sqlite3 is only imported here, and
only where the settings ask for it.

The other one is Redis, for all instances of a cluster: `redis`.
"""
