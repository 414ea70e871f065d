"""The names of tools as those of functions, which every engine takes."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

# The characters in the name of a function that engines take.
MAX_NAME = 64


def function_name(name: str, identity: object, taken: Container[str] = ()) -> str:
    """Return *name*, or one with a digest of *identity*, the tool's, if *name* is too long or is
    *taken* by another tool.
    """
    if len(name) <= MAX_NAME and name not in taken:
        return name
    # A digest keeps apart what is the same when it is cut.
    digest = f"{zlib.crc32(repr(identity).encode('utf-8', 'replace')):08x}"
    return f"{name[: MAX_NAME - 9]}_{digest}"
