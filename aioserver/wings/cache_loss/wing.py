"""Cache losses as a wing, and their state for operators."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, ClassVar, TypedDict

from aioserver.faces.wing import Wing
from aioserver.monitoring.section import Section
from aioserver.monitoring.state import COUNTS, SUM
from aioserver.wings.cache_loss.turns import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AsyncExitStack

    from aioserver.faces.wing import Core

# Regions that are shown of one process; of several, the worst of all are among them.
MAX_REGIONS = 8


class CacheLossState(TypedDict):
    """The conversations that are known, the verdicts since the start, and the tokens that were lost
    in the last hour: by verdict, and by region for those that have one.
    """

    conversations: Annotated[int, SUM]
    verdicts: Annotated[dict[str, int], COUNTS]
    last_hour: Annotated[dict[str, int], COUNTS]
    regions: Annotated[dict[str, int], COUNTS]


class CacheLossSection(Section[CacheLossState]):
    """The findings of *reader*."""

    key = "cache_losses"
    shape = CacheLossState

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def state(self) -> CacheLossState:
        """Return the verdicts, and the worst regions."""
        reader = self._reader
        verdicts, regions = Counter[str](), Counter[str]()
        for (verdict, at), tokens in reader.losses.hour().items():
            verdicts[verdict] += tokens
            if "[" in at:
                regions[at] += tokens
        return {
            "conversations": len(reader.conversations),
            "verdicts": dict(reader.losses.verdicts),
            "last_hour": dict(verdicts),
            "regions": dict(regions.most_common(MAX_REGIONS)),
        }


class CacheLossWing(Wing):
    """The losses of providers' caches, if `llm.cache_losses` is on."""

    name: ClassVar = "cache_loss"
    _section: CacheLossSection

    async def open(self, core: Core, stack: AsyncExitStack) -> None:  # noqa: ARG002 - nothing to close
        """Make the memory of conversations."""
        self.caches = reader = Reader(core.metrics.bugs)
        self._section = CacheLossSection(reader)

    def sections(self) -> Sequence[CacheLossSection]:
        """Return what was found."""
        return (self._section,)
