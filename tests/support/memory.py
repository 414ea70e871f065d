"""What is still in memory: the large bytes that some object of this process holds."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes from which on an object counts: those of a body that comes in pieces do.
PIECE = 1 << 13


def holders() -> Counter[str]:
    """The bytes in large objects, by what holds them: a frame by its name, or else a type."""
    seen: set[int] = set()
    sizes: Counter[str] = Counter()
    for owner in gc.get_objects():
        for value in gc.get_referents(owner):
            if (
                isinstance(value, bytes | bytearray)
                and len(value) >= PIECE
                and id(value) not in seen
            ):
                seen.add(id(value))
                sizes[_name(owner)] += len(value)
    return sizes


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Run without the collector of cycles: what only a cycle holds is then found by `holders`."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _name(owner: Any) -> str:
    code = getattr(owner, "f_code", None) or getattr(owner, "cr_code", None)
    return code.co_qualname if code is not None else type(owner).__qualname__
