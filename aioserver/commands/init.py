"""`aioserver init`: write the shipped, commented configuration, or one made from LiteLLM's."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click
import yaml

from aioserver.commands import litellm, options
from aioserver.config import Configuration, json_schema
from aioserver.config.faults import ConfigurationError
from aioserver.config.shipped import SHIPPED

# Stands beside the configuration, whose first lines name it for editors.
SCHEMA = "config.schema.json"


@click.command("init")
@click.argument("file", type=options.FILE, default=Path("config.yaml"))
@click.option(
    "--from",
    "origin",
    type=options.FILE,
    metavar="FILE",
    help="Make it from FILE, the config.yaml of LiteLLM, and print what has no counterpart.",
)
@options.version
def command(file: Path, origin: Path | None) -> int:
    """Write a commented config.yaml to start from.

    FILE is config.yaml in the current folder unless you name another. A file that exists is never
    overwritten. Beside it comes config.schema.json, by which editors complete and check FILE;
    `aioserver check --schema` prints it anew.
    """
    return init(file) if origin is None else convert(origin, file)


def convert(origin: Path, target: Path) -> int:
    """Write what *origin*, a configuration of LiteLLM, comes to, as `init`. The lines of it that
    have no counterpart go to stdout.

    Returns the exit code: 0, or 2 if *origin* cannot be read or converted.
    """
    try:
        settings, remarks = litellm.converted(origin.read_text(encoding="utf-8"))
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        # The variable of a client's key is set where the server runs.
        keys = settings["auth"].get("keys", ())
        unset = {key["key_env"]: "unset" for key in keys if "key_env" in key}
        Configuration.load(target, content=text.encode(), environ=unset)
    except OSError as error:
        print(f"{origin} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    except (UnicodeDecodeError, litellm.NotLiteLLM) as error:
        print(f"{origin} is no configuration of LiteLLM: {error}", file=sys.stderr)
        return 2
    except ConfigurationError as error:
        print(f"{origin} comes to what is not valid:", *error.faults, sep="\n", file=sys.stderr)
        return 2
    code = init(target, text.encode())
    if not code:
        print(*remarks, sep="\n", end="\n" if remarks else "")
    return code


def init(target: Path, content: bytes | None = None) -> int:
    """Write *content* to *target*, unless that exists, and its schema beside it, unless one is
    there. None: the shipped configuration.

    Returns the exit code: 0, or 2 if *target* exists or cannot be written.
    """
    try:
        # x: the kernel refuses a file that exists; a check beforehand could race with its
        # creation.
        with target.open("xb") as file:
            if content is not None:
                # It may have keys in it.
                target.chmod(0o600)
            file.write(SHIPPED.read_bytes() if content is None else content)
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
