"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click

from aioserver import __version__

FILE = click.Path(dir_okay=False, path_type=Path)
config = click.option(
    "--config",
    type=FILE,
    help="Configuration file (YAML).  [default: $AIOSERVER_CONFIG, else ./config.yaml, else the"
    " file that ships with aioserver]",
)
version = click.version_option(__version__, prog_name="aioserver")
