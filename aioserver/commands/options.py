"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aioserver import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = click.Path(dir_okay=False, path_type=Path)
config = click.option(
    "--config",
    type=FILE,
    help="Configuration file (YAML).  [default: $AIOSERVER_CONFIG, else ./config.yaml, else the"
    " file that ships with aioserver]",
)
version = click.version_option(__version__, prog_name="aioserver")


def number(
    name: str, kind: click.ParamType[Any], meaning: str, default: float | None = None, **more: Any
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return the decorator for an option with a number of this *kind*; a *default* is shown."""
    shown = default is not None
    return click.option(name, type=kind, default=default, show_default=shown, help=meaning, **more)
