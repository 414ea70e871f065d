"""Agents as they are, on engines that have chat completions alone: each does a task of three turns
with two calls at once, on each of three engines (tests/support/chat_engine.py).

    npm install --prefix DIR @anthropic-ai/claude-code @openai/codex opencode-ai
    python benchmarks/agents.py DIR/node_modules/.bin [--only claude,codex,opencode] [--show]
    python benchmarks/agents.py DIR/node_modules/.bin --cut 0.2 --tasks 5    # calls that break off

The agents get nothing but a base URL and a key. A turn is well formed if the engine has refused
nothing of it, and the task is done if the results of all four calls have come back to the engine.
The agents have a folder of their own as home, and their commands are four `echo`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from aiohttp import web
from engines import started

from tests.support.chat_engine import DONE, HABITS, ChatEngine

PROMPT = "Run the commands that are needed, and say what has come of it."
SECONDS = 150.0
KEY = "an-agents-key-000000000000"


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


async def ask(name: str, programs: Path, url: str) -> tuple[int, str, float]:
    """Run the agent *name*; return its exit code, what it has shown, and its seconds."""
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
        return process.returncode or 0, shown.decode(errors="replace"), time.monotonic() - began


async def trial(
    name: str, habit: str, programs: Path, messages: str, cut: float, seed: int
) -> tuple[ChatEngine, int, str, float]:
    """Have the agent *name* do the task on an engine of this *habit*, which breaks off this share
    of its calls.
    """
    engine = ChatEngine(habit, cut, seed)
    runner = web.AppRunner(engine.app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    provider = {
        "base_url": f"http://127.0.0.1:{port}/v1",
        "model": "m",
        "messages": yaml.safe_load(messages),
    }
    settings = {"llm": {"active": "engine", "providers": {"engine": provider}}}
    try:
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
            config = Path(folder) / "config.yaml"
            # JSON is YAML.
            config.write_text(json.dumps(settings))
            arguments = ("serve", "--config", str(config), "--port", "0")
            with started(arguments, "aioserver is ready: ", log, RUNTIME_DIRECTORY=folder) as (
                _,
                url,
            ):
                code, shown, seconds = await ask(name, programs, url.rstrip("/"))
    finally:
        await runner.cleanup()
    return engine, code, shown, seconds


async def run(given: argparse.Namespace) -> int:
    """Run all trials, and print them as a table; return how many have failed."""
    failed = 0
    print("| agent | engine | turns | cut | refused | done | exit | seconds |")
    print("| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |")
    for name in given.only.split(","):
        for habit, seed in product(HABITS, range(given.tasks)):
            engine, code, shown, seconds = await trial(
                name, habit, given.programs, given.messages, given.cut, seed
            )
            done = DONE.split(":")[0] in shown and code == 0
            failed += not done or bool(engine.faults)
            print(
                f"| {name} | {habit} | {engine.turns} | {engine.cuts} | {len(engine.faults)} | "
                f"{'yes' if done else 'no'} | {code} | {seconds:.1f} |",
                flush=True,
            )
            for fault in sorted(set(engine.faults)):
                print(f"    refused: {fault}")
            if given.show or not done:
                print("\n".join(f"    {line}" for line in shown.splitlines()[-40:]), flush=True)
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
    parser.add_argument("--tasks", type=int, default=1, help="tasks of each agent on each engine")
    sys.exit(bool(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
