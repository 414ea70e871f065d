"""The simulated provider: the demo, the `provider` command, the tests' double.

`server` answers and counts; `model` reads requests and writes texts, `shapes` are OpenAI's objects,
`exchange` plays an answer piece by piece. The ways to fail are in `refusals` (before the answer),
`broken` (within it) and `unusual` (good all the same); `faults` names them all.
"""
