"""Takes the pictures of docs/images: a real server under load, seen by a headless Chromium.

    .venv/bin/python docs/take_pictures.py [--seconds 75] [--folder docs/images] [--only queue|lost]

Starts two simulated engines and `aioserver serve` with two workers on free ports of loopback. The
engines are a group. Loads the server with `aioserver bench` on three faces for that many seconds,
and takes a picture of the dashboard near the end of the load. What is shown is what the server said
at that moment. Then a program that answers with a text of this file is asked on the chat page. Of the
queue there is a picture of its own: a provider of one place, whose answers take five seconds, has
seven programs as its clients when a person asks it on the chat page. So has the card of lost caches:
three programs talk to an engine with a prefix cache, of which one has the time in its system prompt,
one sends its tools in another order each time, and one comes back when the cache is full of other
prompts. Everything that was started here is ended at the end.

Needs the test extras, and Debian's `chromium` or `chromium-headless-shell`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import FloatRect, Page, ViewportSize

ROOT = Path(__file__).parents[1]
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
DASHBOARD, CHAT, QUEUE = (1280, 900), (1280, 800), (960, 420)  # pixels of the pictures
MARGIN = 12  # pixels around a card
START = 30.0  # seconds for a process to say where it serves
# Small limits, so that a load which one machine makes beside the server meets them.
PLACES = {"demo": 60, "gpu1": 8, "busy": 1}
# Options of `bench`, and the share of the whole time after which each load begins. The clients of
# all of them together are more than max_connections (100).
LOADS = (
    (0.0, "--face websocket --clients 55 --ramp 8"),
    (0.2, "--face openai --clients 30 --ramp 10 --model qwen"),
    (0.5, "--face sse --clients 25 --ramp 6"),
)
# A provider whose one place is free each five seconds, and the programs that ask it.
SLOW = ("provider", "--port", "0", "--ttft", "1", "--interval", "0.05", "--tokens", "80")
PROGRAMS = "--face openai --clients 7 --model busy"
LEARNING = 40.0  # seconds after which the server knows how long a place is taken
# An engine with a prefix cache that holds some of the prompts, and tokens that it reads quickly.
ENGINE = "prefill=40000,decode=400,cache=49152"
CACHING = ("provider", "--port", "0", "--tokens", "20", "--engine", ENGINE)
PAUSE = 5.0  # seconds, more than all other turns take
RULES = "Answer in one sentence, and name the page that says it. " * 300
QUESTION = "How long do people wait for one of c places?"
# What the chat page shows of Markdown: a table, code, and a formula, which stays as it is written.
ANSWER = """\
With `c` places and a load of `a` places on average, Erlang's formula says who waits:

$$P(wait) = \\frac{a^c / c! \\cdot c / (c - a)}{\\sum_{k<c} a^k / k! + a^c / c! \\cdot c / (c - a)}$$

```python
def waits(places: int, load: float) -> float:
    blocked = 1.0
    for place in range(1, places + 1):
        blocked = load * blocked / (place + load * blocked)
    return places * blocked / (places - load * (1 - blocked))
```

| places | load | who waits |
| ---: | ---: | ---: |
| 10 | 8 | 41 % |
| 100 | 80 | 2 % |

A large pool waits less than many small ones with the same load.
"""


def configuration(engines: list[str], writer: str, workers: int = 2) -> str:
    """Return the shipped configuration with so many *workers*, a group of two *engines*, and a
    *writer*: their addresses. The provider `busy` is the second engine.
    """
    settings: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text())
    settings["chat"]["websocket"]["concurrency"]["uvicorn"]["workers"] = workers
    settings["logging"]["level"] = "WARNING"
    providers = settings["llm"]["providers"]
    providers["gpu1"] = providers["local"] | {"base_url": engines[0], "model": "simulated"}
    providers["gpu2"] = {"like": "gpu1", "base_url": engines[1]}
    providers["writer"] = {"like": "gpu1", "base_url": writer, "model": "writer"}
    providers["busy"] = {"like": "gpu2", "model": "busy", "http_client": {}}
    for name, places in PLACES.items():
        at_once = {"concurrent_requests": max(places, workers)}
        http_client = providers[name]["http_client"] | at_once
        providers[name] = providers[name] | {"http_client": http_client}
    settings["llm"]["models"] = {"qwen": {"members": ["gpu1", "gpu2"], "choose": "least_busy"}}
    return yaml.safe_dump(settings)


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[str]:
    """Start *command*; yield the URL in its first line.

    At the end it is asked to end, and waited for.
    """
    process = await asyncio.create_subprocess_exec(
        *AIOSERVER,
        *command,
        cwd=tempfile.gettempdir(),
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


@asynccontextmanager
async def answering(text: str) -> AsyncIterator[str]:
    """Serve chat completions, streamed, that say *text*; yield the base URL."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in re.findall(r"\S*\s*", text):
            chunk = {"choices": [{"index": 0, "delta": {"content": piece}}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        await response.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("/v1"))


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
    chromium = shutil.which("chromium") or shutil.which("chromium-headless-shell")
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
        engines = [
            await stack.enter_async_context(running("provider", "--port", "0")) for _ in range(2)
        ]
        writer = await stack.enter_async_context(answering(ANSWER))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.yaml"
        file.write_text(configuration(engines, writer))
        server = await stack.enter_async_context(
            running("serve", "--config", str(file), "--port", "0")
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
        await page.locator("select").first.select_option("writer")
        await page.locator("textarea").fill(QUESTION)
        await page.keyboard.press("Enter")
        await page.locator("#turns").get_by_text("with the same load").wait_for()
        await page.screenshot(path=folder / "chat.png")


async def take_queue(folder: Path) -> None:
    """Write `queue.png` into *folder*: what a person sees whose question waits."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running(*SLOW))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.yaml"
        file.write_text(configuration([engine, engine], engine, workers=1))
        server = await stack.enter_async_context(
            running("serve", "--config", str(file), "--port", "0")
        )
        page = await stack.enter_async_context(opened(stack))
        await page.set_viewport_size(size(QUEUE))
        await page.goto(f"{server}/")
        await page.locator("select").first.select_option("busy")
        await page.locator("textarea").fill(QUESTION)
        async with asyncio.TaskGroup() as group:
            programs = group.create_task(load(server, 0.0, 2 * LEARNING, PROGRAMS))
            await asyncio.sleep(LEARNING)
            await page.keyboard.press("Enter")
            await page.locator("#turns").get_by_text("position 7").wait_for()
            await page.screenshot(path=folder / "queue.png")
            programs.cancel()


async def converse(server: str) -> None:
    """Have conversations with *server* whose caches are lost."""
    names = ("read_file", "search", "edit", "run")
    tools = [
        {"type": "function", "function": {"name": name, "description": f"{name} {RULES}"}}
        for name in names
    ]
    async with ClientSession() as session:

        async def ask(who: str, system: str, turn: int, **more: Any) -> None:
            talk = [
                {"role": "system", "content": system},
                {"role": "user", "content": f"{RULES}{QUESTION}"},
            ]
            for number in range(turn):
                talk += [{"role": "assistant", "content": f"It depends, {number}."}]
                talk += [{"role": "user", "content": f"On what, {number}?"}]
            async with session.post(
                f"{server}/v1/chat/completions",
                json={"model": "caching", "messages": talk, **more},
                headers={"x-session-id": who},
            ) as response:
                response.raise_for_status()

        await ask("steady", "Be kind.", 0)
        await asyncio.sleep(PAUSE)
        # From now on it is known that the engine keeps a prompt for so long.
        await ask("steady", "Be kind.", 1)
        for turn in range(4):
            await ask("dated", f"It is 9:0{turn}.", turn)
            await ask("sorted", "Be brief.", turn, tools=tools[turn:] + tools[:turn])
        await ask("steady", "Be kind.", 2)
        for turn in range(4, 6):
            kept, turned = tools[: turn - 3], tools[turn - 3 :]
            await ask("sorted", "Be brief.", turn, tools=[*kept, *turned[::-1]])
        await ask("steady", "Be kind.", 3)


async def take_lost(folder: Path) -> None:
    """Write `lost.png` into *folder*: the card of the dashboard that shows lost caches."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running(*CACHING))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.yaml"
        settings = yaml.safe_load(configuration([engine, engine], engine, workers=1))
        settings["llm"]["cache_losses"] = True
        settings["llm"]["providers"]["caching"] = {"like": "gpu1", "model": "caching"}
        file.write_text(yaml.safe_dump(settings))
        server = await stack.enter_async_context(
            running("serve", "--config", str(file), "--port", "0")
        )
        await converse(server.rstrip("/"))
        page = await stack.enter_async_context(opened(stack))
        await page.set_viewport_size(size(QUEUE))
        await page.goto(f"{server}/dashboard")
        await page.locator("#losses").get_by_text("evicted").wait_for()
        box = await page.locator("#losses").bounding_box()
        assert box is not None
        top, height = box["y"] - MARGIN, box["height"] + 2 * MARGIN
        clip: FloatRect = {"x": 0, "y": top, "width": QUEUE[0], "height": height}
        await page.screenshot(path=folder / "lost.png", clip=clip, full_page=True)


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=75.0, help="how long the load lasts")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent / "images", help="where to write"
    )
    parser.add_argument("--only", choices=["queue", "lost"], help="take this picture alone")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    if options.only != "lost":
        asyncio.run(take_queue(options.folder))
    if options.only != "queue":
        asyncio.run(take_lost(options.folder))
    if options.only is None:
        asyncio.run(take(options.folder, options.seconds))


if __name__ == "__main__":
    main()
