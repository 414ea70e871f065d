"""A section: a wing's part of what operators see.

A section has a key of `/stats`, gauges of `/metrics`, and at most one trouble at a time, which is
an incident when it begins and when it ends, and a finding of the verdict while it lasts. Where
there are several instances, their states are added up by the rules that the fields of its *shape*
declare, as those of the core (state.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.monitoring.state import Snapshot

State = TypeVar("State")


class Gauge(NamedTuple, Generic[State]):
    """A gauge of `/metrics`: a number of a state, or one for each value of *label*; two labels have
    a comma between them, and a pair of values.

    A gauge whose number is None is left out: the system does not report the number.
    """

    name: str
    read: Callable[[State], float | Mapping[str, float] | Mapping[tuple[str, str], float] | None]
    help: str
    label: str = ""


class SectionTrouble(NamedTuple):
    """A fault of a section now; a new *kind* is a new incident. *word*: of the verdict."""

    kind: str
    word: str
    text: str
    detail: str
    advice: str


class Section(ABC, Generic[State]):
    """A wing's part of `/stats`, of `/metrics`, of the incidents and of the verdict.

    Always: *key* is no other's, and *shape*, a TypedDict, has a rule for each of its fields.
    """

    key: ClassVar[str]
    shape: ClassVar[type]
    # The gauges that are read from its state.
    gauges: Sequence[Gauge[State]] = ()

    @abstractmethod
    def state(self) -> State:
        """Return the state of this moment."""

    def trouble(self, state: State) -> SectionTrouble | None:
        """Return what is wrong at *state*."""
        del state
        return None

    def recovery(self, state: State) -> str:
        """Return the text of the incident when a trouble is over, at *state*."""
        del state
        return f"{self.key}: the trouble is over"

    def of(self, snapshot: Snapshot) -> State:
        """Return its state in *snapshot*."""
        return cast("Mapping[str, State]", snapshot)[self.key]
