"""Answers cut anywhere, by every fault, on every face: none has a character that is lost or
doubled, and none ends well that is not whole.

All of them: `python -m pytest -m stress tests/end_to_end/test_continued_cuts.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol import eventstream
from aioserver.protocol.seam import BEGINNING
from tests.support.chat import ENDS
from tests.support.cut_provider import Cut, cut_provider
from tests.support.server import QUICK, MakeServer, provider_entry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import RunningServer

    Ask = Callable[[RunningServer, int], Awaitable[tuple[str, str]]]

# At once.
TOGETHER = 20
SOME, ALL = 100, 10_000
# Providers whose answers break off: with fewer of them each would be found to be sick.
PROVIDERS = 50


def _model(seed: int) -> str:
    return f"m{seed % PROVIDERS}"


async def _body(server: RunningServer, url: str, body: dict[str, Any]) -> list[Any]:
    async with server.session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        raw = await response.read()
    events = eventstream.parse(raw)
    return [event.data if event.data == b"[DONE]" else json.loads(event.data) for event in events]


async def _openai(server: RunningServer, seed: int) -> tuple[str, str]:
    messages = [{"role": "user", "content": f"seed {seed}"}]
    body = {"model": _model(seed), "messages": messages, "stream": True}
    text, end, roles, idents = "", "", 0, set()
    for event in await _body(server, f"{server.v1}/chat/completions", body):
        assert end in {"", "finish"}, "nothing comes behind the end"
        if event == b"[DONE]":
            assert end == "finish", "a false end"
            end = "complete"
        elif "error" in event:
            end = f"error: {event['error'].get('code')}"
        else:
            idents.add(event["id"])
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                roles += "role" in choice["delta"]
                end = "finish" if choice["finish_reason"] else end
    assert len(idents) <= 1
    assert roles <= 1
    return text, end


async def _messages(server: RunningServer, seed: int) -> tuple[str, str]:
    messages = [{"role": "user", "content": f"seed {seed}"}]
    body = {"model": _model(seed), "max_tokens": 4096, "messages": messages, "stream": True}
    text, end, types, block = "", "", Counter[str](), ""
    for event in await _body(server, f"{server.v1}/messages", body):
        assert not end, "nothing comes behind the end"
        types[event["type"]] += 1
        match event["type"]:
            case "content_block_start":
                assert not block
                block = str(event["index"])
            case "content_block_delta":
                assert block == str(event["index"])
                text += event["delta"]["text"]
            case "content_block_stop":
                block = ""
            case "message_stop":
                end = "complete"
                assert types["message_delta"] == 1, "a false end"
            case "error":
                end = f"error: {event['error']}"
    assert types["message_start"] <= 1
    return text, end


async def _responses(server: RunningServer, seed: int) -> tuple[str, str]:
    body = {"model": _model(seed), "input": f"seed {seed}", "stream": True}
    events = await _body(server, f"{server.v1}/responses", body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events].count("response.created") == 1
    deltas = [each["delta"] for each in events if each["type"] == "response.output_text.delta"]
    last = events[-1]
    if last["type"] != "response.completed":
        return "".join(deltas), f"error: {last}"
    assert last["response"]["output"][0]["content"][0]["text"] == "".join(deltas)
    return "".join(deltas), "complete"


async def _sse(server: RunningServer, seed: int) -> tuple[str, str]:
    body = {"request_id": f"s{seed}", "text": f"seed {seed}", "model": _model(seed)}
    return _read([frame for frame in await _body(server, server.sse, body) if "event_id" in frame])


async def _websocket(server: RunningServer, seed: int) -> tuple[str, str]:
    frames: list[Any] = []
    payload = {"text": f"seed {seed}", "model": _model(seed)}
    async with server.connect() as ws:
        await ws.send_json({"action": "chat", "request_id": f"w{seed}", "payload": payload})
        while not frames or frames[-1]["status"] not in ENDS:
            frame = await ws.receive_json()
            frames += [frame] if "event_id" in frame else []
    return _read(frames)


def _read(frames: list[Any]) -> tuple[str, str]:
    assert [frame["event_id"] for frame in frames] == list(range(1, len(frames) + 1))
    text = "".join(frame["chunk"]["data"] for frame in frames if frame["status"] == "chunk")
    last = frames[-1]
    return text, last["status"] if last["status"] == "complete" else f"error: {last['chunk']}"


FACES: tuple[Ask, ...] = (_openai, _messages, _responses, _sse, _websocket)


@pytest.mark.parametrize(
    "count", [SOME, pytest.param(ALL, marks=[pytest.mark.stress, pytest.mark.timeout(600)])]
)
async def test_answer_cut_anywhere_is_whole_on_every_face(
    make_server: MakeServer, count: int
) -> None:
    limits = {"read_timeout": 2.0, "max_retries": 2, "backoff_factor": 0.01}
    limits |= {"requests_per_minute": 1_000_000}
    async with cut_provider() as provider:
        names = [f"first{number}" for number in range(PROVIDERS)]
        entries: dict[str, Any] = {
            f"llm.providers.{name}": {
                **provider_entry(f"{provider.base}/{name}/v1", "m", **limits),
                "continuation": "prefill",
                "messages": True,
                "responses": False,
            }
            for name in (*names, "other")
        }
        entries["llm.models"] = {
            _model(number): {"members": [f"{name}/m", "other/m"], "choose": "ordered"}
            for number, name in enumerate(names)
        }
        server = await make_server(QUICK, **entries)
        seeds = iter(range(count))
        wrong: list[str] = []
        repeated: list[int] = []
        ways: Counter[str] = Counter()

        async def ask_some() -> None:
            for seed in seeds:
                cut = Cut(seed)
                text, end = await FACES[seed % len(FACES)](server, seed)
                ways[cut.way] += 1
                rest = cut.text[len(text) :]
                if rest and len(text) >= BEGINNING and rest.startswith(text[:BEGINNING]):
                    # It repeats its beginning where it was cut, which an engine does that begins
                    # anew; so nobody is believed.
                    assert end.startswith("error")
                    repeated.append(seed)
                elif text != cut.text or end != "complete":
                    face = FACES[seed % len(FACES)].__name__
                    wrong.append(f"{seed} {face} {cut.way}: {end}: {text!r}, not {cut.text!r}")

        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(ask_some())

        assert not wrong, "\n".join(wrong)
        assert len(repeated) <= count / 100
        assert not provider.lies
        assert provider.rests > count / 4
        await server.nothing_held()
