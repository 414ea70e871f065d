"""Takes the pictures of docs/images: a real server under load, seen by a headless Chromium.

    .venv/bin/python docs/take_pictures.py [--seconds 75] [--folder docs/images]

Starts the simulated provider and `aioserver serve` on free ports of loopback, loads the server
with `aioserver bench` on all three faces for that many seconds, and takes a picture of the
dashboard near the end of the load and one of the chat page with a question asked. What is shown is
what the server said at that moment. Everything that was started here is ended at the end.

Needs the test extras, and Debian's `chromium`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page, ViewportSize

AIOSERVER = (sys.executable, "-m", "aioserver")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DASHBOARD, CHAT = (1280, 800), (1280, 560)  # pixels of the pictures
START = 30.0  # seconds for a process to say where it serves
# Small limits, so that a load which one machine makes beside the server meets them.
PROVIDERS = "AIOSERVER__LLM__PROVIDERS"
SETTINGS = {
    f"{PROVIDERS}__DEMO__HTTP_CLIENT__CONCURRENT_REQUESTS": "60",
    f"{PROVIDERS}__LOCAL__HTTP_CLIENT__CONCURRENT_REQUESTS": "12",
    f"{PROVIDERS}__LOCAL__MODEL": "simulated",
    "AIOSERVER__LOGGING__LEVEL": "WARNING",
}
# Options of `bench`, and the share of the whole time after which each load begins. The clients of
# all of them together are more than max_connections (100).
LOADS = (
    (0.0, "--face websocket --clients 55 --ramp 8"),
    (0.2, "--face openai --clients 30 --ramp 10 --model local"),
    (0.5, "--face sse --clients 25 --ramp 6"),
)
QUESTION = "Why are you called a gateway?"


@asynccontextmanager
async def running(*command: str, environ: dict[str, str] | None = None) -> AsyncIterator[str]:
    """Start *command*; yield the URL in its first line.

    At the end it is asked to end, and waited for.
    """
    process = await asyncio.create_subprocess_exec(
        *AIOSERVER,
        *command,
        cwd=tempfile.gettempdir(),
        env={**os.environ, **(environ or {})},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START):
            line = (await process.stdout.readline()).decode()
        match = re.search(r"http://[^\s/]+(/\S*)?", line)
        if match is None:
            raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
        yield match[0]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def load(url: str, after: float, seconds: float, options: str) -> None:
    """Wait for *after* seconds, then run `aioserver bench` for *seconds*."""
    await asyncio.sleep(after)
    process = await asyncio.create_subprocess_exec(
        *AIOSERVER,
        "bench",
        url,
        *options.split(),
        *("--duration", f"{seconds:.0f}", "--json"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,  # its progress bar
    )
    try:
        if await process.wait():
            raise RuntimeError(f"not every answer was complete: bench {options}")
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def opened(stack: AsyncExitStack) -> AsyncIterator[Page]:
    """Yield an empty page of a Chromium with a profile of its own."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("no chromium is installed; on Debian: apt-get install chromium")
    profile = stack.enter_context(tempfile.TemporaryDirectory())
    playwright = await stack.enter_async_context(async_playwright())
    browser = await playwright.chromium.launch_persistent_context(
        profile,
        executable_path=chromium,
        args=FLAGS,
        color_scheme="light",
    )
    try:
        yield await browser.new_page()
    finally:
        await browser.close()


def size(pixels: tuple[int, int]) -> ViewportSize:
    """Return *pixels* as Playwright takes them."""
    return {"width": pixels[0], "height": pixels[1]}


async def take(folder: Path, seconds: float) -> None:
    """Start everything, and write `dashboard.png` and `chat.png` into *folder*."""
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(running("provider", "--port", "0"))
        local = {f"{PROVIDERS}__LOCAL__BASE_URL": provider}
        server = await stack.enter_async_context(
            running("serve", "--port", "0", environ={**SETTINGS, **local})
        )
        page = await stack.enter_async_context(opened(stack))
        async with asyncio.TaskGroup() as group:
            for share, options in LOADS:
                after = seconds * share
                group.create_task(load(server, after, seconds - after, options))
            await asyncio.sleep(seconds * 0.7)
            await page.set_viewport_size(size(DASHBOARD))
            await page.goto(f"{server}/dashboard")
            await page.locator("#board").wait_for()
            await asyncio.sleep(3)  # some snapshots, for numbers that are made of two
            await page.screenshot(path=folder / "dashboard.png")
        await page.set_viewport_size(size(CHAT))
        await page.goto(f"{server}/")
        await page.locator("textarea").fill(QUESTION)
        await page.keyboard.press("Enter")
        await asyncio.sleep(2)  # in the middle of the answer
        await page.screenshot(path=folder / "chat.png")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=75.0, help="how long the load lasts")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent / "images", help="where to write"
    )
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    asyncio.run(take(options.folder, options.seconds))


if __name__ == "__main__":
    main()
