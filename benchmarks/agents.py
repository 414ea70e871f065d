"""Agents as they are, on engines that have chat completions alone: each does a task of three turns
with two calls at once, on each of three engines (tests/support/chat_engine.py).

    npm install --prefix DIR @anthropic-ai/claude-code @openai/codex opencode-ai
    python benchmarks/agents.py DIR/node_modules/.bin [--only claude,codex,opencode] [--show]
    python benchmarks/agents.py DIR/node_modules/.bin --cut 0.02 --tasks 34    # calls that break off
    python benchmarks/agents.py DIR/node_modules/.bin --cut 0.2 --tasks 34 --second
    python benchmarks/agents.py DIR/node_modules/.bin --only claude,opencode --plant

The agents get nothing but a base URL and a key. A turn is well formed if the engine has refused
nothing of it, and the task is done if the results of all four calls have come back to the engine,
and each command has run once. The tasks of an agent on an engine have one server, so that they
share its budget of retries. *attempts a turn* is what the engine was asked, by the three turns that
a task needs. *losses* are the conversations that were compared, and the verdicts on the prefix cache of the
engine, with the tokens that it has read again, and where (docs/slow.md). With --plant each system
prompt begins with another number. The agents have a folder of their own as home.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from itertools import count, product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from aiohttp import ClientSession, ClientTimeout, web
from engines import started

from tests.support.chat_engine import DONE, HABITS, RAN, ROUNDS, ChatEngine, words

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROMPT = "Run the commands that are needed, and say what has come of it."
SECONDS = 150.0
KEY = "an-agents-key-000000000000"
# The turns that a task needs.
TURNS = ROUNDS + 1


def claude(program: str, _home: Path, url: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of Claude Code."""
    environ = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": KEY,
        "ANTHROPIC_MODEL": "engine",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "engine",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return [program, "--allowedTools", "Bash", "-p", PROMPT], environ


def codex(program: str, home: Path, url: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of Codex."""
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text(
        'model = "engine"\nmodel_provider = "aioserver"\n[model_providers.aioserver]\n'
        f'name = "aioserver"\nbase_url = "{url}/v1"\nenv_key = "AIOSERVER_KEY"\n'
        'wire_api = "responses"\nsupports_websockets = true\n'
    )
    flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return [program, "exec", *flags, PROMPT], {"AIOSERVER_KEY": KEY}


def opencode(program: str, home: Path, url: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of opencode."""
    settings = {
        "model": "aioserver/engine",
        "small_model": "aioserver/engine",
        "permission": {"bash": "allow"},
        "provider": {
            "aioserver": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
                "models": {"engine": {"name": "engine"}},
            }
        },
    }
    (home / "work" / "opencode.json").write_text(json.dumps(settings))
    return [program, "run", PROMPT], {}


AGENTS = {"claude": claude, "codex": codex, "opencode": opencode}


class Result(NamedTuple):
    """How one task has ended: the exit code, what the agent has shown, its seconds, and the
    commands that it has run.
    """

    code: int
    shown: str
    seconds: float
    ran: list[str]

    @property
    def done(self) -> bool:
        """Whether all results have come, and each command has run once."""
        commands = [word for number in range(ROUNDS) for word in words(number)]
        all_came = DONE.split(":")[0] in self.shown and self.code == 0
        return all_came and sorted(self.ran) == commands


async def ask(name: str, programs: Path, url: str) -> Result:
    """Have the agent *name* do the task."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "work").mkdir()
        command, environ = AGENTS[name](str(programs / name), home, url)
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=home / "work",
            env={"PATH": os.environ["PATH"], "HOME": folder, "TERM": "dumb", **environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(SECONDS):
                shown, _ = await process.communicate()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            shown, _ = await process.communicate()
            shown += b"\n(no end)"
        seconds, ran = time.monotonic() - began, home / "work" / RAN
        lines = ran.read_text().split() if ran.exists() else []
        return Result(process.returncode or 0, shown.decode(errors="replace"), seconds, lines)


@contextlib.asynccontextmanager
async def served(engine: ChatEngine, messages: str, *, second: bool) -> AsyncIterator[str]:
    """Run *engine*, and a server that has it as its provider, for the block; give the server's
    address. *second*: as its fallback, too.
    """
    runner = web.AppRunner(engine.app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider = {
            "base_url": f"http://127.0.0.1:{runner.addresses[0][1]}/v1",
            "model": "m",
            "messages": yaml.safe_load(messages),
        }
        # None is the model that the agents name: a provider's name leaves no fallback.
        names = ["first", "second"] if second else ["first"]
        settings = {
            "llm": {
                "active": "first",
                "fallbacks": names[1:],
                "cache_losses": True,
                "providers": dict.fromkeys(names, provider),
            }
        }
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
            config = Path(folder) / "config.yaml"
            # JSON is YAML.
            config.write_text(json.dumps(settings))
            arguments = ("serve", "--config", str(config), "--port", "0")
            with started(arguments, "aioserver is ready: ", log, RUNTIME_DIRECTORY=folder) as (
                _,
                url,
            ):
                yield url.rstrip("/")
    finally:
        await runner.cleanup()


class Planter:
    """Stands between an agent and the server at *url*: each system prompt begins with the number of
    its request.
    """

    def __init__(self, url: str, session: ClientSession) -> None:
        self._url, self._session = url, session
        self._numbers = count(1)

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Pass *request* on, and its answer back."""
        body = await request.read()
        if body:
            body = json.dumps(self._planted(json.loads(body))).encode()
        left_out = {"Host", "Content-Length", "Accept-Encoding"}
        headers = {name: text for name, text in request.headers.items() if name not in left_out}
        url = f"{self._url}{request.path_qs}"
        async with self._session.request(
            request.method, url, data=body, headers=headers
        ) as answer:
            kind = answer.headers.get("Content-Type", "text/plain")
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            return response

    def _planted(self, body: dict[str, Any]) -> dict[str, Any]:
        first = f"Request {next(self._numbers)}. "
        system = body.get("system")
        messages = body.get("messages") or [{}]
        if isinstance(system, list):
            return {**body, "system": [{"type": "text", "text": first}, *system]}
        if messages[0].get("role") == "system":
            # The content is a text.
            message = {**messages[0], "content": first + messages[0]["content"]}
            return {**body, "messages": [message, *messages[1:]]}
        return body


@contextlib.asynccontextmanager
async def planted(url: str) -> AsyncIterator[str]:
    """Run a planter in front of *url* for the block; give its address."""
    async with ClientSession(timeout=ClientTimeout(total=None)) as session:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", Planter(url, session).pass_on)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def losses(url: str) -> str:
    """Return what the server at *url* has found to be lost of the engine's cache."""
    # `/stats` is made once a second.
    await asyncio.sleep(1.5)
    async with ClientSession() as session, session.get(f"{url}/stats") as response:
        state = (await response.json())["cache_losses"]
    verdicts, where = state["verdicts"], {**state["last_hour"], **state["regions"]}
    words = [f"{state['conversations']} conversations"]
    words += [f"{number} {verdict}" for verdict, number in verdicts.items()]
    return ", ".join([*words, *(f"{name}: {tokens:,}" for name, tokens in where.items())])


async def run(given: argparse.Namespace) -> int:
    """Run all tasks, and print them as a table; return how many have failed."""
    failed, deadline = 0, time.monotonic() + given.minutes * 60
    print(
        "| agent | engine | tasks | done | turns | cut | attempts a turn | refused | seconds "
        "| losses |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, habit in product(given.only.split(","), HABITS):
        engine = ChatEngine(habit, given.cut, f"{given.seed} {name} {habit}")
        results: list[Result] = []
        async with (
            served(engine, given.messages, second=given.second) as url,
            planted(url) if given.plant else contextlib.nullcontext(url) as asked,
        ):
            while len(results) < given.tasks and time.monotonic() < deadline:
                result = await ask(name, given.programs, asked)
                results.append(result)
                if given.show or not result.done:
                    lines = [*result.shown.splitlines()[-40:], f"ran: {' '.join(result.ran)}"]
                    print("\n".join(f"    {line}" for line in lines), file=sys.stderr, flush=True)
            lost = await losses(url) if results else ""
        if not results:
            continue
        done = sum(result.done for result in results)
        failed += len(results) - done
        print(
            f"| {name} | {habit} | {len(results)} | {done} | {engine.turns} | {engine.cuts} | "
            f"{engine.turns / (TURNS * len(results)):.3f} | {len(engine.faults)} | "
            f"{statistics.median(result.seconds for result in results):.1f} | "
            f"{lost} |",
            flush=True,
        )
        for fault in sorted(set(engine.faults)):
            print(f"    refused: {fault}", file=sys.stderr)
    return failed


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("programs", type=Path, metavar="DIR", help="where the programs are")
    parser.add_argument(
        "--only", default=",".join(AGENTS), help="agents, with commas between them"
    )
    parser.add_argument("--messages", default="auto", help="that setting of the provider")
    parser.add_argument("--show", action="store_true", help="print what each agent has shown")
    parser.add_argument("--cut", type=float, default=0.0, help="share of the calls that break off")
    parser.add_argument("--seed", type=int, default=0, help="what decides where they break off")
    parser.add_argument("--second", action="store_true", help="a second provider, as a fallback")
    parser.add_argument("--plant", action="store_true", help="change each system prompt")
    parser.add_argument("--tasks", type=int, default=1, help="tasks of each agent on each engine")
    parser.add_argument("--minutes", type=float, default=inf, help="no task begins after these")
    sys.exit(bool(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
