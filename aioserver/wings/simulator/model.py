"""Reads requests and writes the texts of the simulated model. No I/O, no clock, no randomness."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.wings.simulator import tools
from aioserver.wings.simulator.tools import COUNT_TOKENS, MESSAGES, MESSAGES_ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aioserver.wings.simulator.tools import Call

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = (
    "chat/completions",
    "completions",
    "responses",
    "embeddings",
)
NESTED_TOO_DEEPLY = "Your request is nested too deeply."
# The matches, joined, are the text again.
_TOKEN = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")
# The most characters of the user's message, and of a tool's result, that the answer quotes.
_MAX_QUOTE = 80
_MAX_RESULT_QUOTE = 300
_GREETINGS = (
    "Hello! I am a simulated model: nobody thinks here, but everything around me is real.",
    "Good to hear from you. I am only a simulated model, but I arrive the way a real one would.",
    "Thank you for trying this. I am a simulated model that runs inside the server, for free.",
    "Welcome! No real model is connected yet, so you are talking to the simulated one.",
)
_FACTS = (
    """aioserver lets many chat clients share few provider connections: each provider has one
    bounded connection pool, with one fair queue in front of it.""",
    """Each answer is a stream of numbered events. If your connection breaks, you come back, say
    the last number you have, and get exactly the rest.""",
    """Every queue has a bound and every wait a deadline, so a full server says at once when to try
    again instead of leaving you in the dark.""",
    """When you press stop, the provider's connection is closed at once, and no token is paid for
    that nobody reads.""",
    """WebSocket, SSE and OpenAI's own API are three faces of the same stream, so the tools you
    have will work here unchanged.""",
    """A slow reader never holds a provider's place: the answer is kept for it, and the place goes
    to whoever waits next.""",
    """You can watch connections, queues and latencies live on the page /dashboard.""",
)
# Markdown, with which some answers end, for tests of a client.
SAMPLES = (
    """## What stands between you and a model

1. The **connection gate** counts clients; beyond its limit they wait in a queue.
2. The *provider's queue* is fair between callers.
3. The **pool** keeps its connections open, so that a request finds one ready.""",
    """| code | meaning | what to do |
| --- | --- | --- |
| `server_at_capacity` | no place is free | come back after `Retry-After` |
| `provider_queue_full` | the provider's queue is full | choose another model |
| `resume_gap` | the events are no longer kept | ask again |""",
    """Any program that speaks OpenAI's API can ask me, too:

```sh
curl -N localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "demo", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
```

> An answer like this one is an *event stream*: see <https://html.spec.whatwg.org/multipage/server-sent-events.html>.""",
)
# The continuation of a beginning that is not the simulated model's own.
_FURTHER = " and so it goes on, for a simulated model knows no other way to say the rest."
# The members that bound an answer, if these are not `max_tokens` alone.
_BOUNDS = {CHAT: ("max_completion_tokens", "max_tokens"), RESPONSES: ("max_output_tokens",)}
# The answer to a beginning of these words, so that tests can check the rest of an answer.
_COUNTING = "one two three four five six seven eight nine ten"
# The request for the rest of an answer where the assistant's message cannot be the last one.
_ANCHOR = re.compile(r"⟦([^⟦⟧]*)⟧\Z")
_ADVICE = (
    "To talk to a real model, set llm.active in config.yaml to openai, groq, openrouter or local."
)


class BadRequest(Exception):
    """A request that the simulator refuses with *status* and OpenAI's error as *body*."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error(status, message, param=param, code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """The fields of a request's body.

    *text* is the last message of the user and *turn* its number, from 1 (0: there is no message).
    *call* is the call of a tool, if that is the answer; None for an answer in words. *words* is the
    text of such an answer; None if `speech` makes it. *cached_tokens* counts the part of the prompt
    that an engine had in its cache, and *reasoning_tokens* the most tokens of reasoning in the
    answer. *said* is the beginning of the answer, if the request has it as the assistant's last
    message. *anchor* has the last words of *said*, if the answer must repeat them (`rest`).
    """

    endpoint: str
    model: str
    text: str
    turn: int
    prompt_tokens: int
    max_tokens: int | None
    stream: bool
    include_usage: bool
    call: Call | None
    words: str | None
    body: Mapping[str, Any]
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    said: str = ""
    anchor: str = ""

    @property
    def prompt(self) -> bytes:
        """The text that an engine reads: tools, system prompt and messages, with their roles."""
        body = self.body
        parts = [body.get(name) for name in ("tools", "system", "instructions")]
        parts += _messages(self.endpoint, body)
        return b"".join(orjson.dumps(part) for part in parts if part)


def error(
    status: int, message: str, *, param: str | None = None, code: str | int | None = None
) -> bytes:
    """Return an error body as OpenAI writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if code == "insufficient_quota":
        kind = "insufficient_quota"
    elif status == 429:
        kind = "requests"
    return orjson.dumps(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}
    )


def tokens(text: str) -> list[str]:
    """Split *text* into words, each with the space before it; joined they are *text* again."""
    return _TOKEN.findall(text)


def read(endpoint: str, raw: bytes) -> ParsedRequest:
    """Parse a request body.

    Raises:
        BadRequest: the body is not JSON, or not what *endpoint* takes.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise BadRequest("We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise BadRequest("The JSON body of your request must be an object.")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("you must provide a model parameter", param="model")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise BadRequest("'stream' must be a boolean.", param="stream")
    messages = _messages(endpoint, body)
    said, anchor = _beginning(messages) if endpoint in {CHAT, MESSAGES} else ("", "")
    if anchor:
        messages = messages[:-1]
    texts = [tools.text_of(message.get("content")) for message in messages]
    user_texts = [
        text for text, message in zip(texts, messages, strict=True) if message["role"] == "user"
    ]
    last_text = user_texts[-1] if user_texts else ""
    options = body.get("stream_options")
    if endpoint in MESSAGES_ENDPOINTS:
        # Claude Code puts parts of its own in front of the person's text.
        last_text = _last_part(messages)
        texts.append(tools.text_of(body.get("system")))
        if endpoint == MESSAGES and body.get("max_tokens") is None:
            raise BadRequest("max_tokens: Field required", param="max_tokens")
    call = _call(endpoint, body, messages) if body.get("tools") else None
    return ParsedRequest(
        endpoint=endpoint,
        model=model,
        text=last_text,
        turn=len(user_texts),
        prompt_tokens=sum(math.ceil(len(text) / 4) for text in texts),
        max_tokens=_max_tokens(endpoint, body),
        stream=stream and endpoint not in {EMBEDDINGS, COUNT_TOKENS},
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        call=call,
        words=None if call else _prescribed_words(body, messages),
        body=body,
        said=said,
        anchor=anchor,
    )


def _beginning(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the beginning of the answer in *messages*, and the anchor; "" without them."""
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls"):
        return tools.text_of(last.get("content")), ""
    if len(messages) < 2 or messages[-2]["role"] != "assistant" or last["role"] != "user":
        return "", ""
    match = _ANCHOR.search(tools.text_of(last.get("content")))
    return (tools.text_of(messages[-2].get("content")), match[1]) if match else ("", "")


def rest(text: str, request: ParsedRequest) -> str:
    """Return the rest of *text* for *request*, which has the beginning of an answer."""
    return request.anchor + whole(text, request.said)[len(request.said) :]


def whole(text: str, said: str) -> str:
    """Return *text*, or another answer that begins with *said*."""
    if _COUNTING.startswith(said.strip()):
        text = _COUNTING
    return text if text.startswith(said) else said + _FURTHER


def _messages(endpoint: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the input of any endpoint as messages of the chat endpoint."""
    endpoint = CHAT if endpoint in MESSAGES_ENDPOINTS else endpoint
    name = {CHAT: "messages", COMPLETIONS: "prompt"}.get(endpoint, "input")
    messages = body.get(name)
    if messages is None or messages == []:
        raise BadRequest(f"Missing required parameter: '{name}'.", param=name)
    if endpoint != CHAT and isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise BadRequest(f"Invalid type for '{name}'.", param=name, code="invalid_type")
    if endpoint in {COMPLETIONS, EMBEDDINGS}:
        return [{"role": "user", "content": str(item)} for item in messages]
    for index, item in enumerate(messages):
        if not isinstance(item, dict):
            raise BadRequest(f"Invalid type for '{name}[{index}]'.", param=f"{name}[{index}]")
        if endpoint == CHAT and not isinstance(item.get("role"), str):
            path = f"{name}[{index}].role"
            raise BadRequest(f"Missing required parameter: '{path}'.", param=path)
    return [{**item, "role": item.get("role", "tool")} for item in messages]


def calls_of(items: object, called: frozenset[str]) -> frozenset[str]:
    """Return the ids of the calls in the input *items* of a response, and those *called* before.

    Raises:
        BadRequest: an output has the id of none of these.
    """
    found = set(called)
    for item in items if isinstance(items, list) else ():
        kind, call_id = item.get("type"), item.get("call_id")
        if kind in {"function_call", "custom_tool_call"}:
            found.add(str(call_id))
        elif kind in {"function_call_output", "custom_tool_call_output"} and call_id not in found:
            raise BadRequest(
                f"No tool call found for function call output with call_id {call_id}.",
                param="input",
            )
    return frozenset(found)


def _last_part(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the last part that is text of the user's last message."""
    users = [message.get("content") for message in messages if message["role"] == "user"]
    content = users[-1] if users else ""
    if not isinstance(content, list):
        return tools.text_of(content)
    return next((text for part in reversed(content) if (text := tools.text_of([part]))), "")


def _call(
    endpoint: str, body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> Call | None:
    try:
        return tools.call(endpoint, body, messages)
    except tools.UnknownTool as error:
        message = f"Tool choice '{error}' not found in 'tools' parameter."
        raise BadRequest(message, param="tool_choice") from error


def _prescribed_words(
    body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> str | None:
    """Return the JSON that *body* asks for, or the answer to a tool's result.

    None: neither.
    """
    if (answer := tools.structured(body, tools.question(messages)[1])) is not None:
        return answer
    results = tools.results(messages) if body.get("tools") else None
    if results is None or results.last is None:
        return None
    names = ", ".join(f"`{name}`" for name in results.called) or "a tool"
    quote = _quote(results.last, _MAX_RESULT_QUOTE)
    size = _size(results.last)
    result = f"returned “{quote}” ({size})" if quote else "returned nothing that I can quote"
    return (
        f"I am a simulated model, and I have called {names} as you asked. The last call {result}."
    )


def _max_tokens(endpoint: str, body: Mapping[str, Any]) -> int | None:
    for name in _BOUNDS.get(endpoint, ("max_tokens",)):
        limit = body.get(name)
        if limit is None:
            continue
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise BadRequest(f"'{name}' must be an integer of at least 1.", param=name)
        return limit
    return None


def speech(text: str, turn: int) -> str:
    """Write the answer to *text*: the same for the same message at the same turn."""
    seed = zlib.crc32(text.encode())
    quote = _quote(text, _MAX_QUOTE)
    if quote:
        size = _size(text)
        position = f", message number {turn} of this conversation" if turn > 1 else ""
        echo = f"You wrote “{quote}” ({size}{position})."
    else:
        echo = "You wrote nothing that I can quote."
    first = seed // len(_GREETINGS) % len(_FACTS)
    second = (first + 1 + seed // 101 % (len(_FACTS) - 1)) % len(_FACTS)
    greeting = _GREETINGS[seed % len(_GREETINGS)]
    facts = " ".join(f"{_FACTS[first]} {_FACTS[second]}".split())
    return "\n\n".join((f"{greeting} {echo}", facts, *_samples(text, seed), _ADVICE))


def _quote(text: str, most: int) -> str:
    """Return the first *most* characters of *text*, in one line."""
    # The slice bounds the work for a very long text.
    quote = " ".join(text[: 10 * most].split())
    return quote[:most].rstrip() + "…" if len(quote) > most else quote


def _size(text: str) -> str:
    return f"{len(text)} character{'s' if len(text) != 1 else ''}"


def _samples(text: str, seed: int) -> tuple[str, ...]:
    """Return the Markdown of the answer: all samples if it is asked for, else one now and then."""
    if "markdown" in text[:_MAX_QUOTE].lower():
        return SAMPLES
    return (SAMPLES[seed // 7 % len(SAMPLES)],) if seed % 5 == 0 else ()
