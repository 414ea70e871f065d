"""Conversations in an SQLite file, which survive a restart: a *storage* of `gateway.history`.

The *file* has tables of a *version*, and is brought to the newest by *migrations*. Each process has two *connections* to it: one
reads, and one writes. What is to be written, a turn or a deletion, waits in a *queue*, and many are written in one transaction.
A *sweep* applies the bounds to conversations that nobody goes on with.

What is wrong with the file is a *trouble*: it costs the history, never the chat. The package aiosqlite and the module sqlite3
are only imported here, and this folder only where the settings ask for it.
"""
