"""What holds at the door: no token is taken once it is over, nor a question on a WebSocket, and a
closed hook lets no request pass about which it has not decided.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from typing import TYPE_CHECKING, Any

from aioserver.gateway.gateway import Gateway
from aioserver.wings.jwt.token_callers import TokenCallers
from tests.simulation import sick_hook
from tests.simulation.clock import Clock
from tests.simulation.configuration import now
from tests.simulation.noting import noted, together
from tests.simulation.provider import questions_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from aioserver.auth.callers import Caller
    from tests.simulation.plan import Plan
    from tests.simulation.provider import Calls

# Seconds for which a token is taken after its `exp`, since clocks differ.
SKEW = 30.0
# The faces on which questions come one after another, by one handshake.
SOCKETS = {"websocket", "responses_ws"}


class Doors:
    """Follows what is let in, and calls *broken* with what must not be."""

    def __init__(self, plan: Plan, broken: Callable[[str], None]) -> None:
        self._broken = broken
        self._closed = sick_hook.CLOSED in plan.changes.get("hooks", ())
        sick_hook.PASSED.clear()

    def check(self, calls: Calls) -> None:
        """Check, at the end, what has reached a provider."""
        if not self._closed:
            return
        passed = {questions_in(json.loads(body))[-1:] for body in sick_hook.PASSED}
        for question, asked in calls.asked.items():
            if asked and question and (question,) not in passed:
                self._broken(f"{question} was asked, and the closed hook has not decided about it")

    def patches(self) -> ExitStack:
        """Let all of that be noted, in the block."""
        return together(
            noted(TokenCallers, "caller", after=self._taken),
            noted(Gateway, "ask", before=self._asked),
            noted(Gateway, "relay", before=self._relayed),
        )

    def _taken(
        self, _caller: Caller, _callers: TokenCallers, token: bytes, _digest: bytes
    ) -> None:
        payload = token.split(b".")[1]
        claims = json.loads(urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
        if (late := now() - claims["exp"]) >= SKEW:
            self._broken(f"a token is taken {late:.3f} s after its end")

    def _asked(self, _gateway: Gateway, caller: Caller, *_what: Any, face: str, **_: Any) -> None:
        self._question(caller, face)

    def _relayed(self, _gateway: Gateway, request: Any, *_what: Any, **_more: Any) -> None:
        self._question(request.caller, request.face)

    def _question(self, caller: Caller, face: str) -> None:
        if face in SOCKETS and (late := Clock.now - caller.expires) >= SKEW:
            self._broken(f"a question on {face} is taken {late:.3f} s after the end of its token")
