"""A conversation of the Responses API: its turns, what the model may be shown for each, and when a
response must be found.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tests.simulation.clock import Clock
from tests.simulation.configuration import ROOM, STREAMS
from tests.simulation.plan import BRIDGED, KEEPS, LACKS
from tests.simulation.response_events import ResponseReading
from tests.simulation.truth import Question

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.simulation.client import Client
    from tests.simulation.plan import Plan

# Numbers of the questions of one client are so far apart.
NEXT = 10_000_000
# Seconds after which a response is written for other instances, if nothing goes wrong.
WRITTEN = 2.0


@dataclass(slots=True, eq=False)
class Turn:
    """A request for a response to *question*, after the turns *before* it; *store* is what it
    says.

    *prepared*: nothing is generated (`generate: false`). *ended_at* is when its client has heard
    of its good end, 0.0 if it has not, and *asked_at* when it was asked for.
    """

    question: Question
    before: tuple[Turn, ...]
    store: bool | None
    prepared: bool = False
    ended_at: float = 0.0
    deleted: bool = False
    asked_at: float = field(init=False)
    read: ResponseReading = field(init=False)

    def __post_init__(self) -> None:
        self.asked_at = Clock.now
        self.read = ResponseReading(self.question)

    @property
    def names(self) -> tuple[str, ...]:
        """The first words of all questions up to this one."""
        return tuple(turn.question.name for turn in (*self.before, self))

    @property
    def chain(self) -> tuple[Turn, ...]:
        """The turns that come before a turn that continues this one."""
        return (*self.before, self)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its request that all faces have."""
        fields: dict[str, Any] = {"input": self.question.text}
        if not self.prepared:
            fields["max_output_tokens"] = self.question.tokens
        if self.store is not None:
            fields["store"] = self.store
        if self.before:
            fields["previous_response_id"] = self.before[-1].read.id
        return fields

    def may_be_shown(self, names: tuple[str, ...], previous: str) -> bool:
        """Return whether the model may be shown these questions, and is told that they continue
        the response *previous*.
        """
        if names == self.names and not previous:
            return True
        # A provider that keeps responses has seen those before, but none that was prepared only.
        last = self.before[-1] if self.before else None
        by_id = last is not None and previous == last.read.id and not last.prepared
        return by_id and names == self.names[-1:]

    def end(self) -> None:
        """Note that it has ended well."""
        self.ended_at = Clock.now

    def must_go_on(self, plan: Plan, *, to_lane: bool = False) -> bool:
        """Return whether a request must be able to continue its response now; *to_lane*: see
        `must_be_known`.
        """
        # Where a provider keeps responses it may be the only one that knows what came first.
        return plan.responses != KEEPS and self.must_be_known(plan, to_lane=to_lane)

    def must_be_known(self, plan: Plan, *, to_lane: bool = False) -> bool:
        """Return whether the server must know its response now; *to_lane*: the lane keeps it for
        which it is asked.
        """
        room = plan.changes[f"{STREAMS}.max_kept_bytes"] >= ROOM
        if not (room and self.ended_at) or self.deleted:
            return False
        if to_lane:
            return True
        stored = self.store is not False
        # Its client may hear of its end much later.
        within = Clock.now - self.asked_at < plan.changes[f"{STREAMS}.store_window"]
        return stored and within and (plan.instances == 1 or self._is_anywhere(plan))

    def _is_anywhere(self, plan: Plan) -> bool:
        """Return whether all instances must have it: it is written while nothing goes wrong
        between them.
        """
        shared = plan.shared
        calm = shared is not None and not shared.lossy and not shared.events
        return calm and Clock.now > self.ended_at + WRITTEN


def next_turn(
    client: Client, before: tuple[Turn, ...], store: bool | None, *, prepared: bool = False
) -> Turn:
    """Return a new turn of *client*, after the turns *before* it."""
    plan, dice = client.plan, client.dice
    number = client.number + (len(client.turns) + 1) * NEXT
    fails = dice.random() < plan.provider_fault_share and not prepared
    fault = dice.choice(plan.provider_faults).replace("<n>", str(dice.randrange(1, 6)))
    words = " ".join(["word"] * dice.choice((1, 5, 50)))
    count = len(before) + 1
    question = Question(
        number,
        f"q{number} {words}",
        dice.choice((1, 5, 40, 200)) if not prepared else 0,
        fault if fails else "",
        fails_over=plan.mended,
        hops=plan.hops,
        # A provider that has kept what came before is shown the last question alone.
        turns=(count,) if plan.responses != KEEPS else tuple({1, count}),
    )
    if plan.responses in {LACKS, BRIDGED} and any(turn.prepared for turn in before):
        # Over a bridge what the user says in a row is one message.
        last, text = before[-1], question.text
        joined = f"{last.question.text}\n\n{text}" if last.prepared else text
        question.may_be(replace(question, text=joined, turns=(count - 1,)))
    turn = Turn(question, before, store, prepared)
    client.turns.append(turn)
    return turn


def lost(status: int, error: Mapping[str, Any]) -> bool:
    """Return whether an *error* says that the response is not known which a request continues."""
    if error.get("code") == "previous_response_not_found":
        return True
    return status == 404 and "revious response" in error["message"]
