"""A simulated provider: without it every answer needs an LLM.

It has real sockets, invented answers, and faults on request. It is the provider of a first start
without a key (`llm.active: demo`), the `aioserver provider` command, and the provider in the
tests. A request meets these words in this order:

- The **simulator** (`server`) listens and routes.
- Its **behaviour** (`exchange`) says how it answers: times, tokens, and which requests fail.
- The **parsed request** (`model`) is the content of the body. The same module writes the words of
  the answer: the same words for the same message.
- A **call** (`tools`) is the answer to a request that has tools and asks for one. Its arguments
  are a **sample** (`samples`): a value that the tool's schema allows.
- The **answer** (`shapes`) is these words as OpenAI's JSON: the events of a stream, or one object.
  `anthropic` writes the answers in Anthropic's form.
- A **fault** (`faults`, with the table of all names) replaces a plain answer: a refusal, a fault
  within the answer, or a good answer in a rare form.
- The **exchange** (`exchange`) is one request on its connection: it writes the answer token by
  token, and has the steps that faults are made of, such as a stall or a TCP reset.
- The **engine** simulates the times of an inference engine with a prefix cache.
"""
