"""A command as a person starts it: a process of its own that serves, and says where.

For tests without an event loop. What such a process must do first is in its first line: `aioserver
is ready: http://…`, or `simulated provider on http://…`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@contextmanager
def serving(
    command: Sequence[str | Path], cwd: Path, environ: dict[str, str] | None = None
) -> Iterator[str]:
    """Start *command* in *cwd*; yield the URL in its first line. At the end it gets SIGTERM.

    *environ* is added to the environment of the tests, from which the settings that others have
    made for a server (`AIOSERVER…`) are taken out.
    """
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith("AIOSERVER")}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env={**inherited, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        deadline = threading.Timer(LATE, process.kill)
        deadline.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            deadline.cancel()
            match = re.search(r"http://[^\s/]+(/\S*)?", line)
            if match is None:
                stderr.seek(0)
                raise AssertionError(f"{line!r} has no URL; stderr: {stderr.read()}")
            yield match[0]
        finally:
            deadline.cancel()
            process.terminate()
            deadline = threading.Timer(LATE, process.kill)
            deadline.start()
            process.wait()
            deadline.cancel()
