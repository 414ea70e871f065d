"""Instructions that an event costs by what is held of its answer, counted by valgrind: the way from
the provider's connection to the client's socket, both in memory.

    python benchmarks/holding.py                # of this version, some minutes
    python benchmarks/holding.py TREE TREE      # of other work trees, each beside this one's tests

Each answer has 400 events with a text, and is counted from its first byte to its end, the release
of what was held included. The kernel is left out, so that the ratios are larger than those of a
server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# Last, so that the package is that of the tree which is counted.
sys.path.append(str(Path(__file__).parents[1]))

from tests.support.held_turns import Turn
from tests.support.road import Road
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, chunk

EVENTS, WARM, ROUNDS = 400, 1, 3
WORDS = ("preamble", "calls", "turn")
FACES = ("openai", "sse", "websocket", "messages", "bridge", "responses")


def answer(face: str) -> list[bytes]:
    """Return the reads of an answer with EVENTS texts, each of which is one event."""
    path = {"messages": "messages", "responses": "responses"}.get(face, "chat/completions")
    texts = [f" word{number % 97}" for number in range(EVENTS)]
    events = Turn(text=texts, calls=0).events(path, 1)
    return [EVENT_STREAM, *map(chunk, events[:-1]), chunk(events[-1]) + LAST_CHUNK]


async def play(face: str, word: str, reads: list[bytes]) -> int:
    """Play an answer; return the instructions that it took."""
    async with Road(face, hold=word) as road:
        control("--zero")
        for read in reads:
            road.protocol.data_received(read)
            # What the path has taken goes out.
            await asyncio.sleep(0)
        count = counted()
        await road.over()
        assert road.stream.ended
        return count


def control(what: str) -> None:
    """Tell valgrind to do *what* with the counts of this process."""
    command = ["callgrind_control", what, str(os.getpid())]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def counted() -> int:
    """Return the instructions since they were zeroed."""
    control("--dump")
    (dump,) = Path().glob("callgrind.*.*")
    (total,) = (line for line in dump.read_text().splitlines() if line.startswith("totals:"))
    dump.unlink()
    return int(total.split()[1])


async def count() -> None:
    """Print the instructions of an event, for each face and word."""
    for face in FACES:
        reads, base = answer(face), 0.0
        for word in WORDS:
            counts = [await play(face, word, reads) for _ in range(WARM + ROUNDS)]
            each = statistics.median(counts[WARM:]) / EVENTS
            base = base or each
            print(f"| {face} | {word} | {each:,.0f} | {each / base:.3f} |", flush=True)


def main() -> None:
    """Count for each tree of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    for tree in parser.parse_args().trees:
        print(f"{tree.resolve().name}\n\n| face | hold | instructions an event | ratio |")
        print("| --- | --- | ---: | ---: |", flush=True)
        with tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder:
            # The package of that tree, and the tests' support of this one.
            (Path(folder) / "aioserver").symlink_to(tree.resolve() / "aioserver")
            subprocess.run(
                [
                    *("valgrind", "-q", "--tool=callgrind", "--callgrind-out-file=callgrind.%p"),
                    *(sys.executable, __file__, "--counted"),
                ],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": folder, "PYTHONHASHSEED": "1"},
                check=True,
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["--counted"]:
        asyncio.run(count())
    else:
        main()
