"""What only the collector of cycles can free."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aioserver

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = f"{Path(aioserver.__file__).parent}/"
# The simulator is a provider, which stands in for another program.
OTHERS = "aioserver.wings.simulator"


def cycles(collect: Callable[[], Any] = gc.collect) -> Counter[str]:
    """The objects of the package that a pass of the collector finds now, and frees: by type, and
    frames and coroutines by name.
    """
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        collect()
        return Counter(filter(None, map(_own, gc.garbage)))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()


def _own(garbage: Any) -> str:
    """The name of *garbage*; "" if it is none of the package."""
    code = getattr(garbage, "f_code", None) or getattr(garbage, "cr_code", None)
    code = code or getattr(garbage, "__code__", None)
    if code is not None:
        own = code.co_filename.startswith(ROOT) and "/simulator/" not in code.co_filename
        return f"{type(garbage).__name__} {code.co_qualname}" if own else ""
    kind = type(garbage)
    own = kind.__module__.startswith("aioserver.") and not kind.__module__.startswith(OTHERS)
    return kind.__qualname__ if own else ""
