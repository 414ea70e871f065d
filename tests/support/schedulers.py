"""The scheduler of a loop, for providers that are made one by one and asked together."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from aioserver.limits.scheduler import Scheduler

_SCHEDULERS: WeakKeyDictionary[asyncio.AbstractEventLoop, Scheduler] = WeakKeyDictionary()


def scheduler() -> Scheduler:
    """Return the scheduler of the running loop."""
    loop = asyncio.get_running_loop()
    return _SCHEDULERS.setdefault(loop, Scheduler(loop))
