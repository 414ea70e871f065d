"""What holds of all instances together: sums over them, and what the provider sees of all.

Each instance has connections of its own, to clients and to providers, so a sum is bounded by the
sum of the limits. What instances share through a server is looked at in together.py.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

from aioserver.protocol.request_headers import CALLS, TURN
from aioserver.providers.verdicts import VERDICT_FOR
from tests.simulation import messages
from tests.simulation.configuration import HTTP, ROOM, STREAMS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.simulation.client import Client
    from tests.simulation.instance import Instance
    from tests.simulation.network import Listener
    from tests.simulation.plan import Plan
    from tests.simulation.provider import Calls
    from tests.simulation.together import Together
    from tests.simulation.transport import Transport


class Sums:
    """Looks at all *instances* of *plan*, and calls *broken* with what they have broken together.

    *most_inside* is how many clients had a place at once, at all instances together.
    """

    def __init__(
        self,
        plan: Plan,
        instances: Sequence[Instance],
        calls: Calls,
        broken: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._instances = instances
        self._calls = calls
        self._broken = broken
        self.most_inside = 0
        # When an instance has learned of a provider that it refuses a word; and what was refused to
        # clients, who had asked at that time.
        self._learned: dict[tuple[int, str, str], float] = {}
        self._refused: list[tuple[float, tuple[int, str, str]]] = []
        # Looks at what instances share; None if nothing.
        self.together: Together | None = None

    def look(self) -> None:
        """Look at the places that are taken; what holds of each instance is looked at by its
        watch.
        """
        inside = limit = 0
        for instance in self._instances:
            if instance.killed or instance.closed:
                continue
            gate = instance.server.context.admission.gate
            inside += gate.inside
            # Connections that have entered before a reload stay inside.
            limit += max(gate.limit, gate.inside)
        if inside > limit:
            self._broken(f"{inside} of {limit} places are taken in all")
        self.most_inside = max(self.most_inside, inside)

    def made(self, listener: Listener, near: Transport) -> None:
        """Look at the connections to a provider, as the network shows them, since one more was
        made.
        """
        if near.owner < 0:
            return
        limit = 0
        for instance in self._instances:
            for provider in instance.server.context.router.providers.values():
                if provider.pools.base_url.endswith(f":{listener.port}/v1"):
                    limit += provider.settings.http_client.max_connections
        # Connections that were made before a reload are not cut.
        limit = max(limit, len(self._instances) * self._plan.changes[f"{HTTP}.max_connections"])
        used = sum(not end.is_closing() for end in listener.dialled)
        if used > limit:
            self._broken(f"{used} connections to a provider, at most {limit}")

    def check_turns(self, client: Client) -> None:
        """Check that each request for a response was answered once, and that the model was shown
        what came before.
        """
        for turn in client.turns:
            calls = self._calls.of(turn.question.name)
            for call in calls:
                if not turn.may_be_shown(call.shown, call.previous):
                    self._broken(
                        f"client {client.number} ({client.face}) asks {turn.names}, the model is "
                        f"shown {call.shown} after {call.previous!r}"
                    )
            if not turn.question.fault and any(call.arrived for call in calls[:-1]):
                self._broken(f"client {client.number} ({client.face}) has {len(calls)} answers")

    def check_members(self, client: Client) -> None:
        """Check that nobody but a member of its group has answered *client*."""
        grouping = self._plan.grouping
        if grouping is None or not client.group or client.question.model or client.turns:
            return
        members = grouping.members_of(client.group)
        for call in self._calls.of(client.question.name):
            if call.provider not in members:
                self._broken(
                    f"client {client.number} ({client.face}) asks for {client.group}, and "
                    f"{call.provider} answers, of {sorted(members)}"
                )

    def check_attempts(self, client: Client) -> None:
        """Check that nobody was asked for an answer to *client*, who has asked once, when another
        provider had begun to give it, but for the rest of it.
        """
        if client.face not in {"stream", "responses"} and not messages.asks_once(client):
            return
        asked = self._calls.asked[client.question.name]
        for number, call in enumerate(asked, 1):
            if call.continues and client.calls:
                self._broken(f"the call of a tool is continued for client {client.number}")
            # Who refuses to say the rest does not judge the question.
            refuses_rest = call.continues and call.fault.startswith("status-")
            if call.judged and not refuses_rest and number < len(asked):
                self._broken(
                    f"client {client.number} ({client.face}) asks {asked[number].provider} behind "
                    f"the verdict of {call.provider}"
                )
        held = client.hold == TURN or (client.hold == CALLS and client.calls)
        if held:
            self._check_held(client)
            return
        for first, second in pairwise(self._calls.of(client.question.name)):
            if first.committed and not second.continues:
                self._broken(
                    f"client {client.number} ({client.face}) gets an answer of {second.provider} "
                    f"behind that of {first.provider}"
                )

    def _check_held(self, client: Client) -> None:
        """Check that *client* has read no call of a tool before its model has finished."""
        at = 0.0 if self._plan.lets_go else client.called_at
        calls = self._calls.of(client.question.name)
        if at and not any(call.whole and call.spoke_at <= at for call in calls):
            self._broken(f"client {client.number} has read a call before its model has finished")

    def check_messages(self, client: Client) -> None:
        """Check what was asked for *client* of requests for messages, and what it has read."""
        if client.body_of_message is None:
            return
        calls = self._calls.asked[client.question.name]
        messages.check(client, calls, self._broken)
        refused = {(call.instance, call.provider, call.refused) for call in calls if call.refused}
        self._refused += [(client.asked_at, key) for key in refused]
        if client.message is None:
            return
        # What it has taken to be answered is known from then on, if it was answered there.
        asked = {(call.instance, call.provider) for call in calls}
        for key in refused:
            if asked == {key[:2]}:
                self._learned[key] = min(client.ended_at, self._learned.get(key, inf))

    def check_learning(self) -> None:
        """Check that no instance has sent a provider what it knew that this refuses."""
        reloads = [name for name in self._plan.operations if name != "drain"]
        if reloads or (self._plan.shared is not None and self._plan.shared.events):
            return
        for asked_at, key in self._refused:
            late = asked_at - self._learned.get(key, inf)
            if 0 < late < VERDICT_FOR:
                self._broken(f"{key} is refused {late:.3f} s after it was known")

    def check_calls(self, client: Client) -> None:
        """Check that no answer to *client* was asked for twice by one instance while it was
        kept.
        """
        changes, plan = self._plan.changes, self._plan
        if client.face == "stream":
            # Nobody comes back for it.
            providers = 3 if plan.grouping is not None else 1 + plan.spare
            attempts = providers * (2 + changes[f"{HTTP}.max_retries"]) + plan.hops
            if (number := len(self._calls.of(client.question.name))) > attempts:
                self._broken(f"client {client.number} was answered {number} times")
        # What has failed may be asked for again, and so may what was dropped for want of room.
        if not client.has_id or client.question.fault:
            return
        if changes[f"{STREAMS}.max_kept_bytes"] < ROOM:
            return
        window = changes[f"{STREAMS}.resume_window"]
        if self.together is not None:
            name = client.question.name
            self.together.check_calls(client, self._calls.of(name), window)
        for first, second in self._calls.repeated(client.question.name, window):
            apart = second.begun_at - first.begun_at
            self._broken(f"client {client.number} ({client.face}) was answered twice in {apart} s")
