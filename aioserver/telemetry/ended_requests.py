"""The last requests that have ended, each with the fields of its log lines, for `aioserver why`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.limits.shares import Bounded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Characters of a request id or model name, which come from clients, in a log line.
MAX_NAME = 200
# Requests that are kept: some 600 bytes each.
MAX_KEPT = 1000
# Attempts of a request that are kept: the last ones.
MAX_PARTS = 5


class EndedRequests:
    """The last requests, as JSON: the fields of `request finished`, with those of each `attempt
    finished` in `parts`.

    Always: at most MAX_KEPT are kept, and none of their texts. If there is no room, the caller that
    has most loses its oldest: a busy caller does not push out those of others.
    """

    def __init__(self) -> None:
        self._kept: Bounded[str, str, bytes] = Bounded(MAX_KEPT)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(
        self, caller: str, fields: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep a request of *caller* that has ended now; a later one of the same id replaces it."""
        name = fields["request_id"]
        moment = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
        data = msgspec.json.encode({"ts": moment, **fields, "parts": parts[-MAX_PARTS:]})
        self._kept.pop(caller, name)
        self._kept.make_room()
        self._kept.put(caller, name, data)

    def find(self, caller: str | None, request_id: str) -> bytes | None:
        """Return the request of *caller*, or the last one of any caller for None; None if it is not
        kept.
        """
        name = request_id[:MAX_NAME]
        owners = self._kept.owners() if caller is None else (caller,)
        kept = [data for owner in owners if (data := self._kept.of(owner).get(name)) is not None]
        # Each begins with the moment of its end.
        return max(kept, default=None)
