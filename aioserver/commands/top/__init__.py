"""`aioserver top`: the live state of a server in a terminal.

`command` is what is typed, `feed` follows the server's events, `verdict` says in one line how it is,
`screen` draws (rich).
"""
