"""The parts of a bridge: what every API needs that is translated to chat completions and back.

Each wing with such an API has its own forms of requests and answers; what both sides of its bridge
have in common stands here, once.

The *reading* of a request leaves its values the bytes that they were, and bounds what it may cost.
*Turns* put what was said into the order that strict engines want. The *names* of tools become
those of functions that every engine takes. A *chunk* of the answer is taken apart into texts and
pieces of calls, whatever names and orders an engine has for them, and a *whole* answer, in steps,
into the same.

A *hosted* tool is one that nobody but a provider could run. The *words* of a body are the names
that engines may not know, and a *refusal* says which word one does not.
"""
