"""The ledger: what it says against what its provider has counted, and how fast it is added up.

    PYTHONPATH=. python benchmarks/ledger.py                       # both, about five minutes
    PYTHONPATH=. python benchmarks/ledger.py --answers 10000 --kills 5
    PYTHONPATH=. python benchmarks/ledger.py --answers 0 --lines 1000000

The first part runs a server and kills it again and again (kill -9), while clients ask it for
answers of a provider that counts: in one piece and streamed, with retries, cuts, continuations and
clients that leave (tests/support/bookkeeping.py). The second one writes a ledger of so many lines,
by 20 callers for 10 models, and adds it up with `aioserver usage`. Exit code 1: the two do not
agree, or the goals of 8 s of a processor and 300 MiB are missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.bookkeeping import keep_books

MOST_SECONDS, MOST_MIB = 8.0, 300


def compare(folder: Path, answers: int, kills: int) -> bool:
    """Print what came of a run of so many *answers* and *kills*; return whether both agree."""
    began = time.monotonic()
    result = asyncio.run(keep_books(folder, answers, kills))
    print(f"{answers:,} answers, {kills} kills, {time.monotonic() - began:.0f} s")
    print(f"  attempts that the provider has got, refusals aside: {result.attempts:,}")
    print(f"  their lines: {dict(sorted(result.outcomes.items()))}")
    print(f"  without a last line, in the moment before a kill: {result.missing}")
    print(f"  tokens by the ledger   {result.ledger[0]:,} in, {result.ledger[1]:,} out")
    print(f"  tokens by the provider {result.provider[0]:,} in, {result.provider[1]:,} out")
    for wrong in result.wrong[:10]:
        print(f"  WRONG: {wrong}")
    return not result.wrong and result.ledger == result.provider


def write(folder: Path, lines: int) -> Path:
    """Write a ledger of so many *lines*."""
    dice = random.Random(0)
    file = folder / "usage-2026-11-28.jsonl"
    with file.open("w") as out:
        for number in range(1, lines + 1):
            line = {
                "ts": f"2026-11-28T{number * 86_400 // (lines + 1) // 3600:02}:00:00.123Z",
                "id": f"9f3c2a71-{number:x}",
                "attempt": 1,
                "request_id": f"chatcmpl-{dice.getrandbits(64):x}",
                "caller": f"caller-{dice.randrange(20)}",
                "face": "openai",
                "path": "chat/completions",
                "provider": "openai",
                "model": f"model-{dice.randrange(10)}",
                "class": "interactive",
                "outcome": "ok",
                "in": dice.randrange(5000),
                "cached": 0,
                "cache_write": 0,
                "out": dice.randrange(1000),
                "reasoning": 0,
                "audio_in": 0,
                "audio_out": 0,
                "source": "provider",
                "wait_ms": 12.1,
                "first_ms": 310.0,
                "ms": 2210.4,
            }
            out.write(json.dumps(line, separators=(",", ":")) + "\n")
    return file


def add_up(file: Path, lines: int) -> bool:
    """Print how long `aioserver usage` takes for *file*; return whether that is within bounds."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "aioserver", "usage", str(file), "--by", "caller,model,day"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    mib = after.ru_maxrss / 1024
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{lines:,} lines, {file.stat().st_size / 1e6:.0f} MB: {len(table.splitlines()) - 2} rows"
    )
    print(f"  {seconds:.1f} s ({cpu:.1f} s of a processor), {mib:.0f} MiB")
    # On a machine that does much else, what it takes is the time of a processor.
    return cpu <= MOST_SECONDS and mib <= MOST_MIB


def main() -> int:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        if options.lines:
            good &= add_up(write(Path(folder), options.lines), options.lines)
        if options.answers:
            good &= compare(Path(folder), options.answers, options.kills)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
