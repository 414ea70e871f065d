"""The connections of a key, counted over all workers."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from aioserver.workers.key_counts import KeyCounts
from aioserver.workers.shared_page import MAX_KEYS, SharedPage
from tests.support.keys import bearer, keys_of
from tests.support.workers import workers_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pages() -> Iterator[list[SharedPage]]:
    first = SharedPage.create(2, 10)
    pages = [SharedPage(first.fd, slot) for slot in range(3)]
    yield pages
    for page in (*pages, first):
        page.close()
    os.close(first.fd)


async def test_a_key_has_its_connections_over_all_workers(tmp_path: Path) -> None:
    keys = keys_of("web", "other", max_connections=3)
    async with workers_of(tmp_path, 3, 30, **keys) as workers:
        for slot in range(3):
            await workers.open(1, slot, headers=bearer("web"))
        for slot in range(3):
            address = f"http://127.0.0.1:{workers.ports[slot]}/v1/chat/completions"
            async with workers.session.post(address, headers=bearer("web")) as response:
                assert response.status == 429
                assert (await response.json())["error"]["code"] == "concurrency_exceeded"

        await workers.open(3, slot=0, headers=bearer("other"))
        await workers.clients[0].close()
        await workers.open(1, slot=2, headers=bearer("web"))


def test_counts_are_those_of_the_other_workers(pages: list[SharedPage]) -> None:
    rng, counts = random.Random(5), [KeyCounts(page) for page in pages]
    names = [f"key-{number}" for number in range(300)]
    held: list[Counter[str]] = [Counter() for _ in pages]
    for _ in range(5000):
        slot, name = rng.randrange(len(pages)), rng.choice(names)
        change = rng.choice([1, -1]) if held[slot][name] else 1
        held[slot][name] += change
        others = sum(counts[name] for at, counts in enumerate(held) if at != slot)
        assert counts[slot].counter(name)(change) == others
    # Beside the places on the same page.
    assert sum(pages[0].places(slot) for slot in range(pages[0].slots)) == 10


def test_the_connections_of_a_process_that_is_gone_count_no_more(pages: list[SharedPage]) -> None:
    first, second = (KeyCounts(page).counter("web") for page in pages[:2])
    second(4)
    assert first(1) == 4

    pages[0].reaped(1)

    assert first(1) == 0


def test_more_keys_than_there_is_room_for_are_counted_in_each_worker_alone(
    pages: list[SharedPage],
) -> None:
    first, second = KeyCounts(pages[0]), KeyCounts(pages[1])
    for number in range(MAX_KEYS):
        first.counter(str(number))(1)

    assert first.counter("one more")(1) == 0
    assert second.counter("one more")(1) == 0
    assert second.counter("7")(1) == 1
