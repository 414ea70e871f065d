"""The spans of a request that has ended, and of a visit, as bytes (wings/tracing/otlp.py).

They are made of the record of the request, and of its trace.

    SERVER      the request, from its wait for a place, or its admission, to the end of its answer
      INTERNAL  queue: a wait for a place of the server, or of a provider
      CLIENT    an attempt at a provider, from its place there to its last byte
    SERVER      resume: a client that comes back for the answer of another request, to whose span
                this one links

Names and attributes are those of OpenTelemetry's semantic conventions for HTTP and for generative
AI (in development, v0.1.0), where these conventions have names; all other names begin with
`aioserver.`. A span has no content of a question or an answer, no key, and no text of an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.telemetry.ended_requests import MAX_NAME
from aioserver.telemetry.metrics import CLIENT_LEFT, OK
from aioserver.wings.tracing import otlp
from aioserver.wings.tracing.gen_ai_metrics import OPERATIONS
from aioserver.wings.tracing.otlp import Context, attribute
from aioserver.wings.tracing.trace import text_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.telemetry.bugs import Bugs
    from aioserver.telemetry.tracer import RequestEnd
    from aioserver.wings.tracing.otlp import Value
    from aioserver.wings.tracing.trace import AttemptTrace, Trace, Wait

# Those whose answers have a reason why they end, and the reason of one that broke off before it.
GENERATING, CUT = ("chat", "text_completion"), "error"
# The faces with a protocol of our own, and the face that passes requests on.
OWN_FACES, PASSED_ON = ("websocket", "sse"), "other"
# An HTTP status that exists in logs and metrics only: the client has left, or the answer was
# cancelled.
NO_STATUS = 499
# The parts that spans have in common are cached as bytes, some hundred each. Their number is
# bounded, since clients may invent models.
MAX_KEPT = 512
# Facts that an answer states about itself. A quote inside a JSON string is escaped, so none of it
# is a text of the model.
_ID = re.compile(rb'"id": ?"([^"\\]{1,200})"')
_FINISH = re.compile(rb'"(?:finish_reason|stop_reason)": ?"([^"\\]{1,64})"')
MAX_REASONS = 8


class EndedRequest(NamedTuple):
    """A request that has ended, and its notes."""

    trace: Trace
    end: RequestEnd

    @property
    def number(self) -> int:
        """The number of its spans."""
        return 1 + len(self.trace.waits) + len(self.trace.attempts)

    def write(self, zero: int) -> bytes:
        """Return its spans.

        *zero*: the nanoseconds of Unix time at which the monotonic clock was at 0.
        """
        trace, end = self
        began = end.admitted_at
        for wait in trace.waits:
            began = min(began, wait.began)
        if end.streamed and end.first_event_at and end.status != NO_STATUS:
            # The head of a stream is sent with its first event, whatever follows.
            shown = 200
        else:
            shown = end.status
        attributes = [attribute("aioserver.request_id", end.request_id[:MAX_NAME])]
        if end.queue_wait:
            attributes.append(attribute("aioserver.queue_wait", end.queue_wait))
        described = _request(
            end.face,
            end.target,
            trace.path,
            end.provider,
            end.caller,
            end.attempts,
            end.outcome,
            end.code,
            shown,
            end.status >= 500,
        )
        times = (_at(zero, began), _at(zero, end.ended_at))
        parts = [otlp.span(trace.context, times, described, attributes)]
        parts += [_of_wait(trace.context, wait, zero) for wait in trace.waits]
        parts += [_of_attempt(end, trace, attempt, zero) for attempt in trace.attempts]
        trace.forget()
        return b"".join(parts)


@dataclass
class Visit:
    """A client that reads the answer to *request_id* after event *after*, until `end`.

    *link* has the ids of the trace and of the span of the request that asked for the answer, if they
    are known. *take* gets the visit when it has ended.
    """

    take: Callable[[Visit], None]
    context: Context
    link: tuple[bytes, bytes] | None
    request_id: str
    after: int
    bugs: Bugs
    began: float = field(default_factory=monotonic)
    ended: float = 0.0
    status: str = ""
    code: str = ""
    # The number of its spans.
    number: ClassVar = 1

    @bookkeeping(nothing)
    def end(self, status: bytes, code: str = "") -> None:
        """Make the span: the client has left, or has read everything.

        *status* is that with which the answer has ended, empty if it runs on; *code*: that of its
        error. It is called once.
        """
        self.ended, self.status, self.code = monotonic(), status.decode(), code
        self.take(self)

    def write(self, zero: int) -> bytes:
        """Return its span, as `EndedRequest.write`."""
        attributes = [
            attribute("aioserver.request_id", self.request_id[:MAX_NAME]),
            attribute("aioserver.last_event_id", self.after),
        ]
        outcome = {"": CLIENT_LEFT, "complete": OK}.get(self.status, self.status)
        times = (_at(zero, self.began), _at(zero, self.ended))
        described = _visit(outcome, self.code)
        return otlp.span(self.context, times, described, attributes, self.link)


def _at(zero: int, moment: float) -> int:
    return zero + int(moment * 1e9)


@lru_cache(MAX_KEPT)
def _request(
    face: str,
    target: str,
    path: str,
    provider: str,
    caller: str,
    attempts: int,
    outcome: str,
    code: str,
    status: int,
    failed: bool,
) -> bytes:
    attributes: dict[str, Value] = {
        "aioserver.face": face,
        "aioserver.provider": provider,
        "aioserver.attempts": attempts,
        "aioserver.outcome": outcome,
    }
    name = "chat"
    if face not in OWN_FACES:
        name = _route_name(target, path)
        method, _, route = name.partition(" ")
        attributes["http.request.method"] = method
        if face != PASSED_ON:
            attributes["http.route"] = route
        if status != NO_STATUS:
            attributes["http.response.status_code"] = status
    if caller:
        attributes["aioserver.caller"] = caller
    if code:
        attributes["error.type"] = code
    return otlp.description(name, otlp.SERVER, attributes, failed=failed)


def _route_name(target: str, path: str) -> str:
    """Return the method and the path of a request. If the request is passed on, the path is only
    its beginning: the rest may be an id.
    """
    if not target:
        return f"POST /v1/{path}"
    method, _, passed = target.partition(" ")
    return f"{method} /v1/{passed.partition('/')[0]}"[:MAX_NAME]


@lru_cache(MAX_KEPT)
def _visit(outcome: str, code: str) -> bytes:
    attributes: dict[str, Value] = {"aioserver.resumed": True, "aioserver.outcome": outcome}
    if code:
        attributes["error.type"] = code
    return otlp.description("resume", otlp.SERVER, attributes, failed=False)


def _of_wait(parent: Context, wait: Wait, zero: int) -> bytes:
    return otlp.span(
        _below(parent, wait.span_id),
        (_at(zero, wait.began), _at(zero, wait.ended)),
        _wait(wait.provider, wait.error),
    )


@lru_cache(MAX_KEPT)
def _wait(provider: str, error: str) -> bytes:
    attributes: dict[str, Value] = {"aioserver.queue": "provider" if provider else "admission"}
    if provider:
        attributes["aioserver.provider"] = provider
    if error:
        attributes["error.type"] = error
    return otlp.description("queue", otlp.INTERNAL, attributes, failed=bool(error))


def _of_attempt(end: RequestEnd, trace: Trace, attempt: AttemptTrace, zero: int) -> bytes:
    model = reason = ""
    attributes = []
    if attempt.status == 200:
        response_id = text_of(_ID.search(attempt.head))
        model = attempt.response_model
        reasons = _FINISH.findall(attempt.tail)[:MAX_REASONS]
        reason = b"\n".join(reasons).decode("utf-8", "replace")
        if attempt.error and not reason and OPERATIONS.get(trace.path) in GENERATING:
            reason = CUT
        if response_id:
            attributes.append(attribute("gen_ai.response.id", response_id))
    if attempt.first_chunk:
        attributes.append(attribute("gen_ai.response.time_to_first_chunk", attempt.first_chunk))
    tokens = attempt.tokens
    if tokens.prompt is not None:
        attributes.append(attribute("gen_ai.usage.input_tokens", tokens.prompt))
    if tokens.cached is not None:
        attributes.append(attribute("gen_ai.usage.cache_read.input_tokens", tokens.cached))
    if tokens.cache_write:
        attributes.append(attribute("gen_ai.usage.cache_write.input_tokens", tokens.cache_write))
    if tokens.answer is not None:
        attributes.append(attribute("gen_ai.usage.output_tokens", tokens.answer))
    if tokens.reasoning:
        attributes.append(attribute("gen_ai.usage.reasoning.output_tokens", tokens.reasoning))
    described = _attempt(
        end.target,
        trace.path,
        attempt.provider,
        attempt.model[:MAX_NAME],
        attempt.address,
        end.streamed,
        attempt.max_tokens,
        attempt.temperature,
        model,
        reason,
        attempt.status,
        attempt.error,
    )
    times = (_at(zero, attempt.began), _at(zero, attempt.ended))
    return otlp.span(_below(trace.context, attempt.span_id), times, described, attributes)


@lru_cache(MAX_KEPT)
def _attempt(
    target: str,
    path: str,
    provider: str,
    model: str,
    address: tuple[str, int],
    streamed: bool,
    max_tokens: int | None,
    temperature: float | None,
    response_model: str,
    reasons: str,
    status: int,
    error: str,
) -> bytes:
    attributes: dict[str, Value] = {
        "gen_ai.provider.name": provider,
        "server.address": address[0],
        "server.port": address[1],
    }
    name = _route_name(target, path)
    if operation := OPERATIONS.get(path, ""):
        name = f"{operation} {model}"
        attributes["gen_ai.operation.name"] = operation
        if streamed:
            attributes["gen_ai.request.stream"] = True
    if model:
        attributes["gen_ai.request.model"] = model
    if max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = max_tokens
    if temperature is not None:
        attributes["gen_ai.request.temperature"] = temperature
    if response_model:
        attributes["gen_ai.response.model"] = response_model
    if reasons:
        attributes["gen_ai.response.finish_reasons"] = tuple(reasons.split("\n"))
    if status:
        attributes["http.response.status_code"] = status
    if error:
        attributes["error.type"] = error
    return otlp.description(name, otlp.CLIENT, attributes, failed=bool(error))


def _below(parent: Context, span_id: bytes) -> Context:
    return Context(parent.trace_id, span_id, parent.span_id, state=parent.state)
