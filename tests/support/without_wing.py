"""A copy of the package without one of its wings: its folder, and its lines in the table."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

from aioserver.server.wings import WINGS
from tests.support.package import PACKAGE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

CLASSES = {wing.name: wing.__name__ for wing in WINGS}
TABLE = "server/wings.py"
# What a wing adds to the commands goes with it.
COMMANDS = {"simulator": ("tools/provider.py",)}


def without(table: str, wing: str) -> str:
    """The table of wings without the import of *wing* and its line."""
    lines = [
        line for line in table.splitlines() if not line.startswith(f"from aioserver.wings.{wing}.")
    ]
    return re.sub(rf"\b{CLASSES[wing]}\b,? ?", "", "\n".join(lines)) + "\n"


def copy_package_without(wings: Iterable[str], into: Path) -> None:
    """Copy the package without *wings*.

    The bytecode that is there comes with it: to compile all of it takes seconds.
    """
    shutil.copytree(PACKAGE, into / "aioserver")
    table = into / "aioserver" / TABLE
    for wing in wings:
        shutil.rmtree(into / "aioserver" / "wings" / wing)
        for path in COMMANDS.get(wing, ()):
            (into / "aioserver" / path).unlink()
        table.write_text(without(table.read_text(), wing))
