"""What the simulated model is asked, and what it says. No I/O, no clock, the same every time."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = (
    "chat/completions",
    "completions",
    "responses",
    "embeddings",
)
_TOKEN = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")  # joined, its matches are the text again
_QUOTE = 80  # characters of the person's message that are quoted
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
    """Every queue has a bound and every wait a deadline, so a full house says at once when to try
    again instead of leaving you in the dark.""",
    """When you press stop, the provider's connection is closed at once, and no token is paid for
    that nobody reads.""",
    """WebSocket, SSE and OpenAI's own API are three faces of the same stream, so the tools you
    have will work here unchanged.""",
    """A slow reader never holds a provider's place: the answer is kept for it, and the place goes
    to whoever waits next.""",
    """You can watch connections, queues and latencies live on the page /dashboard.""",
)
_ADVICE = (
    "To talk to a real model, set llm.active in config.yaml to openai, groq, openrouter or local."
)


class BadRequest(Exception):
    """The request body is faulty: the simulator answers with *status* and OpenAI's error."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error(status, message, param=param, code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request asks for. *text* is the last message of the person, *turn* its number."""

    endpoint: str
    model: str
    text: str
    turn: int
    prompt_tokens: int
    limit: int | None
    stream: bool
    usage: bool
    tool: Mapping[str, Any] | None
    body: Mapping[str, Any]


def error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    """OpenAI's error body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if code == "insufficient_quota":
        kind = code
    elif status == 429:
        kind = "requests"
    return orjson.dumps(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}
    )


def tokens(text: str) -> list[str]:
    """Word-like pieces, each with the space before it; joined they are *text*."""
    return _TOKEN.findall(text)


def read(endpoint: str, raw: bytes) -> Asked:
    """Understand a request body. Raises BadRequest: no JSON, or not what the endpoint takes."""
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
    said = [_text(message.get("content")) for message in messages]
    asked = [t for t, message in zip(said, messages, strict=True) if message["role"] == "user"]
    text = asked[-1] if asked else ""
    options = body.get("stream_options")
    return Asked(
        endpoint=endpoint,
        model=model,
        text=text,
        turn=len(asked),
        prompt_tokens=sum(math.ceil(len(t) / 4) for t in said),
        limit=_limit(body),
        stream=stream and endpoint != EMBEDDINGS,
        usage=isinstance(options, dict) and bool(options.get("include_usage")),
        tool=_tool(body) if "call a tool" in text.lower() else None,
        body=body,
    )


def _messages(endpoint: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every endpoint's input as messages, in the way of the chat endpoint."""
    name = {CHAT: "messages", COMPLETIONS: "prompt"}.get(endpoint, "input")
    given = body.get(name)
    if given is None or given == []:
        raise BadRequest(f"Missing required parameter: '{name}'.", param=name)
    if endpoint != CHAT and isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise BadRequest(f"Invalid type for '{name}'.", param=name, code="invalid_type")
    if endpoint in {COMPLETIONS, EMBEDDINGS}:
        return [{"role": "user", "content": str(item)} for item in given]
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            raise BadRequest(f"Invalid type for '{name}[{index}]'.", param=f"{name}[{index}]")
        if endpoint == CHAT and not isinstance(item.get("role"), str):
            where = f"{name}[{index}].role"
            raise BadRequest(f"Missing required parameter: '{where}'.", param=where)
    return [{**item, "role": item.get("role", "tool")} for item in given]


def _text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of which some are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return " ".join(text for text in texts if isinstance(text, str))


def _limit(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        limit = body.get(name)
        if limit is None:
            continue
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise BadRequest(f"'{name}' must be an integer of at least 1.", param=name)
        return limit
    return None


def _tool(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first function among `tools`; Responses has it flat, Chat below `function`."""
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return function
    return None


def speech(text: str, turn: int) -> str:
    """What the model says to *text*: the same for the same message at the same turn."""
    seed = zlib.crc32(text.encode())
    quote = " ".join(text[: 10 * _QUOTE].split())  # no long work for a long message
    if len(quote) > _QUOTE:
        quote = quote[:_QUOTE].rstrip() + "…"
    if quote:
        size = f"{len(text)} character{'s' if len(text) != 1 else ''}"
        order = f", message number {turn} of this conversation" if turn > 1 else ""
        heard = f"You wrote “{quote}” ({size}{order})."
    else:
        heard = "You wrote nothing that I can quote."
    first = seed // len(_GREETINGS) % len(_FACTS)
    second = (first + 1 + seed // 101 % (len(_FACTS) - 1)) % len(_FACTS)
    greeting = _GREETINGS[seed % len(_GREETINGS)]
    facts = " ".join(f"{_FACTS[first]} {_FACTS[second]}".split())
    return f"{greeting} {heard}\n\n{facts}\n\n{_ADVICE}"


def arguments(tool: Mapping[str, Any], text: str) -> str:
    """Plausible arguments for *tool*, by the types that its schema gives."""
    schema = tool.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    samples = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    values: dict[str, Any] = {}
    for name, kind in (properties if isinstance(properties, dict) else {}).items():
        given = kind if isinstance(kind, dict) else {}
        choices = given.get("enum")
        values[name] = (
            choices[0]
            if isinstance(choices, list) and choices
            else samples.get(str(given.get("type")), text[:_QUOTE])
        )
    return orjson.dumps(values).decode()
