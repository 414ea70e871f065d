"""The common parts of bridges: all APIs that are translated to chat completions and back share
them.

Each wing with such an API has its own forms of requests and answers; the common part of their
bridges stands here, once.

The *reading* of a request keeps its values as bytes, and bounds their cost. *Turns* put the
messages into the order that strict engines require. The *names* of tools become function names
that every engine accepts. A *chunk* of the answer is taken apart into texts and pieces of calls,
for which engines have several names and orders. A *whole* answer is taken apart in the same way,
in steps.

Only a provider could run a *hosted* tool. The *accepted parameters* are the body members that not
every engine knows. A *refusal* names a member that an engine does not know.
"""
