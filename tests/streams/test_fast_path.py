"""The fast path has no effect of its own: with it and without it clients see the same.

Most tests drive a `Road`: the provider's connection, a log and a client's socket with nothing
between them but ours, so that what comes in which turn of the loop is said by the test. The last
ones play the same over real sockets and whole servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.errors import ResumeGap
from aioserver.protocol import eventstream
from aioserver.protocol import frames as protocol_frames
from aioserver.protocol.openai import TEXT, BadEvent, ErrorEvent, Reading, learn
from aioserver.streams.entries import CANCELLED
from aioserver.streams.fast_path import MAX_CHUNK_BYTES, TextPath
from aioserver.streams.formats import EVENTS
from aioserver.streams.writer import WRITE_BYTES
from tests.support.chat import (
    CHAT,
    STREAMED,
    chat,
    frames_of,
    numbers,
    text_of,
    to_end,
)
from tests.support.raw import Raw
from tests.support.road import (
    BRIDGES,
    END,
    FACES,
    Road,
    Wire,
    assert_same,
    choice,
    chunk_of,
    cut,
    event,
    joined,
    play,
    play_bytes,
    raw,
    taking,
    word,
)
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    OK,
    Got,
    Peer,
    ScriptedProvider,
    chunk,
    exchange,
)
from tests.support.server import HTTP_CLIENT, MakeServer
from tests.support.transport import HIGH, FakeTransport
from tests.support.waiting import patience, ticks, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aioserver.providers.connections import PooledConnection
    from aioserver.streams.stream import Stream


EXAMPLES = int(os.environ.get("EXAMPLES", "10"))  # more by hand


# What is taken.


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    "text", [b"a", "Grüße 😀 \x7f\u2028".encode(), b" ", b"<|im_end|>", b"x" * 1900]
)
async def test_texts_that_repeat_what_is_around_them_are_taken(face: str, text: bytes) -> None:
    reads = [chunk(raw(text)) for _ in range(4)]
    reads += [chunk(chunk_of("x")), chunk(raw(text + b"."))]
    with taking() as taken:
        seen = await play(
            face, [EVENT_STREAM, word(0), *reads, chunk(END), chunk(DONE), LAST_CHUNK]
        )

    assert taken == reads
    assert seen == await play_bytes(
        face, b"".join((EVENT_STREAM, word(0), *reads, chunk(END), chunk(DONE), LAST_CHUNK))
    )
    assert (seen.status, seen.kept) == (b"complete", True)
    if face == "openai":
        assert seen.body == b"".join(map(chunkless, [word(0), *reads])) + END + DONE
    else:
        assert seen.text == "w0 " + 4 * text.decode() + "x" + text.decode() + "."


def chunkless(data: bytes) -> bytes:
    return data[data.index(b"\n") + 1 : -2]


def role_first() -> bytes:
    return event({"choices": [choice({"role": "assistant", "content": ""})]})


LINE_ENDS = {"CRLF": b"\r\n", "CR": b"\r"}
HABITS: dict[str, tuple[Callable[[int], bytes], int, int | None]] = {
    # a provider's n-th event, and how many of six are taken: as bytes, as frames (None: as it may)
    "the same around each text": (lambda n: chunk_of(f"w{n}"), 5, 5),
    "something else around each text": (lambda n: chunk_of(f"w{n}", random=n), 5, 0),
    "blanks in its JSON": (
        lambda n: (
            b"data: %b\n\n" % json.dumps({"choices": [choice({"content": f"w{n}"})]}).encode()
        ),
        5,
        5,
    ),
    "a role first": (lambda n: chunk_of(f"w{n}") if n else role_first(), 4, 4),
    "a role with the first text": (
        lambda n: event(
            {"choices": [choice({"content": "a"} | ({} if n else {"role": "assistant"}))]}
        ),
        5,
        4,
    ),
    "the index last": (
        lambda n: b'data: {"choices":[{"delta":{"content":"w%d"},"index":0}],"id":"c"}\n\n' % n,
        5,
        5,
    ),
    "two choices in turn": (
        lambda n: event({"choices": [choice({"content": f"w{n}"}, index=n % 2)]}),
        5,
        2,
    ),
    "two choices in each": (
        lambda n: event(
            {"choices": [choice({"content": f"w{n}"}), choice({"content": "!"}, index=1)]}
        ),
        5,
        5,
    ),
    "no text": (lambda _: event({"choices": [choice({"content": None})]}), 0, 0),
    "reasoning": (
        lambda n: event({"choices": [choice({"content": None, "reasoning_content": f"r{n}"})]}),
        5,
        0,
    ),
    "tool calls": (
        lambda n: event({"choices": [choice({"tool_calls": [{"index": 0, "id": f"c{n}"}]})]}),
        5,
        0,
    ),
    "usage in each": (lambda n: chunk_of(f"w{n}", usage={"total_tokens": n}), 5, 0),
    "no usage in each": (lambda n: chunk_of(f"w{n}", usage=None), 5, 5),
    "no error in each": (lambda n: chunk_of(f"w{n}", error=None), 0, 5),
    "a finish_reason in each": (lambda n: chunk_of(f"w{n}", "length"), 0, 0),
    "its model's name as the text": (lambda _: chunk_of("m"), 5, None),
    "a key's name as the text": (lambda _: chunk_of("content"), 5, None),
    "escapes": (lambda n: raw(b"Gr\\u00fc\\u00dfe %d" % n), 5, 0),
    "line ends escaped": (lambda n: chunk_of(f"w{n}\n"), 5, 0),
    "quotes": (lambda n: chunk_of(f'"w{n}"'), 5, 0),
    "no text but quotes": (lambda _: chunk_of(""), 0, 0),
    "the end mark as the text": (lambda n: chunk_of("[DONE]" if n else "a"), 5, 5),
    "data: [DONE] as the text": (lambda n: chunk_of("data: [DONE]" if n else "a"), 5, 5),
    '"error" as the text': (lambda n: chunk_of('"error"' if n else "a"), 5, 0),
    "no blank behind data:": (lambda n: chunk_of(f"w{n}").replace(b"data: ", b"data:"), 0, 0),
    "ids": (lambda n: b"id: %d\n" % n + chunk_of(f"w{n}"), 0, 0),
    "names": (lambda n: b"event: message\n" + chunk_of(f"w{n}"), 0, 0),
    "names behind": (lambda n: chunk_of(f"w{n}")[:-1] + b"event: message\n\n", 0, 0),
    "comments": (lambda n: b": hm\n\n" if n % 2 else chunk_of(f"w{n}"), 2, 2),
    "CRLF": (lambda n: chunk_of(f"w{n}").replace(b"\n", b"\r\n"), 0, 0),
    "CR": (lambda n: chunk_of(f"w{n}").replace(b"\n", b"\r"), 0, 0),
    "two events in each": (lambda n: chunk_of(f"v{n}") + chunk_of(f"w{n}"), 0, 0),
    "more blank lines": (lambda n: chunk_of(f"w{n}") + b"\n", 0, 0),
    "texts of many bytes": (lambda n: chunk_of(f"w{n}" + "x" * MAX_CHUNK_BYTES), 0, 0),
    "a text in two data lines": (
        lambda n: b'data: {"choices":[{"delta":\ndata: {"content":"w%d"}}]}\n\n' % n,
        0,
        0,
    ),
}


@pytest.mark.parametrize("habit", HABITS)
async def test_every_habit_of_a_provider_gives_the_same_on_both_ways(habit: str) -> None:
    say, passed, framed = HABITS[habit]
    end, done = END, DONE
    if habit in LINE_ENDS:
        end, done = (ending.replace(b"\n", LINE_ENDS[habit]) for ending in (END, DONE))
    reads = [EVENT_STREAM, *map(chunk, [*map(say, range(6)), end, done]), LAST_CHUNK]
    data = b"".join(reads)
    dice = random.Random(7)
    for face in (*FACES, *BRIDGES):
        with taking() as taken:
            seen = await play(face, reads)

        if face in BRIDGES:
            assert bool(taken) == (framed != 0)
        else:
            assert len(taken) == (passed if face == "openai" else framed) or framed is None
        # A bridge takes no call without a name.
        failed = face in BRIDGES and habit == "tool calls"
        assert (seen.status, seen.kept) == ((b"error", False) if failed else (b"complete", True))
        assert_same(face, seen, await play_bytes(face, data))
        places = dice.sample(range(1, len(data)), 9)
        assert_same(face, seen, await play(face, cut(data, places)))


BEHIND: dict[str, tuple[bytes, ...]] = {
    # what comes behind texts that were taken, and is not taken itself
    "invalid UTF-8 in a text": (chunk(raw(b"a\xff")), word(2)),
    "half a character": (chunk(raw("😀".encode()[:2])), word(2)),
    "a surrogate as UTF-8": (chunk(raw(b"\xed\xa0\x80")), word(2)),
    "a NUL in a text": (chunk(raw(b"a\0b")), word(2)),
    "a tab in a text": (chunk(raw(b"a\tb")), word(2)),
    "a line end in a text": (chunk(raw(b"a\nb")), word(2)),
    "a CR in a text": (chunk(raw(b"a\rb")), word(2)),
    "half a surrogate": (chunk(raw(rb"\ud83d")), word(2)),
    "a text that ends with a backslash": (chunk(raw(b"a\\")), word(2)),
    "a quote in a text": (chunk(raw(b'a"b')), word(2)),
    "a text that closes its string and goes on": (chunk(raw(b'a","content":"b')), word(2)),
    "an error": (chunk(event({"error": {"message": "no"}})), word(2)),
    "an error and an end": (chunk(event({"error": {"message": "no"}}) + DONE), LAST_CHUNK),
    "an error as a text": (chunk(event({"error": "no", "choices": []})), word(2)),
    "no JSON": (chunk(b"data: {nonsense}\n\n"), word(2)),
    "no object": (chunk(b"data: 7\n\n"), word(2)),
    "a finish_reason with a text": (chunk(chunk_of("end", "length")), word(2)),
    "a finish_reason of another choice": (
        chunk(event({"choices": [choice({}, "stop", index=1)]})),
        word(2),
    ),
    "an end glued to a text": (chunk(chunk_of("a") + DONE), LAST_CHUNK),
    "an end in the same read": (word(2) + chunk(DONE) + LAST_CHUNK,),
    "an end without a blank": (chunk(b"data:[DONE]\n\n"), LAST_CHUNK),
    "no [DONE]": (chunk(END), LAST_CHUNK),
    "no [DONE] and no finish_reason": (LAST_CHUNK,),
    "no end at all": (),
    "half a chunk and no end": (word(2)[:-9],),
    "half an event and no end": (chunk(chunk_of("a")[:-9]), LAST_CHUNK),
    "trailers": (chunk(END), chunk(DONE), b"0\r\nX-Sum: 1\r\nContent-Length: 3\r\n\r\n"),
    "a last chunk in two reads": (chunk(END + DONE), b"0\r\n", b"\r\n"),
    "more behind the end": (chunk(END + DONE), LAST_CHUNK + OK),
    "more events behind the end": (
        chunk(DONE + chunk_of("late")),
        chunk(chunk_of("later")),
        LAST_CHUNK,
    ),
    "usage at the end": (
        chunk(END),
        chunk(event({"choices": [], "usage": {"total_tokens": 7}})),
        chunk(DONE),
        LAST_CHUNK,
    ),
    "no chunk": (b"nonsense\r\n",),
    "a chunk shorter than it says": (
        b"%x\r\n%b\r\n" % (len(chunk_of("a")) + 1, chunk_of("a")),
        word(2),
    ),
    "a chunk longer than it says": (
        b"%x\r\n%b\r\n" % (len(chunk_of("a")) - 1, chunk_of("a")),
        word(2),
    ),
    "a size in capitals": (chunk(chunk_of("a" * 60), "%X"), word(2), chunk(DONE), LAST_CHUNK),
    "a size with zeros": (chunk(chunk_of("a"), "000%x"), word(2), chunk(DONE), LAST_CHUNK),
    "an extension": (chunk(chunk_of("a"), "%x;a=b"), word(2), chunk(DONE), LAST_CHUNK),
    "an extension that is a size": (
        chunk(chunk_of("a"), "%x;5"),
        word(2),
        chunk(DONE),
        LAST_CHUNK,
    ),
    "a blank behind the size": (chunk(chunk_of("a"), "%x "), word(2), chunk(DONE), LAST_CHUNK),
    "two chunks in a read": (word(2) + word(3), word(4), chunk(DONE), LAST_CHUNK),
    "an event in two chunks": (
        chunk(chunk_of("a")[:9]),
        chunk(chunk_of("a")[9:]),
        chunk(DONE),
        LAST_CHUNK,
    ),
    "half an event in front": (
        chunk(b"data: {"),
        chunk(chunk_of("a")),
        chunk(b'"a":1}\n\n'),
        chunk(DONE),
        LAST_CHUNK,
    ),
    "a line in front": (chunk(b"id: 7\n"), word(2), word(3), chunk(DONE), LAST_CHUNK),
    "chunks of CRLF": (chunk(b"\r\n"), chunk(b"\r\n\r\n"), word(2), chunk(DONE), LAST_CHUNK),
    "a chunk that ends with the CR of its event": (
        chunk(chunk_of("a")[:-1] + b"\r\n"),
        word(2),
        chunk(b"\r\n"),
        chunk(DONE),
        LAST_CHUNK,
    ),
}
# Chunks that hold what looks like chunks.
INNER = chunk(chunk_of("inner"))
BEHIND["a chunk inside a chunk, in reads of its own"] = (
    b"%x\r\n: " % (len(INNER) + 4),
    INNER,
    b"\n\n\r\n",
    word(2),
    chunk(DONE),
    LAST_CHUNK,
)
BEHIND["two events with CR between"] = (
    chunk(chunk_of("a").replace(b"\n", b"\r") + chunk_of("b")),
    word(2),
)
BEHIND["an end behind a CR"] = (chunk(chunk_of("a").replace(b"\n", b"\r") + DONE), LAST_CHUNK)
BEHIND["a chunk inside a chunk"] = (chunk(b": " + INNER + b"\n"), word(2), chunk(DONE), LAST_CHUNK)


@pytest.mark.parametrize("name", BEHIND)
async def test_anything_behind_texts_has_the_same_effect_on_both_ways(name: str) -> None:
    front, behind = [EVENT_STREAM, word(0), word(1), chunk(chunk_of("x"))], b"".join(BEHIND[name])
    dice = random.Random(11)
    for face in (*FACES, *BRIDGES):
        with taking() as taken:
            seen = await play(face, (*front, *BEHIND[name]))

        # A bridge learns nothing from the first text, with which more begins.
        assert taken[:2] == front[2:] or (face in BRIDGES and taken[:1] == front[3:])
        assert_same(face, seen, await play_bytes(face, b"".join((*front, behind))))
        for count in (1, 1, 1, 1, 5):
            places = [dice.randrange(1, len(behind)) for _ in range(count if behind else 0)]
            assert_same(face, seen, await play(face, [*front, *cut(behind, places)]))


SIZES_CUT = {
    # cut inside a chunk's first line, with a rest that looks like a chunk of its own
    "an extension": (b"9;a=", b"9\r\ndata: 1\n\n\r\n", word(1) + word(2)),
    "a size of two digits": (b"1", b"8\r\n: hello!\r\n", b"\r\ndata: 12\r\n\r\n\r\n"),
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", SIZES_CUT)
async def test_bytes_that_look_like_a_chunk_inside_a_first_line_are_none(
    name: str, alone: bool
) -> None:
    start, *rest = SIZES_CUT[name]
    front = [word(0), start] if alone else [word(0) + start]
    reads = [EVENT_STREAM, *front, *rest, chunk(END + DONE), LAST_CHUNK]

    seen = await play("openai", reads)

    assert_same("openai", seen, await play_bytes("openai", b"".join(reads)))


LESSONS = {  # events that are good, and a way to fail in learning from them
    "a comma": chunk_of(","),
    "a colon": chunk_of(":"),
    "a comma and a blank": b"data: %b\n\n"
    % json.dumps({"model": "m", "choices": [choice({"content": ", "})]}).encode(),
    "line ends of two kinds": chunk_of("a").replace(b"\n", b"\r") + chunk_of(None),
    "a comment behind a CR": chunk_of("a").replace(b"\n", b"\r") + b": hm\n\n",
    "a key that is hidden": b'data: {"err\\u006fr":{"message":"no"},"error":null,'
    b'"choices":[{"delta":{"content":"error"}}]}\n\n',
}


@pytest.mark.parametrize("name", LESSONS)
async def test_learning_from_a_good_event_never_fails(name: str) -> None:
    seen = await play("sse", [EVENT_STREAM, chunk(LESSONS[name]), chunk(END + DONE), LAST_CHUNK])

    assert (seen.status, seen.error) == (b"complete", "")


# Anything.

plain = st.text(
    st.characters(min_codepoint=0x20, exclude_characters='"\\', exclude_categories=["Cs"]),
    min_size=1,
    max_size=20,
)
ugly = st.sampled_from(
    (
        "",
        "\n",
        "\r\n",
        "\0",
        "\t",
        '"',
        "\\",
        '\\"',
        *(",", ":", ", ", ": "),
        '"error"',
        "[DONE]",
        "data: [DONE]\n\n",
        "m",
        "a",
    )
) | st.sampled_from(
    ("content", "choices", "finish_reason", '"finish_reason":"stop"', "\u2028", "😀", "é" * 1000)
)
texts = plain | ugly | st.text(max_size=20)
ESCAPES = (rb"\u00e9", rb"\ud83d\ude00", rb"\ud83d", rb"\/")


@st.composite
def events(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """The events of an answer as one provider writes them, and its line end."""
    ascii_only, spaced, noise = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 5))
    keys = draw(st.permutations(("id", "model", "choices")))
    inner = draw(st.permutations(("index", "delta", "finish_reason")))
    field = draw(st.sampled_from((b"data: ",) * 6 + (b"data:",)))
    end = draw(st.sampled_from((b"\n",) * 8 + (b"\r\n", b"\r")))
    more = draw(st.sampled_from(({}, {}, {"usage": None}, {"error": None})))

    def written(*choices: dict[str, Any], **replaced: Any) -> bytes:
        ordered = [{key: fields[key] for key in inner if key in fields} for fields in choices]
        answer: dict[str, Any] = {"id": "c1", "model": "m", "choices": ordered}
        answer = {key: answer[key] for key in keys} | more | replaced
        if not noise:
            answer["p"] = "x" * draw(st.integers(0, 9))
        separators = None if spaced else (",", ":")
        made = json.dumps(answer, ensure_ascii=ascii_only, separators=separators)
        return b"".join((field, made.encode("utf-8", "replace"), end, end))

    def spoilt(junk: bytes) -> bytes:
        return written(choice({"content": "?"})).replace(b"?", junk)

    says: dict[str, Callable[[str], bytes]] = {
        "text": lambda text: written(choice({"content": text})),
        "role": lambda text: written(choice({"role": "assistant", "content": text})),
        "reasoning": lambda text: written(choice({"reasoning_content": text, "content": None})),
        "tools": lambda text: written(choice({"tool_calls": [{"index": 0, "id": text}]})),
        "finish": lambda text: written(choice({"content": text}, "length")),
        "usage": lambda _: written(usage={"total_tokens": 7}),
        "other": lambda text: written(choice({"content": text}, index=1)),
        "both": lambda text: written(choice({"content": text}), choice({"content": "b"}, index=1)),
        "null": lambda _: written(choice({"content": None})),
        "no index": lambda text: written({"delta": {"content": text}}),
        "comment": lambda _: b": hm" + end * 2,
        "error": lambda _: event({"error": {"message": "no"}}).replace(b"\n", end),
        "bytes": lambda _: spoilt(b"?" + draw(st.binary(max_size=5)).translate(None, b"\r\n")),
        "escape": lambda _: spoilt(draw(st.sampled_from(ESCAPES))),
    }
    kinds = st.sampled_from(("text",) * 11 + tuple(says))
    written_events = [
        says[kind](draw(texts)) for kind in draw(st.lists(kinds, min_size=1, max_size=9))
    ]
    return written_events, end


@st.composite
def answers(draw: st.DrawFn) -> list[bytes]:
    """The reads of an answer: most are a chunk each, most chunks are an event each."""
    sizes = st.sampled_from(("%x",) * 12 + ("%X", "0%x", "%x;a", "%x;a=b"))
    parts, line_end = draw(events())
    tail = [draw(st.sampled_from((chunk_of("a"), raw("é".encode()))))] * draw(st.integers(0, 3))
    tail += [END] * draw(st.booleans())
    if draw(st.booleans()):
        tail.append(event({"choices": [], "usage": {"total_tokens": 8}}))
    if draw(st.integers(0, 3)):
        tail.append(DONE)
    parts += [part.replace(b"\n", line_end) for part in tail]
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(parts) - 1))
        parts[at : at + 2] = [b"".join(parts[at : at + 2])]
    chunks = [chunk(part, draw(sizes)) for part in parts]
    last = draw(st.sampled_from((LAST_CHUNK, LAST_CHUNK, b"0\r\nX-Sum: 1\r\n\r\n", b"")))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(chunks) - 1))
        chunks[at : at + 2] = [b"".join(chunks[at : at + 2])]
    return [EVENT_STREAM, *chunks, *([last] if last else [])]


@settings(max_examples=EXAMPLES)
@given(answers(), st.randoms(use_true_random=False))
async def test_every_answer_is_the_same_however_it_comes(
    reads: list[bytes], dice: random.Random
) -> None:
    data = b"".join(reads)
    places = [dice.randrange(1, len(data)) for _ in range(dice.choice((1, 3, 9)))]
    for face in (*FACES, *BRIDGES):
        seen = await play(face, reads)
        assert_same(face, seen, await play_bytes(face, data))
        assert_same(face, seen, await play(face, cut(data, places)))


async def test_a_translated_answer_that_is_too_long_ends_at_the_same_event_on_both_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = [EVENT_STREAM, *(chunk(chunk_of("x" * 90)) for _ in range(99))]
    with taking() as taken:
        seen = await play("bridged_response", reads, most=8000)
    monkeypatch.setattr(TextPath, "forward", lambda _path, _read: False)

    assert len(taken) > 10
    assert seen.status == b"error"
    assert "more than 8000 bytes" in seen.error
    assert_same("bridged_response", seen, await play("bridged_response", reads, most=8000))


# What is learned.

NOT_LEARNED = {
    "no text": event({"choices": [choice({"content": None})]}),
    "an empty text": chunk_of(""),
    "a finish_reason": chunk_of("a", "stop"),
    "usage": chunk_of("a", usage={"total_tokens": 7}),
    "usage in Groq's place": chunk_of("a", x_groq={"usage": {"total_tokens": 7}}),
    "another choice": event({"choices": [choice({"content": "a"}, index=1)]}),
    "reasoning": event({"choices": [choice({"reasoning_content": "a"})]}),
    "reasoning and a text": event(
        {"choices": [choice({"reasoning_content": "r", "content": "a"})]}
    ),
    "a tool call and a text": event(
        {"choices": [choice({"content": "a", "tool_calls": [{"index": 0}]})]}
    ),
    "the same choice twice": event({"choices": [choice({"content": "a"})] * 2}),
    "a text that is written with escapes": raw(rb"\u0061"),
    "a text that is written with escapes, and a name that is not": raw(rb"\u006d"),
    "a slash that is escaped": raw(rb"\/"),
    "two lines": b'data: {"choices":[{"delta":\ndata: {"content":"a"}}]}\n\n',
    "an id": b"id: 1\n" + chunk_of("a"),
    "two events": chunk_of("a") + chunk_of(None),
    "a comment in front": b": hm\n\n" + chunk_of("a"),
    "a comment behind": chunk_of("a") + b": hm\n\n",
    "no blank": chunk_of("a").replace(b"data: ", b"data:"),
    "CRLF": chunk_of("a").replace(b"\n", b"\r\n"),
    "CR": chunk_of("a").replace(b"\n", b"\r"),
}


@pytest.mark.parametrize("name", NOT_LEARNED)
def test_no_shape_is_learned_where_it_would_not_be_true(name: str) -> None:
    assert learn(NOT_LEARNED[name], Reading()) is None


LEARNED = {
    "a text": (chunk_of("a"), 0),
    "a quote in a text": (chunk_of('a"b'), 0),
    "a line end in a text": (chunk_of("a\nb"), 0),
    "a backslash and a brace": (chunk_of("\\}"), 0),
    "choice 1": (event({"choices": [choice({"content": "a"}, index=1)]}), 1),
    "choice 1 of two with the same text": (
        event({"choices": [choice({"content": "b"}), choice({"content": "a"}, index=1)]}),
        1,
    ),
    "another text in front that does not count": (raw(b'b","content":"a'), 0),
    "a message": (event({"choices": [{"message": {"content": "a"}}]}), 0),
    "blanks in JSON": (b'data: {"choices" : [ {"delta" : {"content" : "a"} } ] } \n\n', 0),
    "tabs and CR in JSON": (b'data: {"choices":\t[{"delta":\t{"content":"a"}}]}\n\n', 0),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_shape_is_what_is_around_the_text(name: str) -> None:
    said_event, index = LEARNED[name]
    shape = learn(said_event, Reading(index))

    assert shape is not None
    assert_true(shape.prefix, shape.suffix, "another", index)


def assert_true(before: bytes, behind: bytes, text: str, index: int) -> None:
    """Assert that the fast path makes of *text* there what the long way makes of it."""
    reading = Reading(index)
    written = text.encode()
    head = protocol_frames.frame_head("r1")

    (read,) = reading.read((before + written + behind)[len(b"data: ") : -2])

    assert read == TEXT % (b'"%b"' % written)
    assert protocol_frames.text_frame(head, 7, written + b'"') == protocol_frames.frame(
        head, 7, b"chunk", read
    )
    assert reading.text == text
    assert (reading.finish_reason, reading.usage) == (None, None)


@settings(max_examples=5 * EXAMPLES)
@given(events(), st.lists(plain, min_size=1, max_size=4), st.integers(0, 1))
def test_lessons_are_true_for_every_text(
    texts: tuple[list[bytes], bytes], others: list[str], index: int
) -> None:
    for block in texts[0]:
        with contextlib.suppress(ErrorEvent, BadEvent):
            Reading(index).read(block[6:-2])  # only what was read is learned from
            if (shape := learn(block, Reading(index))) is not None:
                for text in others:
                    assert_true(shape.prefix, shape.suffix, text, index)


def members(*groups: list[tuple[str, str]]) -> str:
    """A JSON object, whatever keys it repeats."""
    pairs = ",".join(f"{key}:{value}" for group in groups for key, value in group)
    return "{" + pairs + "}"


few = st.sampled_from(
    ('"a"', '"b"', '"content"', '"delta"', '"error"', '"<a>"', "null", "0", "1", "{}")
)
few_keys = st.sampled_from(
    (
        *(
            '"content"',
            '"delta"',
            '"message"',
            '"index"',
            '"finish_reason"',
            '"choices"',
            '"usage"',
        ),
        *('"error"', '"a"', '"<a>"', '"err\\u006fr"', '"\\u0061"', '"cont\\u0065nt"'),
    )
)
crossed = st.recursive(
    few,
    lambda inner: (
        st.lists(st.tuples(few_keys, inner), max_size=4).map(members)
        | st.lists(inner, max_size=2).map(lambda those: f"[{','.join(those)}]")
    ),
    max_leaves=8,
)


@settings(max_examples=5 * EXAMPLES)
@given(
    *[st.lists(st.tuples(few_keys, crossed), max_size=3) for _ in range(4)],
    st.sampled_from(("a", "b", "content", "error", "<a>", "delta")),
    plain,
)
def test_lessons_are_true_among_repeated_keys(
    top: list[tuple[str, str]],
    behind: list[tuple[str, str]],
    around: list[tuple[str, str]],
    beside: list[tuple[str, str]],
    text: str,
    other: str,
) -> None:
    delta = members(beside[:1], [('"content"', f'"{text}"')], beside[1:])
    chosen = members(around[:1], [('"delta"', delta)], around[1:])
    whole = members(top, [('"choices"', f"[{chosen}]")], behind)
    data = b"data: %b\n\n" % whole.encode()
    try:
        Reading().read(data[6:-2])
    except (ErrorEvent, BadEvent):
        return  # it ends the answer, nothing is learned

    shape = learn(data, Reading())

    if shape is not None:
        assert_true(shape.prefix, shape.suffix, other, 0)


# What comes between the read that was taken and the end of that turn of the loop.


@contextlib.asynccontextmanager
async def under_way(face: str, **changes: Any) -> AsyncIterator[tuple[Road, list[bytes]]]:
    """A road whose path is open, and the reads that were taken on it."""
    with taking() as taken:
        async with Road(face, **changes) as road:
            await road.say(EVENT_STREAM, word(0), word(1))
            assert taken == [word(1)]
            yield road, taken


def in_order(data: bytes, *marks: bytes) -> bool:
    """Return whether each of *marks* is in *data* once, in this order."""
    places = [data.find(mark) for mark in marks]
    return -1 not in places and places == sorted(places) and all(data.count(m) == 1 for m in marks)


@pytest.mark.parametrize("face", FACES)
async def test_reads_that_are_taken_are_written_at_the_end_of_the_turn(face: str) -> None:
    async with under_way(face) as (road, taken):
        before = len(road.socket.writes)

        road.hear(word(2), word(3))
        assert len(taken) == 3
        assert len(road.socket.writes) == before
        await ticks()

        assert in_order(road.body, b"w1 ", b"w2 ", b"w3 ")


@pytest.mark.parametrize("face", FACES)
async def test_a_control_frame_comes_behind_what_was_taken_and_before_what_comes(
    face: str,
) -> None:
    async with under_way(face) as (road, taken):
        road.hear(word(2))
        road.writer.send(b": control\n\n")
        road.hear(word(3))
        await ticks()

        assert len(taken) == 3
        assert in_order(road.body, b"w2 ", b": control\n\n", b"w3 ")


@pytest.mark.parametrize("face", FACES)
async def test_the_last_bytes_come_behind_what_was_taken(face: str) -> None:
    async with under_way(face) as (road, _):
        road.hear(word(2))
        road.writer.end(b"0\r\n\r\n")
        road.hear(word(3))
        await ticks()

        assert in_order(road.socket.written, b"w2 ", b"0\r\n\r\n")
        assert road.socket.written.endswith(b"0\r\n\r\n")
        assert road.stream.readers == []


@pytest.mark.parametrize("face", FACES)
async def test_the_end_in_the_same_turn_comes_behind_what_was_taken(face: str) -> None:
    async with under_way(face) as (road, _):
        road.hear(word(2), chunk(END), chunk(DONE), LAST_CHUNK)
        road.outbox.flush()

        assert road.writer.following == 0
        end = DONE if face == "openai" else b'"complete"'
        assert in_order(road.body, b"w1 ", b"w2 ", end)


async def test_what_is_kept_at_the_end_has_what_was_taken_behind_a_finish_reason() -> None:
    kept: list[str] = []

    class TextKeeper:
        def identified(self, answer_id: str) -> None: ...

        def keep(self, _stream: Stream) -> None:
            kept.append(road.reading.text)

    async with Road("sse") as road:
        road.stream.keeper = TextKeeper()
        await road.say(EVENT_STREAM, word(0), word(1), chunk(END))
        with taking() as taken:
            await road.say(word(2), word(3), LAST_CHUNK)
            await road.over()

        assert taken == [word(2), word(3)]
    assert kept == ["w0 w1 w2 w3 "]


@pytest.mark.parametrize("face", FACES)
async def test_a_fault_in_the_same_turn_comes_behind_what_was_taken(face: str) -> None:
    async with under_way(face) as (road, _):
        road.hear(word(2))
        road.protocol.connection_lost(None)
        await road.over()

        assert in_order(road.body, b"w2 ", b"closed the connection early")


@pytest.mark.parametrize("face", FACES)
async def test_reads_taken_before_the_client_unfollows_are_still_written(face: str) -> None:
    async with under_way(face) as (road, taken):
        road.hear(word(2))
        road.writer.unfollow(road.cursor)
        written = road.socket.written
        road.hear(word(3))
        await ticks()

        assert b"w2 " in written
        assert road.socket.written == written
        assert len(taken) == 2
        assert road.stream.readers == []


@pytest.mark.parametrize("face", ["sse", "websocket"])
async def test_a_stream_without_readers_is_kept_for_their_return(face: str) -> None:
    async with under_way(face) as (road, taken):
        road.hear(word(2))
        road.writer.unfollow(road.cursor)
        last = road.stream.last
        await road.say(word(3), word(4))
        back = FakeTransport()
        writer = road.another(back)
        writer.follow(road.stream, last, road.look)
        await ticks()
        await road.say(word(5), word(6))
        await road.say(chunk(DONE), LAST_CHUNK)
        await ticks()

        assert len(taken) == 3  # w5 went the long way, and opened the path again
        assert b"w2 " not in back.written
        assert in_order(back.written, b"w3 ", b"w4 ", b"w5 ", b"w6 ", b'"complete"')
        assert road.reading.text == "w0 w1 w2 w3 w4 w5 w6 "


@pytest.mark.parametrize("face", ["sse", "websocket"])
async def test_a_second_reader_in_the_same_turn_gets_all_and_the_first_loses_nothing(
    face: str,
) -> None:
    async with under_way(face) as (road, taken):
        road.hear(word(2))
        joined_socket = FakeTransport()
        second = road.another(joined_socket)
        second.follow(road.stream, 0, road.look)
        road.hear(word(3))
        await road.say(word(4), word(5))
        assert len(taken) == 2  # nothing since there are two
        second.close()
        await road.say(word(6), word(7))
        assert len(taken) == 3
        await road.say(chunk(DONE), LAST_CHUNK)
        await ticks()

        words = [b"w%d " % n for n in range(8)]
        assert in_order(road.body, *words, b'"complete"')
        assert in_order(joined_socket.written, *words[:6])


async def test_a_second_stream_on_the_socket_closes_the_path_and_its_end_opens_it() -> None:
    async with under_way("websocket") as (road, taken), Road("websocket") as other:
        assert other.writer.following == 1
        other.writer.close()
        followed = road.writer.follow(other.stream, 0, road.look)
        await ticks()

        road.hear(word(2))
        other.hear(EVENT_STREAM, chunk(chunk_of("o0 ")), chunk(chunk_of("o1 ")))
        road.hear(word(3))
        await ticks()
        assert len(taken) == 1
        road.writer.unfollow(followed)
        await road.say(word(4), word(5))

        assert len(taken) == 2
        assert in_order(road.body, *[b"w%d " % n for n in range(6)])
        assert in_order(road.body, b"o0 ", b"o1 ")


@pytest.mark.parametrize("face", FACES)
async def test_a_cancelled_answer_ends_behind_what_was_taken(face: str) -> None:
    async with under_way(face) as (road, taken):
        road.hear(word(2))
        road.task.cancel()
        road.hear(word(3))  # before the task has heard of it
        await ticks()
        road.hear(word(4))
        await ticks()

        assert len(taken) == 3
        assert road.stream.end_status == CANCELLED
        assert in_order(road.body, b"w2 ", b"w3 ")
        assert b"w4 " not in road.body
        assert (road.wire.kept, road.wire.closed) == (0, 1)
        assert road.writer.following == 0


@pytest.mark.parametrize("face", FACES)
async def test_a_client_that_goes_before_the_end_of_the_turn_gets_nothing_more(face: str) -> None:
    async with under_way(face) as (road, taken):
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        before = len(road.socket.writes)
        road.hear(word(2))
        road.socket.lose()  # its transport says "written after the end"
        await ticks()
        await road.say(word(3))
        road.writer.close()
        await road.say(word(4))

        assert not faults
        assert len(road.socket.writes) == before
        assert len(taken) == 3
        assert road.stream.readers == []
        assert road.stream.last == 6  # all is counted, whoever reads it
        if face != "openai":
            back = FakeTransport()
            road.another(back).follow(road.stream, 3, road.look)
            await until(lambda: in_order(back.written, b"w2 ", b"w3 ", b"w4 "))


@pytest.mark.parametrize("face", FACES)
async def test_where_nobody_can_come_back_nothing_that_was_taken_is_kept(face: str) -> None:
    async with under_way(face, window=0.0) as (road, taken):
        await road.say(*map(word, range(2, 40)))

        assert len(taken) == 39
        road.stream.close_fast_path()
        assert (len(road.stream.entries), road.stream.bytes) == (0, 0)
        assert road.stream.last == 41
        assert road.cursor.next_index == road.stream.offset


@pytest.mark.parametrize("face", ["sse", "websocket"])
async def test_a_log_fed_by_the_fast_path_is_bounded(face: str) -> None:
    async with under_way(face, most=5_000) as (road, taken):
        for number in range(2, 400):
            await road.say(chunk(chunk_of(f"w{number} and some more ")))
            assert road.stream.bytes <= 5_000
            assert road.stream.bytes == sum(entry.size for entry in road.stream.entries)
            assert road.streams.stats().bytes == road.stream.kept_bytes

        assert len(taken) == 399
        assert road.stream.first > 100
        assert in_order(road.body, *(b'"w%d ' % n for n in range(400)))
        with pytest.raises(ResumeGap):
            road.stream.locate(100)


@pytest.mark.parametrize("face", ["sse", "websocket"])
@pytest.mark.parametrize("text", ["w%d ", "Grüße %d 😀", "a text of some length, number %d"])
async def test_reads_that_were_taken_are_there_for_later_readers(face: str, text: str) -> None:
    """From every event on, and the same bytes that the first one got."""
    async with under_way(face) as (road, taken):
        reads = [chunk(chunk_of(text % number)) for number in range(2, 120)]
        reads[77] = chunk(chunk_of('a "quote" and\na line end'))  # the long way: between two runs
        await road.say(*reads)
        assert len(taken) == 118
        parts = list(road.body.partition(b'"event_id":60,'))

        for after in range(road.stream.last):
            back = FakeTransport()
            writer = road.another(back)
            writer.follow(road.stream, after, road.look)
            await writer.flush()
            body = joined(back.written) if road.chunked else back.written
            assert road.body.endswith(body)
            assert body.count(b'"event_id":') == road.stream.last - after
            assert (parts[1] in body) == (after < 60)
            writer.close()

        await road.say(word(1000), word(1001))
        assert in_order(road.body, b"w1000 ", b"w1001 ")
        assert road.reading.text.count(text.partition("%")[0]) >= 117


async def test_all_faces_resume_what_the_fast_path_has_taken() -> None:
    async with under_way("websocket") as (road, taken):
        await road.say(*map(word, range(2, 20)))
        assert len(taken) == 19
        back = FakeTransport()
        writer = road.another(back)
        writer.follow(road.stream, 10, EVENTS)
        await writer.flush()

        events = eventstream.parse(back.written)
        assert [int(event.id or b"") for event in events] == list(range(11, road.stream.last + 1))
        assert [orjson.loads(event.data)["chunk"]["data"] for event in events] == [
            f"w{n} " for n in range(9, 20)
        ]
        writer.close()


# A client that does not read.


def large(number: int) -> bytes:
    return chunk(chunk_of(f"v{number} " + "x" * 1500))


@pytest.mark.parametrize("face", FACES)
async def test_a_client_that_stops_reading_closes_the_path_and_loses_nothing(face: str) -> None:
    async with under_way(face, slow=True) as (road, taken):
        for number in range(100):
            await road.say(large(number))
        assert road.socket.draining == 1
        assert WRITE_BYTES < road.socket.held < 2 * WRITE_BYTES
        stopped = len(taken)
        assert 20 < stopped < 60

        road.socket.slow = False
        road.socket.take()
        await until(lambda: b"v99 " in road.socket.written)
        await road.say(word(2), word(3), chunk(DONE), LAST_CHUNK)
        await road.over()

        assert len(taken) == stopped + 1
        marks = [b"v%d x" % number for number in range(100)]
        assert in_order(road.body, b"w1 ", *marks, b"w2 ", b"w3 ")
        assert road.dropped == []
        assert road.writer.following == 0


@pytest.mark.parametrize("face", FACES)
async def test_unread_bytes_are_bounded_and_then_the_client_is_dropped(face: str) -> None:
    async with under_way(face, slow=True, most=50_000) as (road, _):
        for number in range(200):
            await road.say(large(number))
            assert road.stream.bytes < 55_000
        road.socket.take()
        await until(lambda: b"slow_client" in road.socket.written)

        assert road.dropped == ["reader fell behind"]
        assert road.writer.following == 0
        road.hear(word(2))


def nearly_full(road: Road) -> None:
    """Fill the stream so far that one more event is too much."""
    road.socket.slow = True
    road.socket.held = HIGH


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    "between",
    ["nothing", "a read", "a frame", "a long read", "the end"],
)
async def test_one_task_waits_for_a_client_that_is_full_at_the_end_of_a_turn(
    between: str, face: str
) -> None:
    async with under_way(face) as (road, _):
        nearly_full(road)
        road.hear(word(2))
        match between:
            case "a read":
                road.hear(word(3))
            case "a frame":
                road.writer.send(b": control\n\n")
            case "a long read":
                road.hear(word(3) + word(4))
            case "the end":
                road.hear(chunk(END), chunk(DONE), LAST_CHUNK)
        await ticks()
        assert road.socket.draining == 1
        waiting = [task for task in asyncio.all_tasks() if "_unblock" in repr(task.get_coro())]
        assert len(waiting) == 1

        road.socket.slow = False
        road.socket.take()
        await until(lambda: road.socket.draining == 0)
        await road.say(word(5))
        assert in_order(road.body, b"w1 ", b"w2 ")
        assert (b"w5 " in road.body) == (between != "the end")
        road.socket.take()


# The provider's connection.


@pytest.mark.parametrize("face", FACES)
async def test_a_read_that_was_taken_is_a_read_for_the_read_timeout(face: str) -> None:
    async with under_way(face) as (road, taken):
        road.exchange.last_byte_at -= 1000.0  # the last one that went the long way
        assert road.exchange.check_deadline() is not None  # w1 counts
        path = road.protocol.fast_path
        assert path is not None
        path.forwarded_at -= 1000.0

        road.hear(word(2))
        assert len(taken) == 2
        left = road.exchange.check_deadline()
        assert left is not None
        assert left > 0
        path.forwarded_at -= 1000.0
        assert road.exchange.check_deadline() is None
        await road.over()

        assert road.stream.error is not None
        assert "sent nothing for 30.0 s" in road.stream.error.message
        assert in_order(road.body, b"w2 ", b"sent nothing for")


@pytest.mark.parametrize("face", FACES)
async def test_a_heartbeat_knows_of_what_was_taken(face: str) -> None:
    async with under_way(face) as (road, _):
        path = road.protocol.fast_path
        assert path is not None
        assert road.writer.last_write == path.forwarded_at

        path.forwarded_at += 1000.0
        assert road.writer.last_write == path.forwarded_at
        road.writer.unfollow(road.cursor)

        assert road.writer.last_write == path.forwarded_at


async def test_answer_after_answer_on_one_connection() -> None:
    wire = Wire()
    plain_answers = (
        OK,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    )
    heads = (
        EVENT_STREAM,
        b"HTTP/1.1 102 Processing\r\nA: b\r\n\r\n" + EVENT_STREAM,
        EVENT_STREAM.replace(b"\r\nC", b"\r\nX: y\r\nC"),
    )
    lasts = (LAST_CHUNK, b"0\r\nX-Sum: 1\r\n\r\n", b"0;a=b\r\n\r\n")
    for turn in range(12):
        face = FACES[turn % 3]
        with taking() as taken:
            road = Road(face, wire=wire)
            await ticks()
            await road.say(heads[turn % len(heads)], *map(word, range(5)), chunk(END), chunk(DONE))
            await road.say(lasts[turn // 3 % 3])
            await road.over()

        assert len(taken) == 4
        assert road.seen.status == b"complete"
        assert (wire.kept, wire.closed) == (2 * turn + 1, 0)
        assert (wire.protocol.fast_path, wire.protocol.exchange) == (None, None)

        with taking() as taken:
            got = Got()
            task = asyncio.create_task(exchange(cast("PooledConnection", wire), got).run([b""]))
            await ticks()
            wire.protocol.data_received(plain_answers[turn % len(plain_answers)])
            await task
        assert got.ended
        assert got.headers.keys() <= {"content-length", "upgrade", "connection", "x-a"}
        assert not taken
        assert (wire.kept, wire.closed) == (2 * turn + 2, 0)
    wire.protocol.connection_lost(None)


async def test_bytes_that_look_like_a_chunk_in_the_next_answer_are_none() -> None:
    wire = Wire()
    async with Road("sse", wire=wire) as road:
        await road.say(EVENT_STREAM, word(0), chunk(END + DONE), LAST_CHUNK)
        got = Got()
        task = asyncio.create_task(exchange(cast("PooledConnection", wire), got).run([b""]))
        await ticks()
        await road.say(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"5\r\nhello\r\n")
        await task

    assert got.body == b"5\r\nhello\r\n"
    assert (wire.kept, wire.closed) == (2, 0)


BADLY = {
    "cut off": (),
    "no HTTP": (b"nonsense\r\n",),
    "an error": (chunk(event({"error": {"message": "no"}})),),
    "no end": (LAST_CHUNK,),
}


@pytest.mark.parametrize("name", BADLY)
async def test_an_answer_that_ends_badly_after_reads_that_were_taken_closes_its_connection(
    name: str,
) -> None:
    async with under_way("websocket") as (road, _):
        await road.say(*BADLY[name])
        await road.over()

        assert road.stream.end_status == b"error"
        assert (road.protocol.fast_path, road.protocol.exchange) == (None, None)
        if name != "no end":
            assert road.wire.kept == 0
        road.hear(word(2))
        assert b"w2 " not in road.body


# Whole servers.


class Stage:
    """A provider whose next bytes the test says: `peer = await stage.asked()`."""

    def __init__(self) -> None:
        self._asked: asyncio.Queue[Peer] = asyncio.Queue()
        self.requests: list[bytes] = []

    async def play(self, peer: Peer) -> None:
        while True:
            self.requests.append(await peer.request())
            self._asked.put_nowait(peer)

    async def asked(self) -> Peer:
        """The connection on which the next request came."""
        return await asyncio.wait_for(self._asked.get(), patience(10))


@pytest.fixture
async def stage() -> Stage:
    return Stage()


@pytest.fixture
async def played(stage: Stage) -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider(stage.play) as provider:
        yield provider


@pytest.fixture
def taken() -> Iterator[list[bytes]]:
    with taking() as reads:
        yield reads


def staged(provider: ScriptedProvider, **http_client: Any) -> dict[str, Any]:
    """The changes of a server whose provider is *provider*."""
    return {
        "llm.providers.sim.base_url": provider.url,
        "llm.providers.sim.http_client": {**HTTP_CLIENT, **http_client},
    }


async def test_openais_bytes_come_one_by_one_and_the_next_answer_starts_clean(
    make_server: MakeServer, stage: Stage, played: ScriptedProvider, taken: list[bytes]
) -> None:
    server = await make_server(**staged(played))
    async with Raw(server) as client:
        for turn in range(3):
            await client.post("/v1/chat/completions", STREAMED)
            peer = await stage.asked()
            await peer.send(EVENT_STREAM, word(0))
            assert (await client.head()).status == 200
            for number in range(1, 6):  # w0 and w1 go the long way
                assert await client.until(b"\n\n\r\n") == word(number - 1)
                await peer.send(word(number))
            await peer.send(chunk(END), chunk(DONE) + LAST_CHUNK)
            rest = await client.until(LAST_CHUNK)

            assert joined(rest[: -len(LAST_CHUNK)]) == chunk_of("w5 ") + END + DONE
            assert taken == [word(number) for number in range(2, 6)] * (turn + 1)

            await client.post("/v1/chat/completions", CHAT)
            await (await stage.asked()).send(JSON_ANSWER)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, JSON_ANSWER.partition(b"\r\n\r\n")[2])
    assert played.accepted == 1
    assert len(stage.requests) == 6


WHOLE = orjson.dumps({"object": "chat.completion", "choices": [{"message": {"content": "Hi"}}]})
JSON_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(WHOLE), WHOLE)
)


async def test_an_sse_client_gets_every_event_at_once_and_the_next_answer_starts_clean(
    make_server: MakeServer, stage: Stage, played: ScriptedProvider, taken: list[bytes]
) -> None:
    server = await make_server(**staged(played))
    async with Raw(server) as client:
        for name in "abc":
            await client.ask_sse(name, text="Hello")
            peer = await stage.asked()
            await peer.send(EVENT_STREAM)
            assert (await client.head()).status == 200
            body = b""
            for number in range(6):
                await peer.send(word(number))
                body += await client.until(b'"w%d "' % number)
            await peer.send(chunk(END), chunk(DONE), LAST_CHUNK)
            body += await client.until(b"\r\n" + LAST_CHUNK)

            frames = frames_of(joined(body[: -len(LAST_CHUNK)]))
            assert numbers(frames) == list(range(1, 9))
            assert text_of(frames) == "w0 w1 w2 w3 w4 w5 "
    assert len(taken) == 15
    assert played.accepted == 1


@pytest.mark.parametrize("window", [0, 30])
async def test_two_answers_on_one_socket(
    window: int,
    make_server: MakeServer,
    stage: Stage,
    played: ScriptedProvider,
    taken: list[bytes],
) -> None:
    server = await make_server(**staged(played), **{"chat.streams.resume_window": window})
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        first = await stage.asked()
        await first.send(EVENT_STREAM, word(0), word(1))
        assert len(taken) == 1
        await ws.send_json(chat("r2"))
        two = await stage.asked()
        await two.send(EVENT_STREAM, word(0), word(1))
        await first.send(word(2))
        await two.send(word(2), chunk(DONE) + LAST_CHUNK)
        seen = [await ws.receive_json() for _ in range(3)]
        while seen[-1]["status"] != "complete":
            seen.append(await ws.receive_json())
        assert len(taken) == 1
        await first.send(word(3), word(4), chunk(DONE) + LAST_CHUNK)
        seen += await to_end(ws, "r1")

        for name, count in (("r1", 5), ("r2", 3)):
            frames = [frame for frame in seen if frame["request_id"] == name]
            assert numbers(frames) == list(range(1, count + 3))
            assert text_of(frames) == "".join(f"w{n} " for n in range(count))
        assert len(taken) == 2
