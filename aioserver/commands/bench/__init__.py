"""`aioserver bench`: load a running server on any face, and say what came of it.

`command` is what is typed, `load` the clients' coming and going, `clients` what one of them does on
each face, `attempt` one request as its client sees it, `results` the numbers, `limits` which limit was
met, `table` how it all looks (rich).
"""
