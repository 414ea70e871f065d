"""The pieces of tool calls in the deltas of a chat completion, as engines send them."""

from __future__ import annotations

from typing import Any


def call(index: int | None, **fields: Any) -> dict[str, Any]:
    function = {name: fields.pop(name) for name in ("name", "arguments") if name in fields}
    numbered = {} if index is None else {"index": index}
    return {"tool_calls": [{**numbered, **fields, "function": function}]}


# Two calls, `f` with `{"a":1}` and `g` with `{"b":2}`, by the habit of the engine: the deltas.
CALLS: dict[str, list[dict[str, Any]]] = {
    "in turns": [
        call(0, id="c0", name="f", arguments=""),
        call(1, id="c1", name="g", arguments='{"b"'),
        call(0, arguments='{"a":'),
        call(1, arguments=":2}"),
        call(0, arguments="1}"),
    ],
    "whole": [
        call(0, id="c0", name="f", arguments='{"a":1}'),
        call(1, id="c1", name="g", arguments='{"b":2}'),
    ],
    "whole, in one chunk, without an index": [
        {
            "tool_calls": [
                *call(None, id="c0", name="f", arguments='{"a":1}')["tool_calls"],
                *call(None, id="c1", name="g", arguments='{"b":2}')["tool_calls"],
            ]
        }
    ],
    "in pieces, without an index": [
        call(None, id="c0", name="f", arguments='{"a"'),
        call(None, arguments=":1}"),
        call(None, id="c1", name="g"),
        call(None, arguments='{"b":2}'),
    ],
    "in pieces, with their ids for an index": [
        call(None, id="c0", name="f", arguments='{"a"'),
        call(None, id="c1", name="g", arguments='{"b"'),
        call(None, id="c0", arguments=":1}"),
        call(None, id="c1", arguments=":2}"),
    ],
    "with the same index": [
        call(0, id="c0", name="f", arguments='{"a":1}'),
        call(0, id="c1", name="g", arguments='{"b":2}'),
    ],
    "with the name in each piece": [
        call(0, id="c0", name="f", arguments='{"a"'),
        call(0, id="c0", name="f", arguments=":1}"),
        call(1, id="c1", name="g", arguments='{"b":2}'),
    ],
    "with the name after the arguments": [
        call(0, id="c0", arguments='{"a"'),
        call(0, name="f", arguments=":1}"),
        call(1, id="c1", name="g", arguments='{"b":2}'),
    ],
    "with arguments that are an object": [
        call(0, id="c0", name="f", arguments={"a": 1}),
        call(1, id="c1", name="g", arguments={"b": 2}),
    ],
}
