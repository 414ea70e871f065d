"""`aioserver init`: write the shipped, commented configuration."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from aioserver.commands import options
from aioserver.config import json_schema
from aioserver.config.shipped import SHIPPED

# Stands beside the configuration, whose first lines name it for editors.
SCHEMA = "config.schema.json"


@click.command("init")
@click.argument("file", type=options.FILE, default=Path("config.yaml"))
@options.version
def command(file: Path) -> int:
    """Write a commented config.yaml to start from.

    FILE is config.yaml in the current folder unless you name another. A file that exists is never
    overwritten. Beside it comes config.schema.json, by which editors complete and check FILE;
    `aioserver check --schema` prints it anew.
    """
    return init(file)


def init(target: Path) -> int:
    """Write the shipped configuration to *target*, unless that exists, and its schema beside it,
    unless one is there.

    Returns the exit code: 0, or 2 if *target* exists or cannot be written.
    """
    try:
        # x: the kernel refuses a file that exists; a check beforehand could race with its
        # creation.
        with target.open("xb") as file:
            file.write(SHIPPED.read_bytes())
    except FileExistsError:
        print(f"{target} exists; nothing was written", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{target} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    # Without the schema only the help of editors is missing.
    with contextlib.suppress(OSError), target.with_name(SCHEMA).open("x") as schema:
        schema.write(json_schema.text())
    print(f"{target} written; `aioserver check --config {target}` validates it")
    return 0
