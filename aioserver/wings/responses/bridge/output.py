"""The output items of a response, while they grow, and the response object around them.

The texts of items are kept escaped, as they stand in JSON, so that an event is a concatenation of
bytes, and no text is written twice. An item is one of

    Message    parts of text and of a refusal
    Reasoning  one part
    Call       the arguments of a function, or the input of a custom tool

The members of the object that repeat the request are written once, and stand in each copy of it.
OpenAI repeats the instructions and the tools too; so do we, unless they are longer than
MAX_REPEATED_BYTES.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from aioserver.protocol.tokens import plausible, tokens_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.wings.responses.bridge.tools import Tool

TEXT, REFUSAL, REASONING = b"output_text", b"refusal", b"reasoning_text"
# An event with a text: its beginning, the text, its number.
DELTA = b'%b%b","sequence_number":%d}\n\n'
QUEUED, IN_PROGRESS = b"queued", b"in_progress"
COMPLETED, INCOMPLETE = b"completed", b"incomplete"


class Part:
    """A text that grows, part of an item. *kind* is TEXT, REFUSAL or REASONING.

    *place* is the members of an event that locate the part, and `head` is the beginning of each
    event with a text of it. `logprobs` and `plain_logprobs` are JSON, joined: with the bytes of
    each token, as in items, and without, as in events.
    """

    __slots__ = ("head", "kind", "logprobs", "place", "plain_logprobs", "text")

    def __init__(self, kind: bytes, place: bytes) -> None:
        self.kind = kind
        self.place = place
        self.text = bytearray()
        self.logprobs = bytearray()
        self.plain_logprobs = bytearray()
        form = b'event: response.%b.delta\ndata: {"type":"response.%b.delta",%b,%b"delta":"'
        self.head = form % (kind, kind, place, b'"logprobs":[],' if kind is TEXT else b"")

    def add_logprobs(self, own: bytes, plain: bytes) -> None:
        """Add logprobs, with and without the bytes of each token."""
        comma = b"," if self.logprobs and own else b""
        self.logprobs += comma + own
        self.plain_logprobs += comma + plain

    def delta(self, text: bytes, sequence: int, logprobs: bytes = b"") -> bytes:
        """Return the event with *text*, which has been added."""
        head = self.head
        if logprobs:
            head = head.replace(b'"logprobs":[]', b'"logprobs":[%b]' % logprobs)
        return DELTA % (head, text, sequence)

    @property
    def done(self) -> bytes:
        """The members of the event that ends it."""
        # Joined, since a text may have megabytes: a format would copy it once more.
        if self.kind is TEXT:
            logprobs = (b'","logprobs":[', self.plain_logprobs, b"]")
            return b"".join((self.place, b',"text":"', self.text, *logprobs))
        name = b"refusal" if self.kind is REFUSAL else b"text"
        return b"".join((self.place, b',"%b":"' % name, self.text, b'"'))

    def render(self) -> bytes:
        """Return the part as it is now."""
        if self.kind is TEXT:
            logprobs = (b'","annotations":[],"logprobs":[', self.logprobs, b"]}")
            return b"".join((b'{"type":"output_text","text":"', self.text, *logprobs))
        name = b"refusal" if self.kind is REFUSAL else b"text"
        return b"".join((b'{"type":"%b","%b":"' % (self.kind, name), self.text, b'"}'))


class Message:
    """A message of the assistant."""

    __slots__ = ("id", "index", "parts")

    def __init__(self, name: str, index: int) -> None:
        self.id = f"msg_{name}".encode()
        self.index = index
        self.parts: list[Part] = []

    def add_part(self, kind: bytes) -> Part:
        """Begin a part of *kind*."""
        place = b'"item_id":"%b","output_index":%d,"content_index":%d'
        part = Part(kind, place % (self.id, self.index, len(self.parts)))
        self.parts.append(part)
        return part

    def render(self, status: bytes) -> bytes:
        """Return the item as it is now, with a *status*."""
        return b'{"id":"%b","type":"message","status":"%b","role":"assistant","content":[%b]}' % (
            self.id,
            status,
            b",".join([part.render() for part in self.parts]),
        )


class Reasoning(Message):
    """The thoughts of a model before its answer."""

    __slots__ = ()

    def __init__(self, name: str, index: int) -> None:
        super().__init__(name, index)
        self.id = f"rs_{name}".encode()

    def render(self, status: bytes) -> bytes:
        """Return the item, as `Message.render`."""
        return b'{"id":"%b","type":"reasoning","status":"%b","summary":[],"content":[%b]}' % (
            self.id,
            status,
            b",".join([part.render() for part in self.parts]),
        )


class Call:
    """A call of *tool*.

    `text` is the arguments of its function, escaped; *provider_id* is the provider's id of the
    call.

    The input of a custom tool is within those arguments, and so is known only when they are
    complete.
    """

    __slots__ = ("_call_id", "custom", "id", "index", "place", "provider_id", "text", "tool")

    def __init__(self, tool: Tool, name: str, index: int, provider_id: str) -> None:
        self.tool = tool
        self.custom = tool.kind == "custom"
        self.id = f"{'ctc' if self.custom else 'fc'}_{name}".encode()
        self.index = index
        self.place = b'"item_id":"%b","output_index":%d' % (self.id, index)
        self.provider_id = provider_id
        self._call_id = orjson.dumps(provider_id or f"call_{name}")
        self.text = bytearray()

    @property
    def input(self) -> bytes:
        """The input of a custom tool, escaped: the one argument of its function, or else
        everything that the model wrote.
        """
        try:
            arguments = orjson.loads(b'"%b"' % bytes(self.text))
            text = orjson.loads(arguments)["input"]
            return orjson.dumps(text if isinstance(text, str) else arguments)[1:-1]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return bytes(self.text)

    def render(self, status: bytes) -> bytes:
        """Return the item as it is now, with a *status*."""
        namespace = b""
        if self.tool.namespace:
            namespace = b',"namespace":%b' % orjson.dumps(self.tool.namespace)
        if self.custom:
            return (
                b'{"id":"%b","type":"custom_tool_call","call_id":%b,"name":%b%b,"input":"%b"}'
                % (
                    self.id,
                    self._call_id,
                    orjson.dumps(self.tool.name),
                    namespace,
                    b"" if status is IN_PROGRESS else self.input,
                )
            )
        return (
            b'{"id":"%b","type":"function_call","status":"%b","call_id":%b,"name":%b%b,'
            b'"arguments":"%b"}'
            % (
                self.id,
                status,
                self._call_id,
                orjson.dumps(self.tool.name),
                namespace,
                bytes(self.text),
            )
        )


# The members of a response that repeat its request, each with its value if that has none.
REPEATED = {
    "frequency_penalty": b"0.0",
    "instructions": b"null",
    "max_output_tokens": b"null",
    "max_tool_calls": b"null",
    "metadata": b"{}",
    "parallel_tool_calls": b"true",
    "presence_penalty": b"0.0",
    "prompt_cache_key": b"null",
    "reasoning": b'{"effort":null,"summary":null}',
    "safety_identifier": b"null",
    "service_tier": b'"default"',
    "store": b"true",
    "temperature": b"1.0",
    "text": b'{"format":{"type":"text"}}',
    "tool_choice": b'"auto"',
    "tools": b"[]",
    "top_logprobs": b"0",
    "top_p": b"1.0",
    "truncation": b'"disabled"',
}
# The most bytes of a request that its response repeats: each event with a response object has
# them.
MAX_REPEATED_BYTES = 262_144
# Bytes that count as one token if the provider reports no usage.
BYTES_PER_TOKEN = 4
# The reason of an incomplete answer, by finish_reason.
REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


class Frame(msgspec.Struct):
    """The response object, as far as it is known before its answer comes.

    *repeated* is the members that repeat the request, JSON without the braces. *model* is the
    requested model, and *created_at* the time of the response, in whole seconds since 1970.
    *opened* is the number of events of a response in the *background* that precede the first chunk
    of its answer.
    """

    id: str
    created_at: int
    model: str
    repeated: bytes
    background: bool = False
    opened: int = 0

    @property
    def size(self) -> int:
        """Its approximate size in bytes."""
        return len(self.repeated) + len(self.model) + len(self.id)

    def render(
        self,
        status: bytes,
        output: bytes = b"",
        *,
        usage: bytes = b"null",
        reason: str = "",
        completed_at: int | None = None,
    ) -> bytes:
        """Return the response object with a *status* and *output*, its items joined by commas.

        *reason* says why an answer is incomplete.
        """
        incomplete = b'{"reason":%b}' % orjson.dumps(reason) if reason else b"null"
        return (
            b'{"id":%b,"object":"response","created_at":%d,"status":"%b","background":%b,'
            b'"completed_at":%b,"error":null,"incomplete_details":%b,"model":%b,"output":[%b],%b,'
            b'"usage":%b}'
        ) % (
            orjson.dumps(self.id),
            self.created_at,
            status,
            b"true" if self.background else b"false",
            b"null" if completed_at is None else b"%d" % completed_at,
            incomplete,
            orjson.dumps(self.model),
            output,
            self.repeated,
            usage,
        )


def usage_object(usage: Mapping[str, Any] | None, asked_tokens: int, answered_bytes: int) -> bytes:
    """Return the usage of a response for that of a chat completion.

    If the provider has reported no usage, it is an estimate, since many clients need one:
    *asked_tokens*, and a token for BYTES_PER_TOKEN bytes of the answer.
    """
    tokens, known = tokens_of(usage), usage or {}
    asked = asked_tokens if tokens.prompt is None else tokens.prompt
    answered = tokens.answer
    if answered is None:
        answered = -(-answered_bytes // BYTES_PER_TOKEN)
    total = plausible(known.get("total_tokens"))
    return orjson.dumps(
        {
            "input_tokens": asked,
            "input_tokens_details": {
                "cache_write_tokens": tokens.cache_write,
                "cached_tokens": tokens.cached or 0,
            },
            "output_tokens": answered,
            "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
            "total_tokens": asked + answered if total is None else total,
        }
    )


def written_logprobs(tokens: object) -> tuple[bytes, bytes]:
    """Return the *tokens* of a chunk's logprobs as JSON, joined: with the bytes of each, and
    without.
    """
    own: list[bytes] = []
    plain: list[bytes] = []
    for token in tokens if isinstance(tokens, list) else ():
        if not isinstance(token, dict):
            continue
        others = token.get("top_logprobs")
        top = (
            [each for each in others if isinstance(each, dict)] if isinstance(others, list) else []
        )
        own.append(
            orjson.dumps(
                {**_with_bytes(token), "top_logprobs": [_with_bytes(each) for each in top]}
            )
        )
        plain.append(
            orjson.dumps({**_plain(token), "top_logprobs": [_plain(each) for each in top]})
        )
    return b",".join(own), b",".join(plain)


def _plain(token: dict[str, Any]) -> dict[str, Any]:
    text, logprob = token.get("token"), token.get("logprob")
    number = isinstance(logprob, (int, float)) and not isinstance(logprob, bool)
    return {"token": text if isinstance(text, str) else "", "logprob": logprob if number else 0.0}


def _with_bytes(token: dict[str, Any]) -> dict[str, Any]:
    plain = _plain(token)
    known = token.get("bytes")
    return {**plain, "bytes": known if isinstance(known, list) else list(plain["token"].encode())}
