"""The last requests that have ended, each with the fields of its log lines, for `aioserver why`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")  # the record of a request
# A request that has ended: its record, the monotonic time of its end, and its code, outcome and
# HTTP status.
End: TypeAlias = tuple[R, float, str, str, int]

# Characters of a request id or model name, which come from clients, in a log line.
MAX_NAME = 200
# Requests that are kept, and how many are dropped at once if there is no more room.
MAX_KEPT, DROPPED = 1000, 50
# Attempts of a request that are shown: the last ones.
MAX_PARTS = 5


class EndedRequests(Generic[R]):
    """The last requests. Nearly all are never asked for: *describe* makes the fields of `request
    finished`, with those of each `attempt finished` in `parts`, of one that is.

    Always: at most MAX_KEPT are kept. If there is no room, the callers that have most lose their
    oldest: a busy caller does not push out those of others.
    """

    def __init__(self, describe: Callable[[End[R]], dict[str, Any]]) -> None:
        self._describe = describe
        # By caller and id, the oldest first.
        self._kept: dict[str, dict[str, End[R]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def keep(self, caller: str, request_id: str, end: End[R]) -> None:
        """Keep a request of *caller* that has ended; a later one of the same id replaces it."""
        name = request_id[:MAX_NAME]
        if (kept := self._kept.get(caller)) is None:
            kept = self._kept[caller] = {}
        if kept.pop(name, None) is None:
            self._count += 1
        kept[name] = end
        if self._count > MAX_KEPT:
            self._make_room()

    def find(self, caller: str | None, request_id: str) -> bytes | None:
        """Return the request of *caller*, or the last one of any caller for None, as JSON; None if
        it is not kept.
        """
        name = request_id[:MAX_NAME]
        callers = self._kept.values() if caller is None else (self._kept.get(caller, {}),)
        found = [kept[name] for kept in callers if name in kept]
        if not found:
            return None
        end = max(found, key=itemgetter(1))
        ended = datetime.fromtimestamp(time.time() - (time.monotonic() - end[1]), UTC)
        moment = f"{ended:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
        return msgspec.json.encode({"ts": moment, **self._describe(end)})

    def _make_room(self) -> None:
        """Drop DROPPED requests: half of the requests of the caller that has most, and so on."""
        left = DROPPED
        for caller in sorted(self._kept, key=lambda name: len(self._kept[name]), reverse=True):
            kept = self._kept[caller]
            most = min(left, (len(kept) + 1) // 2)
            for name in list(islice(kept, most)):
                del kept[name]
            if not kept:
                del self._kept[caller]
            left -= most
            if not left:
                break
        self._count -= DROPPED
