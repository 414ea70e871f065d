"""Conversations that the server keeps: without them a client sends earlier turns itself.

A *turn* is a question and its answer. The turns of a *conversation* are in *memory*, bounded, and
in a *storage*, if the settings ask for one. The *history* is both: it has the turns in front of a
question, and gets the new one when its answer has ended. A *retention policy* says which turns are
kept. The *face* lists, reads and deletes them for their caller.

One storage is an SQLite *file*, which survives a restart. Its tables have a *version*, and
*migrations* bring them to the newest version. Each process has two *connections* to it, each with
a thread: one reads, and one writes. Writes, of a turn or a deletion, wait in a *queue*, and all
waiting ones share one transaction; an answer ends when its turn is *committed*. A *sweep* applies
the bounds to conversations that are not continued. A fault of the file is a *trouble*: it costs
the history, never the chat. The *section* shows it to operators. The module sqlite3 is only
imported here, and only if the settings ask for it.

The other storage is Redis, for all instances of a cluster: `redis`.
"""
