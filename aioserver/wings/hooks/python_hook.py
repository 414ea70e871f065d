"""A hook that is a class in Python, and runs in the event loop of the server.

    class Guard:
        async def request(self, call): …       None, other bytes, or Refuse
        def event(self, call, data): …          None or Refuse

A step of it blocks the event loop: a step that takes more than some milliseconds is logged as a
warning.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aioserver.config.settings import ANSWER, REQUEST
from aioserver.hook import Refuse
from aioserver.tracebacks import last_line
from aioserver.wings.hooks import decisions
from aioserver.wings.hooks.decisions import HookFault
from aioserver.wings.hooks.hook_client import HookClient

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Hashable

    from aioserver.config import settings
    from aioserver.hook import Call
    from aioserver.wings.hooks.tap import Tap

logger = logging.getLogger("aioserver.hooks")

# Seconds for which a step of a hook may block the event loop.
MAX_STEP = 0.005
# The method that a hook must have, by the event that it is shown.
METHODS = {REQUEST: "request", ANSWER: "event"}

T = TypeVar("T")


def find(settings: settings.Hook) -> type[Any]:
    """Return the class of the hook of these *settings*.

    Raises:
        HookFault: it cannot be imported, or lacks a method.
    """
    assert settings.python is not None
    module, _, name = settings.python.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as exc:
        raise HookFault(f"{module} cannot be imported: {type(exc).__name__}: {exc}") from exc
    if not isinstance(found, type):
        raise HookFault(f"{module} has no class {name}")
    for shown in settings.on:
        if not callable(getattr(found, METHODS[shown], None)):
            raise HookFault(f"{name} has no method `{METHODS[shown]}`, which `on` asks for")
    return found


class PythonHook(HookClient):
    """The hook of these *settings*: an object of its class.

    Raises:
        HookFault: there is none.
    """

    def __init__(self, settings: settings.Hook) -> None:
        super().__init__(settings)
        found = find(settings)
        try:
            self._hook = found()
        except Exception as exc:
            raise HookFault(f"{settings.python} cannot be made: {type(exc).__name__}") from exc
        self._warned = False

    async def decide(self, call: Call, owner: Hashable) -> Refuse | bytes | None:  # noqa: ARG002 - it has no places
        """Return the result of its `request` about *call*, as `HookClient.decide`."""
        try:
            steps = self._hook.request(call)
            if not inspect.iscoroutine(steps):
                raise HookFault("its `request` is not async")
            async with asyncio.timeout(self.settings.timeout):
                said = await _Timed(steps, self._note)
        except TimeoutError:
            raise HookFault("no decision in time") from None
        except HookFault:
            raise
        except Exception as exc:  # noqa: BLE001 - as above
            raise HookFault(last_line(exc)) from None
        if isinstance(said, Refuse):
            return decisions.refusal(said)
        if said is None or (isinstance(said, bytes) and said.lstrip().startswith(b"{")):
            return said
        raise HookFault("its `request` has returned neither None, nor bytes, nor a Refuse")

    async def decide_answer(self, call: Call, body: bytes, owner: Hashable) -> Refuse | None:  # noqa: ARG002 - it has no places
        """Return the result of its `event` about *body*, as `HookClient.decide_answer`."""
        return self._event(call, body)

    async def follow(self, call: Call, shown: Tap, owner: Hashable) -> Refuse | None:  # noqa: ARG002 - it has no places
        """Call its `event` with each event in *shown*, as `HookClient.follow`."""
        while events := await shown.events():
            for _, data in events:
                if (refuse := self._event(call, data)) is not None:
                    return refuse
            # Other tasks run between two pieces of a flood.
            await asyncio.sleep(0)
        return None

    def _event(self, call: Call, data: bytes) -> Refuse | None:
        began = perf_counter()
        try:
            said = self._hook.event(call, data)
        except Exception as exc:  # noqa: BLE001 - as above
            raise HookFault(last_line(exc)) from None
        finally:
            self._note(perf_counter() - began)
        if said is None:
            return None
        if isinstance(said, Refuse):
            return decisions.refusal(said)
        raise HookFault("its `event` has returned neither None nor a Refuse")

    def _note(self, seconds: float) -> None:
        """Warn, once, if a step has taken so many *seconds* that it delays others."""
        if seconds > MAX_STEP and not self._warned:
            self._warned = True
            fields = {"hook": self.name, "ms": round(1000 * seconds, 1)}
            logger.warning("a hook in Python stops everybody", extra={"fields": fields})


class _Timed(Generic[T]):
    """Awaits *steps*, and reports to *note* how long each of them takes."""

    def __init__(self, steps: Coroutine[Any, Any, T], note: Callable[[float], None]) -> None:
        self._steps, self._note = steps, note

    def __await__(self) -> Generator[Any, Any, T]:
        steps, sent, thrown = self._steps, None, None
        try:
            while True:
                began = perf_counter()
                try:
                    waited = steps.send(sent) if thrown is None else steps.throw(thrown)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                finally:
                    self._note(perf_counter() - began)
                sent = thrown = None
                try:
                    sent = yield waited
                except BaseException as exc:  # noqa: BLE001 - it is the step's own
                    thrown = exc
        finally:
            steps.close()
