"""`aioserver check`: validate a configuration without starting, and print it, or print the JSON
Schema of configurations.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
import yaml

from aioserver.commands import options
from aioserver.config import Configuration, json_schema
from aioserver.config.faults import ConfigurationError
from aioserver.server.listener import url_of
from aioserver.server.wings import WINGS, faults

if TYPE_CHECKING:
    from pathlib import Path


@click.command("check")
@options.config
@click.option(
    "--schema",
    is_flag=True,
    help="Print the JSON Schema of config.yaml, for an editor, and read no configuration.",
)
@options.version
def command(config: Path | None, *, schema: bool) -> int:
    """Validate the configuration and print it.

    Nothing is started. Every fault is reported at once, with its line and column; a configuration
    without a fault is printed as YAML, with defaults and environment variables applied and secrets
    masked. Exit code 2: `serve` would refuse it.
    """
    if schema:
        print(json_schema.text(), end="")
        return 0
    return check(config)


def check(config: Path | None) -> int:
    """Print the effective configuration in *config* (None: the file that `serve` would choose).

    Faults, warnings and the names that lead to other providers go to stderr, the effective
    configuration, with its secrets masked, to stdout. Returns the exit code: 0, or 2 for a
    configuration that `serve` would refuse.
    """
    try:
        configuration = Configuration.load(config)
        configuration.check_usable()
        if unfit := list(faults(configuration.settings, (wing() for wing in WINGS))):
            raise ConfigurationError(unfit)
    except ConfigurationError as error:
        print(*error.faults, sep="\n", file=sys.stderr)
        return 2
    for warning in configuration.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for providers, models in configuration.settings.llm.bare_routes().items():
        print(f"by name alone go to {', '.join(providers)}: {', '.join(models)}", file=sys.stderr)
    print(f"# {configuration.source}, with defaults and the environment")
    websocket = configuration.settings.chat.websocket
    if websocket.tls is not None:
        print(f"# serves {url_of(websocket.host, websocket.port, websocket.scheme)}")
    print(yaml.safe_dump(configuration.effective(), sort_keys=False, allow_unicode=True), end="")
    sys.stdout.flush()
    print(f"{configuration.source} is valid", file=sys.stderr)
    return 0
