"""The events of a message, written from the chunks of a chat completion."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from aioserver.protocol.openai import BadEvent
from aioserver.protocol.steps import at_once
from aioserver.provider_errors import ProviderFault
from aioserver.streams.stream import Stream
from aioserver.wings.anthropic.bridge import ids
from aioserver.wings.anthropic.bridge.events import MessageWriter
from aioserver.wings.anthropic.bridge.request import chat_request
from aioserver.wings.anthropic.bridge.whole import WholeWriter, whole_message
from aioserver.wings.anthropic.sink import BridgeSink
from tests.support.message_events import check_run, put_together, read_events
from tests.support.reference_messages import message_content
from tests.support.tool_calls import CALLS, call

ASKED: dict[str, Any] = {
    "model": "m",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello"}],
}
THINKING: dict[str, Any] = {"thinking": {"type": "adaptive"}}
NAME = "0123456789abcdef0123456789abcdef"
LONG_NAME = "mcp__" + "x" * 100


def new_writer(**asked: Any) -> MessageWriter:
    return MessageWriter(at_once(chat_request(orjson.dumps(ASKED | asked))), NAME, 1 << 20)


def chunk(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return {"id": "c", "model": "m-1", "choices": [choice]}


def played(
    reads: list[bytes], *, whole: bool = True, **asked: Any
) -> tuple[list[dict[str, Any]], ProviderFault | None]:
    """The events in a log to which a sink adds what *reads* bring, and the fault of the last."""
    stream = Stream("r1", "me", window=30.0, max_bytes=1 << 22)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    sink = BridgeSink(stream, new_writer(**asked))
    fault = None
    try:
        for read in reads:
            if not sink.feed(read):
                break
        else:
            if whole:
                sink.end()
    except ProviderFault as exc:
        fault = exc
    return read_events(b"".join(entry.data for entry in stream.entries)), fault


def sent(*chunks: Any, done: bool = True) -> list[bytes]:
    events = [b"data: %b\n\n" % orjson.dumps(each) for each in chunks]
    return [*events, b"data: [DONE]\n\n"] if done else events


def translated(*chunks: Any, **asked: Any) -> dict[str, Any]:
    events, fault = played(sent(*chunks), **asked)
    assert fault is None
    return check_run(events)


def blocks(*chunks: Any, **asked: Any) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = translated(*chunks, **asked)["content"]
    return content


def broken(*chunks: Any, **asked: Any) -> str:
    events, fault = played(sent(*chunks), **asked)
    assert "message_stop" not in [event["type"] for event in events]
    assert fault is not None
    return fault.message


def test_a_text_is_a_block() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    message = translated(
        chunk(role="assistant", content=""),
        chunk(content='He"l'),
        chunk(content="lö\n"),
        chunk("stop"),
        {"choices": [], "usage": usage},
    )

    assert message == {
        "id": f"msg_{NAME}",
        "type": "message",
        "role": "assistant",
        "model": "m-1",
        "content": [{"type": "text", "text": 'He"llö\n'}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 7,
        },
    }


def test_reasoning_is_shown_to_those_who_have_asked_for_it() -> None:
    chunks = [
        chunk(reasoning_content="Hm"),
        chunk(reasoning_content="m."),
        chunk(content="Yes"),
        chunk(reasoning="and"),
        chunk(content="."),
        chunk("stop"),
    ]

    shown = blocks(*chunks, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block["type"] for block in shown] == ["thinking", "text"] * 2
    assert shown[0] == {
        "type": "thinking",
        "thinking": "Hmm.",
        "signature": "aioserver.unsigned",
    }
    hidden = [{"type": "text", "text": "Yes."}]
    assert blocks(*chunks) == hidden
    assert blocks(*chunks, thinking={"type": "disabled"}) == hidden
    assert blocks(*chunks, thinking={"type": "adaptive", "display": "omitted"}) == hidden


def test_only_reasoning_is_an_answer() -> None:
    chunks = [chunk(reasoning="Hm"), chunk("stop")]

    assert blocks(*chunks) == []
    assert [block["type"] for block in blocks(*chunks, **THINKING)] == ["thinking"]


def test_an_empty_answer_is_one() -> None:
    message = translated(chunk(content=""), chunk("stop"))

    assert (message["content"], message["stop_reason"]) == ([], "end_turn")
    assert translated(chunk(content=" \n"), chunk("stop"))["content"] == []


def test_white_space_begins_no_block() -> None:
    made = blocks(
        chunk(content="\n\n"),
        chunk(content=" a"),
        chunk(content="\n"),
        chunk(**call(0, id="c1", name="f", arguments="{}")),
        chunk(content="\n"),
        chunk("tool_calls"),
    )

    assert [block.get("text") for block in made] == ["\n\n a\n", None]


def test_calls_whose_pieces_alternate_are_written_one_after_another() -> None:
    made = translated(
        chunk(content="Well"),
        chunk(**call(0, id="c1", name="f")),
        chunk(**call(1, id="c2", name="g", arguments='{"b"')),
        chunk(**call(0, arguments='{"a": "}')),
        chunk(content="between"),
        chunk(**call(1, arguments=":2}")),
        chunk(**call(0, arguments='\\""}')),
        chunk("stop"),
    )

    assert made["stop_reason"] == "tool_use"
    assert made["content"] == [
        {"type": "text", "text": "Well"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": '}"'}},
        {"type": "tool_use", "id": "c2", "name": "g", "input": {"b": 2}},
        {"type": "text", "text": "between"},
    ]


def test_pieces_that_wait_for_the_end_of_another_call_are_counted() -> None:
    """They were paid for: an answer that is cut then has cost them."""
    stream = Stream("r1", "me", window=30.0, max_bytes=1 << 22)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    sink = BridgeSink(stream, new_writer())
    kept = []

    for each in sent(
        chunk(**call(0, id="c1", name="f")),
        chunk(**call(1, id="c2", name="g", arguments='{"b"')),
        chunk(**call(1, arguments=":2}")),
        chunk(content="between"),
        chunk(**call(0, arguments="{}")),
        chunk("tool_calls"),
    ):
        sink.feed(each)
        kept.append(sink.kept_pieces)

    assert kept == [0, 2, 3, 4, 0, 0, 0]


def test_an_engine_that_does_not_interleave_is_never_held_back() -> None:
    chunks = [
        chunk(**call(0, id="c1", name="f", arguments='{"a":1}')),
        chunk(content="Now"),
        chunk(**call(1, id="c2", name="g", arguments='{"b":')),
    ]

    events, _ = played(sent(*chunks, done=False), whole=False)

    assert [block["type"] for block in put_together(events)["content"]] == [
        "tool_use",
        "text",
        "tool_use",
    ]


WHITE_SPACE = [
    call(0, id="c0", name="f", arguments='{"a":1}\n'),
    call(0, arguments=" "),
    call(1, id="c1", name="g", arguments=' {"b":2}'),
]


@pytest.mark.parametrize("deltas", [*CALLS.values(), WHITE_SPACE], ids=[*CALLS, "white space"])
def test_calls_are_read_however_an_engine_sends_them(deltas: list[Any]) -> None:
    made = translated(*[chunk(**delta) for delta in deltas], chunk("stop"))

    assert made["stop_reason"] == "tool_use"
    assert made["content"] == [
        {"type": "tool_use", "id": "c0", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "c1", "name": "g", "input": {"b": 2}},
    ]


@pytest.mark.parametrize("arguments", ["", None, " ", "null", "{}"])
def test_arguments_that_are_empty_are_an_object(arguments: str | None) -> None:
    made = translated(
        chunk(**call(0, id="c1", name="f", arguments=arguments)),
        chunk(**call(1, id="c2", name="g")),
        chunk("tool_calls"),
    )

    assert [block["input"] for block in made["content"]] == [{}, {}]


def test_a_call_that_goes_on_behind_its_end_is_a_fault() -> None:
    whole = chunk(**call(0, id="c1", name="f", arguments="{}"))

    assert "whole" in broken(whole, chunk(**call(0, arguments="1")), chunk("stop"))
    assert "no object" in broken(
        chunk(**call(0, id="c", name="f", arguments="[1]")), chunk("stop")
    )
    assert "not whole" in broken(chunk(**call(0, id="c", name="f", arguments="{")), chunk("stop"))
    assert "without a name" in broken(chunk(**call(0, id="c", arguments="{}")), chunk("stop"))


def test_an_answer_that_was_cut_says_so() -> None:
    message = translated(
        chunk(**call(0, id="c1", name="f", arguments='{"a": "b')), chunk("length")
    )

    assert message["stop_reason"] == "max_tokens"
    assert translated(chunk(content="a"), chunk("length"))["stop_reason"] == "max_tokens"


def test_the_stop_reason_is_what_was_written_and_not_what_is_said() -> None:
    one = chunk(**call(0, id="c1", name="f", arguments="{}"))

    assert translated(one, chunk("stop"))["stop_reason"] == "tool_use"
    assert translated(one, {"choices": []})["stop_reason"] == "tool_use"
    assert translated(chunk(content="a"), chunk("tool_calls"))["stop_reason"] == "end_turn"
    assert translated(chunk(content="a"), chunk("content_filter"))["stop_reason"] == "refusal"
    assert translated(chunk(refusal="No."), chunk("stop"))["stop_reason"] == "refusal"
    last = chunk("stop")
    last["choices"][0]["stop_reason"] = "END"
    message = translated(chunk(content="a"), last)
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def test_ids_that_clients_do_not_take_come_back_as_the_engine_knows_them() -> None:
    made = blocks(
        chunk(**call(0, id="functions.Bash:0", name="f", arguments="{}")),
        chunk(**call(1, id="x", name="f", arguments="{}")),
        chunk(**call(2, name="f", arguments="{}")),
        chunk(**call(3, id="functions.Bash:0", name="f", arguments="{}")),
        chunk("stop"),
    )

    first, second, third, fourth = [block["id"] for block in made]
    assert ids.own(first) == "functions.Bash:0"
    assert (second, third) == ("x", f"toolu_{NAME[:12]}_2")
    assert ids.own(fourth) == "functions.Bash:0_2"
    for shown in (first, second, third, fourth):
        assert set(shown) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
        )


@pytest.mark.parametrize("seed", range(20))
def test_the_round_trip_of_an_id_is_the_identity(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = "ab:._-é\n0/+ "
    for _ in range(50):
        own = rng.choice(["", "toolu_b64_"]) + "".join(rng.choices(alphabet, k=rng.randint(1, 80)))
        assert ids.own(ids.shown(own)) == own


def test_a_name_that_was_cut_comes_back_whole() -> None:
    tool = {"name": LONG_NAME, "input_schema": {"type": "object"}}
    request = at_once(chat_request(orjson.dumps({**ASKED, "tools": [tool]})))
    own = orjson.loads(request.body)["tools"][0]["function"]["name"]

    made = blocks(chunk(**call(0, id="c", name=own, arguments="{}")), chunk("stop"), tools=[tool])

    assert len(own) == 64
    assert made[0]["name"] == LONG_NAME


def test_the_usage_may_come_anywhere_or_not_at_all() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 3}
    text, last = chunk(content="a"), chunk("stop")
    for chunks in (
        [text, last, {"choices": [], "usage": usage}],
        [text, {**last, "usage": usage}],
        [{**text, "usage": {**usage, "completion_tokens": 1}}, {**last, "usage": usage}],
    ):
        found = translated(*chunks)["usage"]
        assert (found["input_tokens"], found["output_tokens"]) == (50, 3)
    first, _ = played(sent({**text, "usage": usage}, last))
    assert first[0]["message"]["usage"]["input_tokens"] == 50
    zero = {"prompt_tokens": 0, "completion_tokens": 0}
    # `check_usage` holds that none is 0.
    translated(text, last, {"choices": [], "usage": zero})
    translated(text, last)


def test_a_delta_may_be_null() -> None:
    empty = {"choices": [{"index": 0, "delta": None, "finish_reason": None}]}

    assert blocks(empty, chunk(content="a"), empty, chunk("stop")) == [
        {"type": "text", "text": "a"}
    ]


def test_half_a_character_waits_for_its_other_half() -> None:
    data = [
        b'{"choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"\\ude00b"}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}',
        b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
    ]
    reads = [b"data: %b\r\n\r\n" % each for each in data]

    events, fault = played([*reads, b"data: [DONE]\r\n\r\n"])

    assert fault is None
    assert check_run(events)["content"] == [{"type": "text", "text": "a\U0001f600b\ufffd"}]


def test_an_error_object_ends_the_answer() -> None:
    error = {"error": {"message": "out of memory", "code": 500}}

    assert "out of memory" in broken(chunk(content="a"), error)
    assert "no_end" not in broken(error)


@pytest.mark.parametrize("finish", [True, False])
def test_an_answer_that_breaks_off_is_whole_only_behind_its_finish(finish: bool) -> None:
    events, fault = played(sent(chunk(content="a"), chunk("stop" if finish else None), done=False))

    assert (fault is None) == finish
    assert (events[-1]["type"] == "message_stop") == finish


def test_too_much_that_is_kept_is_a_fault() -> None:
    first = chunk(**call(0, id="c1", name="f", arguments="{"))
    more = chunk(content="x" * 100_000)

    assert "bytes" in broken(first, *[more] * 12)
    # What is shown at once is not kept.
    assert translated(*[more] * 30, chunk("stop"))["stop_reason"] == "end_turn"


def test_many_calls_that_were_kept_are_written_at_once() -> None:
    first = chunk(**call(0, id="c0", name="f", arguments="{"))
    kept = [chunk(**call(n, id=f"c{n}", name="f", arguments='{"a":1}')) for n in range(1, 900)]

    made = blocks(first, *kept, chunk(**call(0, arguments="}")), chunk("stop"))

    assert [block["id"] for block in made] == [f"c{n}" for n in range(900)]
    over = [chunk(**call(n, id=f"c{n}", name="f", arguments="{}")) for n in range(1001)]
    assert "1000 calls" in broken(*over, chunk("stop"))


WORDS = ("a", "Hé", " ", "\n", '"', "\\", "{", "}", "\U0001f600", "</x>", "\n\n")
ARGUMENTS: list[Any] = [{}, {"a": 1}, {"b": ["}", '"', "\\"]}, {"c": {"d": "\U0001f600[{"}}]


def random_chunks(rng: random.Random, *, ordered: bool) -> list[Any]:
    """Chunks of an answer: texts and reasoning in any order or one that a whole answer has, and
    calls whose pieces may alternate.
    """
    texts = [
        chunk(**{rng.choice(["content", "content", "reasoning"]): rng.choice(WORDS)})
        for _ in range(rng.randint(0, 12))
    ]
    if ordered:
        texts.sort(key=lambda each: "content" in each["choices"][0]["delta"])
    pieces: list[list[Any]] = []
    for index in range(rng.randint(0, 4)):
        written = orjson.dumps(rng.choice(ARGUMENTS)).decode()
        cuts = sorted(rng.choices(range(len(written) + 1), k=rng.randint(0, 3)))
        parts = [
            written[start:end]
            for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True)
        ]
        head = call(index, id=f"c{index}", name="f", arguments=parts[0])
        pieces.append([head, *[call(index, arguments=part) for part in parts[1:]]])
    alternating = rng.random() < 0.5
    while pieces:
        own = rng.choice(pieces) if alternating else pieces[0]
        piece = own.pop(0)
        texts.append(chunk(**piece))
        pieces = [each for each in pieces if each]
        if not ordered and rng.random() < 0.2:
            texts.append(chunk(content=rng.choice(WORDS)))
    return [*texts, chunk("stop")]


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.choice([0, 3, 30])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def without_signatures(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in block.items() if name != "signature"} for block in content
    ]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("part", range(4))
def test_any_answer_in_any_cuts_is_what_a_simple_translation_makes_of_it(
    part: int, thinking: bool
) -> None:
    asked = THINKING if thinking else {}
    for seed in range(part * 50, part * 50 + 50):
        rng = random.Random(seed)
        chunks = random_chunks(rng, ordered=False)
        events, fault = played(cut(rng, b"".join(sent(*chunks))), **asked)
        assert fault is None, seed
        message = check_run(events)

        expected = message_content(chunks, thinking=thinking)
        assert without_signatures(message["content"]) == expected, seed
        called = any(block["type"] == "tool_use" for block in expected)
        assert message["stop_reason"] == ("tool_use" if called else "end_turn"), seed


@pytest.mark.parametrize("thinking", [True, False])
def test_a_whole_answer_is_the_streamed_one_put_together(thinking: bool) -> None:
    asked = THINKING if thinking else {}
    for seed in range(100):
        chunks = random_chunks(random.Random(seed), ordered=True)
        events, _ = played(sent(*chunks), **asked)

        body = orjson.dumps({"model": "m-1", "choices": [whole_choice(chunks)]})
        request = at_once(chat_request(orjson.dumps(ASKED | asked)))
        writer = WholeWriter(request, NAME, 1 << 20)
        whole = orjson.loads(at_once(whole_message(body, writer)))

        assert whole == check_run(events), seed


def whole_choice(chunks: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    calls: dict[int, Any] = {}
    for each in chunks:
        delta = each["choices"][0]["delta"]
        for name in ("content", "reasoning"):
            message[name] += delta.get(name, "")
        for piece in delta.get("tool_calls", ()):
            known = calls.setdefault(piece["index"], piece | {"function": {"arguments": ""}})
            known["function"] |= {"name": piece["function"].get("name", "f")}
            known["function"]["arguments"] += piece["function"]["arguments"]
    message["tool_calls"] = list(calls.values())
    return {"index": 0, "message": message, "finish_reason": "stop"}


def test_a_whole_answer_with_arguments_that_are_no_json_is_a_fault() -> None:
    message = call(0, id="c", name="f", arguments='{"a":}')
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = orjson.dumps({"choices": [choice]})
    request = at_once(chat_request(orjson.dumps(ASKED)))

    with pytest.raises(BadEvent, match="not JSON"):
        at_once(whole_message(body, WholeWriter(request, NAME, 1 << 20)))
    choice |= {"finish_reason": "length", "message": call(0, id="c", name="f", arguments="{")}
    writer = WholeWriter(request, NAME, 1 << 20)
    cut_off = orjson.loads(at_once(whole_message(orjson.dumps({"choices": [choice]}), writer)))
    assert (cut_off["content"][0]["input"], cut_off["stop_reason"]) == ({}, "max_tokens")


def test_numbers_are_not_read() -> None:
    arguments = '{"n": 12345678901234567890123, "f": 1.10}'
    message = call(0, id="c", name="f", arguments=arguments)
    body = orjson.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
    request = at_once(chat_request(orjson.dumps(ASKED)))

    whole = at_once(whole_message(body, WholeWriter(request, NAME, 1 << 20)))

    assert b'"input":%b}' % arguments.encode() in whole
