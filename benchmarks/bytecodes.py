"""Runs aioserver, and counts the bytecodes that it executes, for `instructions.py --bytecodes`.

    python benchmarks/bytecodes.py DESCRIPTOR serve --config FILE

Each line that comes on the standard input, `on` or `off`, turns the counting on or off; what was
counted so far is written to the descriptor. It needs Python 3.12 (PEP 669).
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType

if sys.version_info < (3, 12):
    raise SystemExit("bytecodes are counted from Python 3.12 on")

TOOL = sys.monitoring.PROFILER_ID


class Counter:
    """Counts the bytecodes of all threads."""

    def __init__(self, reply: int) -> None:
        self._count, self._reply = 0, reply
        sys.monitoring.use_tool_id(TOOL, "bytecodes")
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.INSTRUCTION, self._executed)

    def _executed(self, _code: CodeType, _offset: int) -> None:
        self._count += 1

    def obey(self) -> None:
        """Do what comes on the standard input, to its end."""
        for line in sys.stdin:
            events = sys.monitoring.events.INSTRUCTION if line == "on\n" else 0
            sys.monitoring.set_events(TOOL, events)
            os.write(self._reply, f"{self._count}\n".encode())


if __name__ == "__main__":
    threading.Thread(target=Counter(int(sys.argv.pop(1))).obey, daemon=True).start()
    sys.path[0] = ""
    runpy.run_module("aioserver", run_name="__main__", alter_sys=True)
