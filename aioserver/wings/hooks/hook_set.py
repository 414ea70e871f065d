"""The hooks of a server: which hooks are asked about a request, in which order, and with what
effect.

    ask        each hook for requests decides, one after the other: each hook gets the body that the
               previous hook has returned, and the provider gets the body of the last hook
    follow     the hooks for answers get the events of a streamed one, each in a task of
               its own (tap.py)
    answered   the same hooks decide about a whole answer, before it is sent

A hook is closed or open. If it makes no decision, or cannot see a body that is streamed through, a
closed hook refuses the request. An open hook lets the request pass, and this is counted. A hook
that refuses a running answer ends it for all of its readers, as `cancel` does; they keep the events
that they have read.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import ANSWER, REQUEST
from aioserver.errors import AioserverError, AnswerRefused, HookUnavailable, RequestRefused
from aioserver.hook import Call, Refuse
from aioserver.limits.deadline import Wait
from aioserver.providers.passthrough import PassedRequest
from aioserver.streams.store import owner_of
from aioserver.streams.stream import Stream
from aioserver.telemetry.logs import SAME_ERROR, RateLimit
from aioserver.wings.hooks import python_hook
from aioserver.wings.hooks.decisions import HookFault, changed_body
from aioserver.wings.hooks.http_hook import HttpHook
from aioserver.wings.hooks.python_hook import PythonHook
from aioserver.wings.hooks.tap import Backlog, Tap, TappedLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aioserver.config import settings
    from aioserver.config.settings import Settings
    from aioserver.gateway.request import Request
    from aioserver.providers.request import Answer
    from aioserver.telemetry.metrics import Metrics
    from aioserver.telemetry.outcome import Outcome
    from aioserver.wings.hooks.hook_client import HookClient

logger = logging.getLogger("aioserver.hooks")

# Seconds after which a client that was refused by a fault of a hook may come back.
RETRY_AFTER = 1.0


class HookStats(NamedTuple):
    """A snapshot: answers that are shown, connections in use, and the bytes that hooks have not
    taken yet.
    """

    shown: int
    connections: int
    behind: int


class HookSet:
    """The hooks, by the settings that were applied last.

    Always: a request, and its answer if that is streamed, are shown to the hooks that existed when
    the request came.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._backlog = Backlog()
        self._lines = RateLimit(1, SAME_ERROR)
        self._hooks: tuple[HookClient, ...] = ()
        # The tasks that show answers.
        self._followers: set[asyncio.Task[Refuse | None]] = set()
        self.present = False
        self.log: type[Stream] = Stream
        self.prepare(settings)()

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that puts *settings* in effect.

        Raises:
            ConfigurationError: a class cannot be found or made.
        """
        websocket = settings.chat.websocket
        paths = {"websocket": websocket.endpoint, "sse": settings.chat.sse.endpoint}
        hooks = tuple(
            _made(index, hook, websocket.max_message_size)
            for index, hook in enumerate(settings.hooks)
        )

        def apply() -> None:
            old, self._hooks = self._hooks, hooks
            self._paths, self._max_bytes = paths, websocket.max_message_size
            self._shutdown_timeout = websocket.shutdown_timeout
            self.present = bool(hooks)
            self.log = TappedLog if any(ANSWER in hook.settings.on for hook in hooks) else Stream
            self._metrics.apply_hooks(hook.name for hook in hooks)
            for hook in old:
                hook.retire()

        return apply

    def stats(self) -> HookStats:
        """Return a snapshot."""
        return HookStats(
            len(self._followers) + len(self._backlog.shown),
            sum(hook.connections for hook in self._hooks),
            self._backlog.bytes,
        )

    def calls(self) -> dict[str, int]:
        """Return how many calls to each hook are open."""
        return {hook.name: hook.open for hook in self._hooks}

    async def finish(self) -> None:
        """Let the hooks decide about answers that have ended, for at most `shutdown_timeout` or the
        longest `timeout`.
        """
        longest = max((hook.settings.timeout for hook in self._hooks), default=0.0)
        if self._followers:
            seconds = min(self._shutdown_timeout, longest)
            await asyncio.wait(tuple(self._followers), timeout=seconds)

    async def close(self) -> None:
        """End all calls, and close the hooks."""
        followers = tuple(self._followers)
        for task in followers:
            task.cancel()
        if followers:
            await asyncio.wait(followers)
        for hook in self._hooks:
            await hook.close()

    async def ask(self, request: Request, stream: Stream | None = None) -> None:
        """Show *request*; see `gateway.contracts.hooks.Hooks`.

        Raises:
            RequestRefused, HookUnavailable, ServerAtCapacity: as there.
        """
        hooks, passed = self._hooks, request.provider_request
        unseen, has_body, has_answer = False, True, True
        if isinstance(passed, PassedRequest):
            # A request without a body may ask for stored content of the provider, such as an
            # answer of a model.
            has_body, unseen = passed.method == "POST", passed.upload is not None
            has_answer = passed.method in {"POST", "GET"}
        for hook in hooks:
            if REQUEST in hook.settings.on and has_body:
                if unseen:
                    self._unseen(hook, REQUEST, request, "the body is not read here")
                else:
                    await self._decide(hook, request)
        for hook in hooks:
            if ANSWER not in hook.settings.on or not has_answer:
                continue
            if isinstance(passed, PassedRequest):
                self._unseen(hook, ANSWER, request, "the answer is not read here")
            elif isinstance(stream, TappedLog):
                start, frames = partial(self._follow, hook, request), passed.reading is not None
                shown = Tap(stream, self._backlog, frames=frames, start=start)
                stream.shown = (*stream.shown, shown)
            elif stream is not None:
                # The answer was requested before there was a hook for answers.
                self._failed(hook, ANSWER, request, HookFault("it is new"))

    async def answered(self, request: Request, answer: Answer) -> None:
        """Show a whole *answer*; see `gateway.contracts.hooks.Hooks`.

        Raises:
            AnswerRefused, HookUnavailable: as there.
        """
        for hook in self._hooks:
            if ANSWER not in hook.settings.on:
                continue
            call = self._answered_call(hook, request, answer.outcome, stream=False)
            try:
                with self._call_open(hook):
                    said = await hook.decide_answer(call, answer.body, owner_of(request.caller))
            except HookFault as fault:
                self._failed(hook, ANSWER, request, fault)
                continue
            if said is not None:
                self._count(hook, ANSWER, "refused", request)
                raise _refused(AnswerRefused, said)
            self._count(hook, ANSWER, "passed")

    async def _decide(self, hook: HookClient, request: Request) -> None:
        """Have *hook* decide about *request*."""
        provider_request, route = request.provider_request, request.route
        if provider_request.bound is not None:
            provider_request.bound.wait = Wait(f"the hook {hook.name}")
        body = await provider_request.whole_body(route.provider.settings, route.model)
        call = replace(self._call(hook, request), body=body)
        try:
            with self._call_open(hook):
                said = await hook.decide(call, owner_of(request.caller))
                changed = None
                if isinstance(said, bytes):
                    changed = await changed_body(said, body, self._max_bytes)
        except HookFault as fault:
            self._failed(hook, REQUEST, request, fault)
            return
        if isinstance(said, Refuse):
            self._count(hook, REQUEST, "refused", request)
            raise _refused(RequestRefused, said)
        if changed is None:
            self._count(hook, REQUEST, "passed")
            return
        self._count(hook, REQUEST, "changed", request)
        provider_request.replace_body(changed.maker(route), changed.size)
        allowed = provider_request.api.allowed(changed.body)
        provider_request.max_answer, provider_request.choices = allowed
        if provider_request.usage_options is not None:
            provider_request.usage_options = changed.body.usage_options

    def _follow(self, hook: HookClient, request: Request, shown: Tap) -> None:
        """Begin to show an answer to *hook*."""
        outcome = request.provider_request.outcome
        call = self._answered_call(hook, request, outcome, stream=True)
        task = self._loop.create_task(hook.follow(call, shown, owner_of(request.caller)))
        shown.task = task
        hook.open += 1
        self._followers.add(task)
        task.add_done_callback(partial(self._followed, hook, request, shown))

    def _followed(
        self, hook: HookClient, request: Request, shown: Tap, task: asyncio.Task[Refuse | None]
    ) -> None:
        """Apply the decision of *hook* about an answer. A callback, since a task that is cancelled
        before its first step never enters its `try`.
        """
        self._followers.discard(task)
        hook.open -= 1
        shown.close()
        if task.cancelled():
            if shown.behind:
                self._lost(hook, request, shown.stream, HookFault("it fell behind"), "behind")
            # Otherwise the server is ending.
        elif (fault := task.exception()) is not None:
            if not isinstance(fault, HookFault):
                logger.error("bug in a hook's call", exc_info=fault)
                fault = HookFault("a bug of the server")
            self._lost(hook, request, shown.stream, fault, "failed")
        elif (said := task.result()) is None:
            self._count(hook, ANSWER, "passed")
        else:
            self._count(hook, ANSWER, "refused", request)
            _end(shown.stream, _refused(AnswerRefused, said))

    def _lost(
        self, hook: HookClient, request: Request, stream: Stream, fault: HookFault, outcome: str
    ) -> None:
        """Note that *hook* sees no more of an answer: if the hook is closed, the answer ends."""
        self._log(hook, ANSWER, request, fault)
        self._count(hook, ANSWER, outcome, request if hook.settings.closed else None)
        if hook.settings.closed:
            _end(stream, _unavailable(hook))

    def _failed(self, hook: HookClient, event: str, request: Request, fault: HookFault) -> None:
        """Note that *hook* has made no decision.

        Raises:
            HookUnavailable: the hook is closed.
        """
        self._log(hook, event, request, fault)
        self._count(hook, event, "failed", request if hook.settings.closed else None)
        if hook.settings.closed:
            error = _unavailable(hook)
            error.paid = event == ANSWER and request.provider_request.outcome.sent
            raise error

    def _unseen(self, hook: HookClient, event: str, request: Request, why: str) -> None:
        """Note that *hook* cannot be shown this content.

        Raises:
            RequestRefused: the hook is closed.
        """
        self._count(hook, event, "unseen", request if hook.settings.closed else None)
        if hook.settings.closed:
            raise RequestRefused(f"{why}, and the hook {hook.name} must see it")

    def _count(
        self, hook: HookClient, event: str, outcome: str, noted: Request | None = None
    ) -> None:
        """Count an *outcome*; the log line of the *noted* request names the hook."""
        self._metrics.hook_calls[hook.name, event, outcome].value += 1
        if noted is not None:
            noted.provider_request.outcome.hooks += (hook.name,)

    @contextmanager
    def _call_open(self, hook: HookClient) -> Iterator[None]:
        """Count a call as open within the block, and observe its seconds."""
        began = self._loop.time()
        hook.open += 1
        try:
            yield
        finally:
            hook.open -= 1
            self._metrics.hook_seconds[hook.name,].observe(self._loop.time() - began)

    def _log(self, hook: HookClient, event: str, request: Request, fault: HookFault) -> None:
        if (left_out := self._lines.allow(hook.name, event)) is None:
            return
        fields = {"hook": hook.name, "event": event, "reason": str(fault)}
        fields |= {"fail": hook.settings.fail, "request_id": request.name[:64]}
        logger.warning("a hook has not decided", extra={"fields": {**fields, **left_out}})

    def _answered_call(
        self, hook: HookClient, request: Request, outcome: Outcome, *, stream: bool
    ) -> Call:
        """Return the description of *request*, whose answer is shown."""
        call = self._call(hook, request)
        return replace(call, stream=stream, model=outcome.model, provider=outcome.provider)

    def _call(self, hook: HookClient, request: Request) -> Call:
        """Return the description of *request* for *hook*, without its body."""
        provider_request, route = request.provider_request, request.route
        path = provider_request.path.partition("?")[0]
        return Call(
            id=request.name,
            hook=hook.name,
            caller=request.caller.name,
            path=self._paths.get(request.face, f"/v1/{path}"),
            model=route.model or route.provider.settings.model,
            stream=provider_request.streamed,
        )


def faults(hooks: Sequence[settings.Hook]) -> list[str]:
    """Return the faults of the classes that *hooks* name."""
    found = []
    for index, hook in enumerate(hooks):
        if hook.python is not None:
            try:
                python_hook.find(hook)
            except HookFault as fault:
                found.append(f"hooks[{index}].python: {fault}")
    return found


def _made(index: int, hook: settings.Hook, max_answer: int) -> HookClient:
    """Return the hook of these settings.

    Raises:
        ConfigurationError: the class of the hook cannot be found or made.
    """
    if hook.python is None:
        return HttpHook(hook, max_answer)
    try:
        return PythonHook(hook)
    except HookFault as fault:
        raise ConfigurationError([f"hooks[{index}].python: {fault}"]) from None


def _refused(kind: type[RequestRefused], said: Refuse) -> RequestRefused:
    """Return the error for *said*, the refusal of a hook."""
    error = kind(said.message, http_status=said.status, retry_after=said.retry_after)
    error.paid = kind is AnswerRefused
    return error


def _unavailable(hook: HookClient) -> HookUnavailable:
    return HookUnavailable(f"the hook {hook.name} has not decided", retry_after=RETRY_AFTER)


def _end(stream: Stream, error: AioserverError) -> None:
    """End the answer in *stream* with *error*, unless it has ended: its provider's connection is
    closed.
    """
    if not stream.ended:
        error.paid = stream.sent
        stream.cancel_reason = error
        stream.cancel()
