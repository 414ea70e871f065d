"""Chat completions as engines write them: what a client has marked as ODD is answered with
reasoning, several calls whose pieces alternate, ids of every kind, and usage at any place.

One that is marked as THOUGHTFUL has reasoning in front, whose pieces name their attempt.

What was written is noted, so that it can be compared with what a client reads.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.wings.simulator import shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aioserver.wings.simulator.model import ParsedRequest
    from aioserver.wings.simulator.shapes import Answer

# The mark of a question. A part of the text that a client sends: whoever answers sees it there.
ODD = "odd"
THOUGHTFUL = "thoughtful"
# The pieces of reasoning.
THOUGHTS = 3
# Characters of a piece of arguments.
PIECE = 9
# Ids of calls, of which some may be the same, and some are none that an Anthropic client takes.
IDS = ("call_{ident}_{n}", "functions.look_up:{n}", "functions.look_up:0", "", "toolu_b64_{n}")
PLAIN = shapes._chat  # noqa: SLF001 - it is replaced


def odd_chat(note: Callable[[Answer], None]) -> Callable[..., Answer]:
    """Return what stands for the shape of chat completions; what it writes goes to *note*."""

    def chat(request: ParsedRequest, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
        odd = f" {ODD} " in f" {request.text} " and not cut and not request.said
        answer = _odd(request, ident, words) if odd else PLAIN(request, ident, words, cut=cut)
        if answer.streamed and f" {THOUGHTFUL}" in request.text and not request.said:
            answer = replace(answer, opening=[*_thoughts(ident, answer)])
        note(answer)
        return answer

    return chat


def _thoughts(ident: str, answer: Answer) -> Iterator[bytes]:
    """Yield the opening of *answer* with reasoning between its role and the rest of it."""
    (opening,) = chunks_of(replace(answer, count=0, closing=[]))
    (choice,) = opening["choices"]
    rest = choice["delta"]
    deltas = [{"role": rest.pop("role"), "content": None}]
    deltas += [{"reasoning_content": f"{ident}.{number} "} for number in range(THOUGHTS)]
    for delta in (*deltas, rest):
        choice["delta"] = delta
        yield shapes.event(opening)


def chunks_of(answer: Answer) -> list[Any]:
    """Return the chunks of *answer*, or the whole of it."""
    written = answer.everything() if answer.streamed else [answer.whole]
    data = (each.removeprefix(b"data: ").strip() for each in written)
    return [orjson.loads(each) for each in data if each not in {b"", b"[DONE]"}]


def _odd(request: ParsedRequest, ident: str, words: Sequence[str]) -> Answer:
    # The same for the same question, streamed or not.
    dice = random.Random(f"odd {request.text}")
    base = {"id": f"chatcmpl-{ident}", "created": 1, "model": request.model}
    usage = shapes._usage(request, len(words))  # noqa: SLF001 - as above
    thought = dice.choice(("", "", "Hm, let me see."))
    field = dice.choice(("reasoning_content", "reasoning"))
    calls = _calls(request, ident, dice) if request.call else []
    before = dice.choice(("", "\n\n", "Well, ")) if calls else ""
    finish = dice.choice(("stop", "tool_calls")) if calls else "stop"
    usage_in = dice.choice(("last", "each", "alone"))
    if not request.stream:
        message: dict[str, Any] = {"role": "assistant", "content": before or None}
        message |= {field: thought} if thought else {}
        if calls:
            message["tool_calls"] = calls
        else:
            message["content"] = "".join(words)
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return shapes.in_one_piece({**base, "choices": [choice], "usage": usage}, len(words))

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        if request.include_usage and usage_in == "each":
            more.setdefault("usage", {**usage, "completion_tokens": 1})
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return shapes.event({**base, "choices": [choice], **more})

    opening = [chunk({"role": "assistant", "content": dice.choice((None, ""))})]
    opening += [chunk({field: f"{part} "}) for part in thought.split()]
    if calls:
        pieces = [chunk(delta) for delta in _pieces(before, calls, dice)]
    else:
        pieces = [chunk({"content": word}) for word in words]
    alone = request.include_usage and usage_in != "last"
    more = {"usage": usage} if request.include_usage and not alone else {}
    closing = [chunk({}, finish, **more)]
    if alone:
        closing.append(shapes.event({**base, "choices": [], "usage": usage}))
    return shapes.Answer(
        streamed=True,
        opening=opening,
        count=len(pieces),
        piece=pieces.__getitem__,
        closing=closing,
        end=shapes.DONE,
        whole=b"",
    )


def _calls(request: ParsedRequest, ident: str, dice: random.Random) -> list[dict[str, Any]]:
    assert request.call is not None
    form = dice.choice(IDS)
    arguments = orjson.loads(request.call.arguments)
    calls = []
    for number in range(dice.choice((1, 2, 3))):
        own = orjson.dumps({**arguments, "number": number, "odd": '"}\\{ü'}).decode()
        function = {"name": request.call.name, "arguments": own}
        call = {"type": "function", "function": function}
        if own_id := form.format(ident=ident, n=number):
            call["id"] = own_id
        calls.append(call)
    return calls


def _pieces(
    before: str, calls: list[dict[str, Any]], dice: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield the deltas of *calls*, which may alternate, and of the text *before* them."""
    if before:
        yield {"content": before}
    waiting = []
    for index, call in enumerate(calls):
        text = call["function"]["arguments"]
        cuts = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        function = {**call["function"], "arguments": ""}
        head = {**call, "index": index, "function": function}
        more = [{"index": index, "function": {"arguments": cut}} for cut in cuts]
        waiting.append([head, *more])
    alternate = dice.random() < 0.5
    while waiting:
        own = dice.choice(waiting) if alternate else waiting[0]
        yield {"tool_calls": [own.pop(0)]}
        waiting = [each for each in waiting if each]
