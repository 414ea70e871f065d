"""The browser that all pages of a process share: nothing goes from page to page, and a dead one is
replaced.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import Error

from tests.support.chromium import Chromium
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page

STORED = """() => {
  const stored = [document.cookie, { ...localStorage }, { ...sessionStorage }];
  document.cookie = "left=behind";
  localStorage.left = sessionStorage.left = "behind";
  return JSON.stringify(stored);
}"""


@pytest.fixture
async def other(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Chromium]:
    """Another Chromium than the one of all tests. Where there is none, *page* skips the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a driver that is killed leaves a profile behind
    other = Chromium()
    yield other
    await other.close()


def _children(process: int | str = "self") -> set[int]:
    """The process numbers of the children of *process*."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for texts in lists for child in texts.read_text().split()}


def _descendants(process: int) -> set[int]:
    """The process numbers of the children of *process*, and of theirs."""
    children = _children(process)
    return children.union(*map(_descendants, children))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("time", ["first", "second"])
async def test_a_page_sees_nothing_of_another_test(page: Page, time: str) -> None:
    """Each of the two would see what the other has left behind, whichever comes first."""
    await page.route(
        "http://localhost/", lambda route: route.fulfill(body="<p>", content_type="text/html")
    )
    await page.goto("http://localhost/")

    assert await page.evaluate(STORED) == '["",{},{}]'
    assert page.context.browser
    assert page.context.browser.contexts == [page.context]


@pytest.mark.parametrize("which", ["driver", "browser"])
async def test_a_dead_browser_fails_its_test_and_the_next_page_starts_another(
    other: Chromium, which: str
) -> None:
    before = _children()
    mine: set[int] = set()

    async def test() -> None:
        async with other.page() as page:
            (driver,) = _children() - before
            # Debian starts the browser by a script, which has to go as well.
            browser = _descendants(driver)
            mine.update([driver, *browser])
            for process in [driver] if which == "driver" else browser:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with pytest.raises(Error):
                await page.wait_for_function("false")

    with pytest.raises(AssertionError, match="Chromium has died"):
        await test()

    async with other.page() as page:
        assert await page.evaluate("1 + 1") == 2
    await until(lambda: not any(map(_runs, mine)))
    await other.close()
    assert _children() == before
