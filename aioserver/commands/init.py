"""`aioserver init`: write the shipped, commented configuration."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from aioserver.config.configuration import SHIPPED

if TYPE_CHECKING:
    from pathlib import Path


def init(target: Path) -> int:
    """Write the shipped configuration to *target*, never over a file.

    Returns the exit code: 0, or 2 where *target* exists or cannot be written.
    """
    try:
        with target.open("xb") as file:  # x: refused by the kernel, not by a look beforehand
            file.write(SHIPPED.read_bytes())
    except FileExistsError:
        print(f"{target} exists; nothing was written", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{target} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{target} written; `aioserver check --config {target}` validates it")
    return 0
