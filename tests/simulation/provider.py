"""The provider of a run: the simulator, which notes each call, and what reached the server of its
answer.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict, deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.wings.simulator import model, shapes
from aioserver.wings.simulator.faults import PREFIX, as_json
from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.tools import MESSAGES
from tests.simulation import uploads
from tests.simulation.clock import Clock
from tests.simulation.engine_shapes import ODD
from tests.simulation.messages import MOST_TOKENS
from tests.simulation.plan import RENAMED
from tests.simulation.transport import Transport
from tests.support.simulator import ReceivedRequest, Simulator

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aioserver.wings.simulator import exchange
    from aioserver.wings.simulator.exchange import Exchange
    from aioserver.wings.simulator.model import ParsedRequest
    from tests.support.simulator import Behaviour

    Play = Callable[[Exchange], Awaitable[web.StreamResponse]]

_QUESTION = re.compile("q[0-9]+(?= word)")
# The ids of the simulated provider; ours are longer.
_ID = re.compile("resp_[0-9a-f]{24}")
LAST_CHUNK = b"0\r\n\r\n"
# The beginnings of the faults that are verdicts.
VERDICTS = ("verdict", "status-400", "status-422")
# The faults that break an answer in front of its first token.
BROKEN_FIRST = frozenset({"bad-json-0", "bad-utf8-0"})
_PREVIOUS = re.compile(rb'"previous_response_id":"([^"]+)"')


@dataclass(slots=True)
class Call:
    """One request to *provider*, on the *transport* of its own end of the connection.

    *question* is the first word of what was asked, and *shown* has those of all that the model is
    shown, in order. *previous* is the id of the response that is continued by its id. *begun_at*
    is when the answer has begun, 0.0 if it has not; *instance* is the server that has asked.
    """

    transport: Transport
    instance: int
    provider: str
    question: str = ""
    shown: tuple[str, ...] = ()
    previous: str = ""
    # Whether the model is asked to go on with what it has said.
    continues: bool = False
    begun_at: float = 0.0
    # When its last token so far was written.
    spoke_at: float = 0.0
    # When it came; and the messages of a chat completion, what was written of it, and the word for
    # which it was refused, empty if it was not.
    at: float = 0.0
    messages: list[Any] | None = None
    answer: shapes.Answer | None = None
    refused: str = ""
    # The fault of its model, and the tokens of the prompt and of the answer that a good answer
    # reports at its end; None: it reports none.
    fault: str = ""
    usage: tuple[int, int] | None = None
    # The bytes that were written on the connection after each token.
    tokens: list[int] = field(default_factory=list)
    # The bytes that were written on the connection when the answer had begun, and when it had
    # ended.
    begun: int = 0
    whole: int = 0

    @property
    def committed(self) -> bool:
        """Whether the first token has arrived, whatever became of its connection then. One that
        comes with what has broken the answer in front of it is none.
        """
        broken = self.fault in BROKEN_FIRST
        return not broken and self.transport.peer.received >= self.begun > 0

    @property
    def judged(self) -> bool:
        """Whether the answer is a verdict that has arrived, its last chunk aside."""
        verdict = self.fault.startswith(VERDICTS)
        return verdict and self.transport.peer.received + len(LAST_CHUNK) >= self.whole > 0

    @property
    def tokens_received(self) -> int:
        """How many tokens have arrived."""
        return bisect_right(self.tokens, self.transport.peer.received)

    @property
    def arrived(self) -> bool:
        """Whether the answer has arrived, or still may."""
        received = self.transport.peer.received
        lost = self.transport.dead or self.transport.peer.dead
        return received >= self.whole > 0 or (not lost and received >= self.begun > 0)


CALL: ContextVar[Call] = ContextVar("CALL")


@dataclass(slots=True)
class Calls:
    """All calls of a run whose answers have begun, by the instance that has asked and the first
    word of the question; and all that have come, *by_transport* and by that word alone.
    """

    by_question: defaultdict[tuple[int, str], list[Call]] = field(
        default_factory=lambda: defaultdict(list)
    )

    by_transport: defaultdict[Transport, list[Call]] = field(
        default_factory=lambda: defaultdict(list)
    )
    asked: defaultdict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))

    def of(self, question: str) -> list[Call]:
        """Return the calls of all instances for one *question*, in the order in which their
        answers began.
        """
        received = [
            call
            for (_, name), calls in self.by_question.items()
            if name == question
            for call in calls
        ]
        return sorted(received, key=lambda call: call.begun_at)

    def repeated(self, question: str, window: float) -> Iterator[tuple[Call, Call]]:
        """Iterate over calls for one *question* that began within *window* seconds after one that
        arrived.
        """
        for (_, name), calls in list(self.by_question.items()):
            if name == question:
                for first, second in pairwise(calls):
                    if second.begun_at - first.begun_at < window and first.arrived:
                        yield first, second


class _Received(deque[ReceivedRequest]):
    """The requests of a provider, each of which names its question in the call of its task."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def append(self, received: ReceivedRequest) -> None:
        call = CALL.get()
        request = orjson.loads(received.body or b"{}")
        call.at = Clock.now
        if received.path.endswith(model.CHAT):
            call.messages = request.get("messages")
        call.shown = questions_in(request)
        call.question = call.shown[-1] if call.shown else ""
        last_role = received.body.rpartition(b'"role":"')[2]
        call.continues = last_role.startswith(b"assistant")
        match = _PREVIOUS.search(received.body)
        call.previous = match[1].decode() if match else ""
        self._calls.asked[call.question].append(call)


def note_answer(answer: shapes.Answer) -> None:
    """Note the answer to the call of this task."""
    CALL.get().answer = answer


def questions_in(request: dict[str, Any]) -> tuple[str, ...]:
    """Return the first words of the questions in *request*, in order."""
    return tuple(_QUESTION.findall(_asked(request)))


def _asked(request: dict[str, Any]) -> str:
    """Return what the user says in *request*: an answer quotes its questions, perhaps several."""
    said = request.get("messages", request.get("input", ""))
    if isinstance(said, str):
        return said
    return "\n".join(str(each["content"]) for each in said if each.get("role") == "user")


class _Bodies(deque[Any]):
    """The parsed bodies, none of which is kept: a provider refuses to continue a response that it
    cannot have made, the words in *refuses*, and the bound of an answer if it is too large.
    """

    def __init__(self, refuses: tuple[str, ...]) -> None:
        super().__init__()
        self._refuses = refuses

    def append(self, body: Any) -> None:
        call = CALL.get()
        if call.messages is not None:
            self._refuse(call, body)
        previous = body.get("previous_response_id")
        if previous is not None and not _ID.fullmatch(previous):
            raise BadRequest("Previous response with id 'x' not found.", status=404)

    def _refuse(self, call: Call, body: Any) -> None:
        message = "Unrecognized request argument supplied: {}"
        words = [word for word in self._refuses if word in body]
        if RENAMED in words:
            # Only a request that a bridge has made may be sent otherwise.
            words.remove(RENAMED)
            if f" {ODD}" in _asked(body):
                words.append(RENAMED)
                message = "'{}' is not supported with this model: use 'max_completion_tokens'."
        if words:
            call.refused = f"{words[0]} of {body['model']}"
            raise BadRequest(message.format(words[0]))
        most = max(body.get("max_tokens") or 0, body.get("max_completion_tokens") or 0)
        if most > MOST_TOKENS:
            call.refused = f"limit of {body['model']}"
            raise BadRequest(f"`max_tokens` must be less than or equal to `{MOST_TOKENS}`")


class NotingSimulator(Simulator):
    """The simulated provider *name*, which adds each answer that it begins to *calls*."""

    def __init__(
        self,
        name: str,
        behaviour: Behaviour,
        seed: int,
        calls: Calls,
        refuses: tuple[str, ...] = (),
    ) -> None:
        super().__init__(behaviour, seed=seed)
        self._name = name
        self.requests = _Received(calls)
        self.bodies = _Bodies(refuses)
        self._calls = calls

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != f"/v1/{uploads.PATH}":
            return await super().handle(request)
        size = 0
        async for part in request.content.iter_any():
            size += len(part)
        return as_json(200, orjson.dumps({"bytes": size}))

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        assert isinstance(transport, Transport)
        call = Call(transport, transport.peer.owner, self._name)
        CALL.set(call)
        self._calls.by_transport[transport].append(call)
        before = transport.written
        response = await super().answer(request)
        if isinstance(response, web.Response):
            # Written here, so that its end is known.
            await response.prepare(request)
            await response.write_eof()
        # Without a byte there is no answer that could have arrived.
        call.whole = transport.written if transport.written > before else 0
        return response

    async def play(
        self,
        request: web.BaseRequest,
        parsed: ParsedRequest,
        behaviour: exchange.Behaviour,
        play: Play | None,
    ) -> web.StreamResponse:
        call = CALL.get()
        call.fault = parsed.model.removeprefix(PREFIX) if play is not None else ""
        reports = parsed.endpoint in {model.RESPONSES, MESSAGES}
        if not parsed.stream or parsed.include_usage or reports:
            words, _ = shapes.words_of(parsed, behaviour.tokens)
            call.usage = parsed.prompt_tokens, len(words)
        return await super().play(request, parsed, behaviour, play)

    def count_token(self) -> None:
        super().count_token()
        call = CALL.get()
        call.tokens.append(call.transport.written)
        call.spoke_at = Clock.now
        if not call.begun_at:
            call.begun_at = Clock.now
            call.begun = call.transport.written
            self._calls.by_question[call.instance, call.question].append(call)
