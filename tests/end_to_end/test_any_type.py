"""Members of a body that have another type than the one that is expected, on each API, where much of
the server reads them: estimates and budgets, a group with affinity, a hook, the bridges, and the
continuation of an answer that breaks off. The provider's word about such a body is what its client
hears.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import bearer, keys_of
from tests.support.scripted_provider import EVENT_STREAM, Peer, ScriptedProvider, chunk
from tests.support.server import MakeServer, provider_entry

if TYPE_CHECKING:
    from aioserver.hook import Call
    from tests.support.server import RunningServer

# What may stand in place of a value, as it is written.
VALUES = (
    *("null", "-1", "1e999", "1" + 40 * "0", '"x"', "[{}]", '{"a":1}'),
    600 * '[{"":' + "0" + 600 * "}]",
)
COMMON = (
    *("model", "stream", "user", "store", "background", "metadata", "previous_response_id"),
    *("tools", "tool_choice", "stop", "temperature"),
)
CHOICES = ("n", "best_of", "logprobs", "max_tokens", "stream_options")
FORBIDDEN = ("response_format", "output_config", "guided_json", "grammar", "add_generation_prompt")
# Each API with a body, and the members that anything reads.
APIS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "chat/completions": (
        {"messages": [{"role": "user", "content": "Hello"}]},
        ("messages", *CHOICES, "max_completion_tokens", "top_logprobs", *FORBIDDEN),
    ),
    "completions": ({"prompt": "Hello"}, ("prompt", "suffix", *CHOICES)),
    "responses": (
        {"input": "Hello"},
        (
            *("input", "instructions", "max_output_tokens", "text", "reasoning", "include"),
            *("conversation", "prompt", "truncation", "parallel_tool_calls"),
        ),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
        ("messages", "system", "max_tokens", "thinking", "stop_sequences", *FORBIDDEN[:3]),
    ),
}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
RESPONSE = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
# How an answer begins.
BEGINNINGS: dict[str, list[dict[str, Any]]] = {
    "chat/completions": [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Some"}}]},
        {"choices": [{"index": 0, "delta": {"content": " words"}}]},
    ],
    "completions": [{"choices": [{"index": 0, "text": "Some"}]}],
    "responses": [
        {"type": "response.created", "response": RESPONSE, "sequence_number": 0},
        {"type": "response.output_text.delta", **PLACE, "delta": "Some", "sequence_number": 1},
    ],
    "messages": [
        {"type": "message_start", "message": {**MESSAGE, "usage": {"input_tokens": 3}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "So"}},
    ],
}
VERDICT = "this body is not to my taste"
# What the server itself reads has to be of its type, and names nobody else.
OURS = {"model", "stream", "background", "previous_response_id"}


class Rewriting:
    """A hook that returns what it is shown in other bytes."""

    async def request(self, call: Call) -> bytes:
        return call.body + b" "


async def breaks_off(peer: Peer) -> None:
    """Answer whatever comes with the beginning of an answer."""
    request = await peer.request()
    path = request.partition(b" ")[2].partition(b" ")[0].decode().removeprefix("/v1/")
    names = (f"event: {event['type']}\n" if "type" in event else "" for event in BEGINNINGS[path])
    events = [
        f"{name}data: {json.dumps(event)}\n\n".encode()
        for name, event in zip(names, BEGINNINGS[path], strict=True)
    ]
    await peer.send(EVENT_STREAM, *map(chunk, events))
    peer.abort()


async def refuses(peer: Peer) -> None:
    """Refuse whatever comes, in the form of either API."""
    await peer.request()
    error = {"type": "invalid_request_error", "message": VERDICT, "param": None, "code": None}
    body = json.dumps({"type": "error", "error": error}).encode()
    head = b"HTTP/1.1 400 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    await peer.send(head % len(body) + body)


@pytest.mark.parametrize(
    ("path", "play", "native"),
    [
        *((path, refuses, True) for path in APIS),
        *((path, breaks_off, True) for path in ("chat/completions", "messages")),
        *((path, breaks_off, False) for path in ("responses", "messages")),
    ],
)
async def test_a_value_of_any_type_is_for_the_provider_to_judge(
    make_server: MakeServer, path: str, play: Any, *, native: bool
) -> None:
    async with ScriptedProvider(play) as one, ScriptedProvider(play) as other:
        spoken = {"messages": True if native else "bridge", "responses": native}
        entries = {
            f"llm.providers.{name}": {
                **provider_entry(each.url, "m", max_retries=0),
                **spoken,
                "continuation": "prefill",
            }
            for name, each in (("one", one), ("other", other))
        }
        group = {"members": ["one", "other"], "choose": "least_busy", "affinity": "prefix"}
        hook = {"name": "same", "python": f"{__name__}:Rewriting", "on": ["request"]}
        budget = {"max_concurrent": 100, "requests_per_minute": 10_000, "queue_size": 10}
        server = await make_server(
            **entries,
            **keys_of("web", **budget, tokens_per_minute=10**9, tokens_per_day=10**9),
            **{"llm.models": {"pair": group}, "hooks": [hook]},
        )
        wrong = []
        for name in (*COMMON, *APIS[path][1]):
            answers = await asyncio.gather(*(ask(server, path, name, value) for value in VALUES))
            for value, (status, said) in zip(VALUES, answers, strict=True):
                if why := fault_of(status, said, name, refused=play is refuses and native):
                    wrong.append((name, value[:30], status, why, said[-300:]))
        assert not wrong
        assert not server.context.metrics.bugs.value
        await server.nothing_held()


async def ask(server: RunningServer, path: str, name: str, value: str) -> tuple[int, bytes]:
    body, _ = APIS[path]
    members = {"model": '"pair"', "stream": "true"}
    members |= {key: json.dumps(each) for key, each in body.items()}
    members[name] = value
    data = ",".join(f'"{key}":{each}' for key, each in members.items()).join("{}")
    headers = {**bearer("web"), "Content-Type": "application/json"}
    async with server.session.post(f"{server.v1}/{path}", data=data, headers=headers) as answer:
        return answer.status, await answer.read()


def fault_of(status: int, said: bytes, name: str, *, refused: bool) -> str:
    """Why the answer with *status* is none that a client may get; empty if it is one."""
    if status == 500 or b"internal_error" in said or b"internal error" in said:
        return "a bug"
    if sys.version_info < (3, 12) and b"nested too deeply" in said:
        # There the depth of C's calls counts as that of Python's, so this much cannot be read.
        return ""
    if refused and name not in OURS and (status != 400 or VERDICT.encode() not in said):
        return "another verdict than the provider's"
    return ""
