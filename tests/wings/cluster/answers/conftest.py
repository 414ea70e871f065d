"""Instances that share streams."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.instances import World, instances
from tests.support.server import PACED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.instances import Instance, Make


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def settings_of_all() -> dict[str, Any]:
    """What a module's instances are configured with; each test may add to it."""
    return {}


@pytest.fixture
async def make(
    tmp_path: Path, world: World, settings_of_all: dict[str, Any]
) -> AsyncIterator[Make]:
    """Start instances: `a, b = await make(2, behaviour, **changes)`."""
    async with AsyncExitStack() as stack:

        async def start(count: int = 2, behaviour: Any = PACED, **more: Any) -> list[Instance]:
            return await stack.enter_async_context(
                instances(tmp_path, count, behaviour, world, **{**settings_of_all, **more})
            )

        yield start
