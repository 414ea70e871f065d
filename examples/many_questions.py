"""A hundred questions, ten at a time, on one socket: a server that is full makes them wait, and
loses none.

    python examples/many_questions.py [--url http://127.0.0.1:8000] [--questions 100]
                                      [--at-once 10]

Not all of them at once: the server would queue or refuse those beyond its limits, and the client
would ask again until its deadline. With the bound here each question waits in this program
instead, where its deadline does not run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter

from aioserver.client import AnswerError, Client

# Seconds for one answer, with its waits at the server and its reconnections.
DEADLINE = 120.0


async def main() -> None:
    """Ask all questions, and print one line for each and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=10)
    options = parser.parse_args()
    free = asyncio.Semaphore(options.at_once)
    outcomes: Counter[str] = Counter()
    async with Client(options.url, deadline=DEADLINE) as client:

        async def ask(number: int) -> None:
            async with free:
                answer = client.chat(f"What is special about the number {number}?")
                try:
                    text = await answer.text()
                except AnswerError as error:
                    outcomes[error.code] += 1
                    print(f"{number}: no answer: {error}")
                    return
                outcomes["answered"] += 1
                print(f"{number}: {len(text)} characters: {text[:50]!r}")

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(1, options.questions + 1):
                group.create_task(ask(number))
        seconds = time.perf_counter() - start
    summary = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{options.questions} questions in {seconds:.1f} s: {summary}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
        sys.stdout.flush()
    except* BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
