"""Fuzzing: bytes from outside, and what must hold whatever they are.

A **target** is a function that takes bytes and raises only if something is wrong (`targets/`, one
file for each surface of the server). Its **corpus** is a folder of inputs that are kept: seeds,
and inputs that once found a fault. An **input** of most targets begins with a **control** of a few
bytes, which says how the content is cut into reads, for example; the rest is the content
(`inputs.py`).

The suite runs each target over its corpus and a few hundred **mutants** of it (`mutation.py`),
always the same. `python -m tests.fuzz TARGET` runs one with Atheris, which looks for inputs that
reach new lines of aioserver.
"""
