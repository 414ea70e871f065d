"""Files that are read again when they have changed: when, and what becomes of useless content."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import pytest

from aioserver.config.faults import ConfigurationError
from aioserver.files.watched_files import LOOK, PATIENCE, WatchedFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


class Reader:
    """Reads two files that belong together: their content must be the same."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(folder / "a"), str(folder / "b")]
        self.in_effect: list[str] = []
        self.reports: list[tuple[str, str]] = []
        self.reads = 0
        self.failure: Exception | None = None

    def prepare(self) -> Callable[[], None] | None:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        contents = [_content(path) for path in self.paths]
        if contents[0] != contents[-1]:
            raise ConfigurationError(["they do not match"])
        if self.in_effect[-1:] == contents[:1]:
            return None
        return lambda: self.in_effect.append(contents[0])

    def report(self, kind: str, text: str) -> None:
        self.reports.append((kind, text))


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    for name in "ab":
        (tmp_path / name).write_text("1")
    return Reader(tmp_path)


@pytest.fixture
async def watched(reader: Reader) -> AsyncIterator[WatchedFiles]:
    files = WatchedFiles(reader.report)
    files.add("certificate", lambda: reader.paths, reader.prepare)
    yield files
    await files.close()


def _content(path: str) -> str:
    with open(path) as file:  # noqa: PTH123 - as short as that
        return file.read()


def _put(folder: Path, name: str, text: str) -> None:
    """Put another file in the place of *name*."""
    (folder / "new").write_text(text)
    os.replace(folder / "new", folder / name)  # noqa: PTH105


async def test_files_are_read_again_once_they_have_changed(
    reader: Reader, watched: WatchedFiles, tmp_path: Path
) -> None:
    await watched.look()
    await watched.look()
    assert (reader.in_effect, reader.reads) == (["1"], 1)

    for name in "ab":
        _put(tmp_path, name, "2")
    await watched.look()

    assert (reader.in_effect, reader.reads) == (["1", "2"], 2)


async def test_link_that_leads_elsewhere_is_a_change(
    reader: Reader, watched: WatchedFiles, tmp_path: Path
) -> None:
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    (tmp_path / "data").symlink_to("old")
    reader.paths = [str(tmp_path / "data" / "file")]
    await watched.look()

    (tmp_path / "other").symlink_to("new")
    os.replace(tmp_path / "other", tmp_path / "data")  # noqa: PTH105
    await watched.look()

    assert reader.in_effect == ["old", "new"]


@pytest.mark.parametrize("failure", [OSError("no"), ValueError("no"), ZeroDivisionError("no")])
async def test_content_that_cannot_be_used_changes_nothing_and_is_tried_again(
    reader: Reader, watched: WatchedFiles, failure: Exception
) -> None:
    await watched.look()

    reader.failure = failure
    await watched.look(again=True)
    await watched.look()
    assert (reader.in_effect, reader.reads) == (["1"], 3)

    reader.failure = None
    await watched.look()
    await watched.look()
    assert reader.reads == 4


async def test_all_names_are_read_again_after_a_reload(
    reader: Reader, watched: WatchedFiles, tmp_path: Path
) -> None:
    await watched.look()
    (tmp_path / "c").write_text("3")

    reader.paths = [str(tmp_path / "c")]
    await watched.look(again=True)

    assert reader.in_effect == ["1", "3"]


async def test_change_may_take_a_while_to_be_put_in_effect(reader: Reader) -> None:
    files, order = WatchedFiles(reader.report), list[str]()

    async def put_in_effect() -> None:
        order.append("begins")
        await asyncio.sleep(0)
        order.append("ends")

    files.add("keys", lambda: reader.paths, lambda: put_in_effect)
    await asyncio.gather(files.look(again=True), files.look(again=True))

    assert order == ["begins", "ends"] * 2


@pytest.mark.virtual_time
async def test_useless_files_are_reported_once_when_they_had_their_time(
    reader: Reader, watched: WatchedFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    watched.begin()
    await asyncio.sleep(1.5 * LOOK)

    # Half of a pair, as between two steps of a renewal.
    _put(tmp_path, "a", "2")
    await asyncio.sleep(PATIENCE - LOOK)
    assert not reader.reports
    await asyncio.sleep(1.5 * PATIENCE)
    assert reader.reports == [
        ("certificate", "the former content stays in use: they do not match")
    ]
    assert len(caplog.messages) == 1

    _put(tmp_path, "b", "2")
    await asyncio.sleep(1.5 * LOOK)
    assert reader.in_effect == ["1", "2"]

    _put(tmp_path, "a", "3")
    await asyncio.sleep(1.5 * PATIENCE)
    assert len(reader.reports) == 2


@pytest.mark.virtual_time
async def test_nothing_wakes_up_where_nothing_is_watched(reader: Reader) -> None:
    files = WatchedFiles(reader.report)

    files.begin()

    assert len(asyncio.all_tasks()) == 1
    await files.close()
