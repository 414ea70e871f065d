"""The last requests that have ended, each with the fields of its log lines, for `aioserver why`."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    Describe = Callable[[], dict[str, Any]]

# Characters of a request id or model name, which come from clients, in a log line.
MAX_NAME = 200
# Requests that are kept, and how many are dropped at once if there is no more room.
MAX_KEPT, DROPPED = 1000, 50
# Attempts of a request that are shown: the last ones.
MAX_PARTS = 5


class EndedRequests:
    """The last requests, each with the function that describes it: the fields of `request
    finished`, with those of each `attempt finished` in `parts`. Nearly all are never asked for.

    Always: at most MAX_KEPT are kept. If there is no room, the callers that have most lose their
    oldest: a busy caller does not push out those of others.
    """

    def __init__(self) -> None:
        # By caller and id, the oldest first: when the request has ended, in Unix time.
        self._kept: dict[tuple[str, str], tuple[float, Describe]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, caller: str, request_id: str, describe: Describe) -> None:
        """Keep a request of *caller* that has ended now; a later one of the same id replaces it."""
        kept, key = self._kept, (caller, request_id[:MAX_NAME])
        kept.pop(key, None)
        kept[key] = time.time(), describe
        if len(kept) > MAX_KEPT:
            self._make_room()

    def find(self, caller: str | None, request_id: str) -> bytes | None:
        """Return the request of *caller*, or the last one of any caller for None, as JSON; None if
        it is not kept.
        """
        name = request_id[:MAX_NAME]
        if caller is None:
            owners = [key for key in self._kept if key[1] == name]
            key = owners[-1] if owners else ("", name)
        else:
            key = caller, name
        if (found := self._kept.get(key)) is None:
            return None
        ended, describe = found
        moment = f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
        return msgspec.json.encode({"ts": moment, **describe()})

    def _make_room(self) -> None:
        """Drop DROPPED requests, in one pass: half of those of whoever has most, and so on."""
        dropped, left = dict[str, int](), DROPPED
        for caller, count in Counter(caller for caller, _name in self._kept).most_common():
            dropped[caller] = most = min(left, (count + 1) // 2)
            left -= most
            if not left:
                break
        for key in list(self._kept):
            if dropped.get(key[0]):
                dropped[key[0]] -= 1
                del self._kept[key]
