"""The command `python -m tests.fuzz`: one target with Atheris, which looks for inputs that reach
new lines.

Needs the extra `fuzz`: `pip install -e '.[test,fuzz]'`. Atheris drives libFuzzer, and its options
may follow those below: `-runs=1000`, for example. An input that fails is written to the folder
that the last lines name.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.inputs import CORPUS
from tests.fuzz.targets import TARGETS

try:
    import atheris
except ModuleNotFoundError:
    atheris = None

# Bytes of an input at most.
MAX_BYTES = 4096
# Seconds that one input may take, before it counts as a fault.
TOO_LONG = 20
MAX_MEMORY_MB = 1024


def main() -> int:
    """Run one target; return the exit code. With Atheris this function does not return."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("inputs", nargs="*", type=Path, help="run these files only, once each")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--found", type=Path, help="folder of inputs that reach new lines")
    options, more = parser.parse_known_args()
    if options.inputs:
        return _replay(options.target, options.inputs)
    if atheris is None:
        print("Atheris is missing: pip install -e '.[test,fuzz]'", file=sys.stderr)
        return 2
    folder = options.found or Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"inputs are written to {folder}", file=sys.stderr)
    fuzzer: Any = atheris
    with fuzzer.instrument_imports(include=["aioserver"]):
        from tests.fuzz.targets import load, words

        run = load(options.target)
    dictionary = folder.with_name(f"{folder.name}.dict")
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in words(options.target)))
    arguments = [
        sys.argv[0],
        *(f"-max_total_time={options.seconds}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"),
        *(f"-timeout={TOO_LONG}", f"-rss_limit_mb={MAX_MEMORY_MB}"),
        *(f"-artifact_prefix={folder}/", f"-dict={dictionary}"),
        *more,
        # New inputs go to the first folder.
        *map(str, (folder, CORPUS / options.target)),
    ]
    fuzzer.Setup(arguments, run)
    fuzzer.Fuzz()
    return 0


def _escaped(word: bytes) -> str:
    """Return *word* as a dictionary of libFuzzer has it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


def _replay(target: str, paths: list[Path]) -> int:
    from tests.fuzz.targets import load

    run = load(target)
    for path in paths:
        with contextlib.ExitStack() as stack:
            stack.callback(print, path)
            run(path.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
