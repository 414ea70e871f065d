"""A section: the part of a wing in the pages for operators.

A section has a key of `/stats`, gauges of `/metrics`, and at most one trouble at a time. The
beginning and the end of a trouble are incidents, and the verdict may show it while it lasts. In a
cluster, the states of all instances are added up by the rules that the fields of *shape* declare,
as in the core (state.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.monitoring.state import Snapshot

State = TypeVar("State")


class Gauge(NamedTuple, Generic[State]):
    """A gauge of `/metrics`. *read* returns its number, or a number for each value of *label*.

    A gauge with two labels has both names in *label*, with a comma between them, and pairs of
    values. A gauge whose number is None is left out, as the system does not report it.
    """

    name: str
    read: Callable[[State], float | Mapping[str, float] | Mapping[tuple[str, str], float] | None]
    help: str
    label: str = ""


class SectionTrouble(NamedTuple):
    """The trouble of a section now. A new *kind* is a new incident. *word* heads the verdict."""

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
        """Return the trouble that *state* shows."""
        del state
        return None

    def recovery(self, state: State) -> str:
        """Return the text of the incident when a trouble is over, at *state*."""
        del state
        return f"{self.key}: the trouble is over"

    def of(self, snapshot: Snapshot) -> State:
        """Return its state in *snapshot*."""
        return cast("Mapping[str, State]", snapshot)[self.key]
