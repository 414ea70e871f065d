"""`aioserver key`: make a client key, and change the file of `auth.keys_file`."""

from __future__ import annotations

import hashlib
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import voluptuous as vol

from aioserver.commands import options, replaced_file
from aioserver.config import keys_file, schema
from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import ClientKey
from aioserver.config.validators import label

if TYPE_CHECKING:
    import dataclasses
    from collections.abc import Callable
    from pathlib import Path

# People, and scanners that look for secrets in repositories, recognize a key by this prefix.
PREFIX = "aio-"
RANDOM_BYTES = 32
# Requests of a new key that wait for its limits instead of a 429: the agents of a few people.
QUEUE_SIZE = 200
# The most digits of a number in an option; settings have fewer.
MAX_DIGITS = 20
# The placeholder of an option's value that is no number.
WORDS = {"class_": "WORD", "models": "NAMES", "expires": "TIME"}
# The settings of a key that are also options: its limits.
LIMITS = [
    field
    for field in schema.fields(ClientKey)
    if schema.key_of(field) not in {"name", "key_env", "key_file", "sha256", "admin"}
]


def _limit(field: dataclasses.Field[Any]) -> Callable[[str], object]:
    """Return the type of an option for *field*, a setting of a key."""
    validator = field.metadata["validator"]

    def convert(value: str) -> object:
        written: object = value
        if field.name == "models":
            written = value.split(",")
        elif field.name not in WORDS and value.isascii() and value.isdigit():
            written = int(value) if len(value) <= MAX_DIGITS else value
        try:
            return validator(written)
        except vol.Invalid as exc:
            raise click.BadParameter(str(exc.error_message)) from None

    return convert


def _limit_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give *command* an option for each limit of a key."""
    for field in reversed(LIMITS):
        name = schema.key_of(field).replace("_", "-")
        meaning = field.metadata["meaning"]
        command = click.option(
            f"--{name}",
            field.name,
            type=_limit(field),
            metavar=WORDS.get(field.name, "NUMBER"),
            help=f"{meaning[0].upper()}{meaning[1:]}.",
        )(command)
    return command


@click.command("key")
@click.argument("name", required=False)
@click.option("--add", type=options.FILE, metavar="FILE", help="Add the key to FILE, or make it.")
@click.option("--revoke", type=options.FILE, metavar="FILE", help="Take the key out of FILE.")
@click.option("--list", "shown", type=options.FILE, metavar="FILE", help="List the keys of FILE.")
@click.option("--admin", is_flag=True, help="Let it read /stats, /events and /metrics, too.")
@_limit_options
@options.version
def command(
    name: str | None,
    add: Path | None,
    revoke: Path | None,
    shown: Path | None,
    *,
    admin: bool,
    **limits: Any,
) -> int:
    """Make an API key for a client.

    NAME is the client's name in logs and limits. The key is printed this once; below it is the
    line for auth.keys in config.yaml, which holds only the key's SHA-256 hash.

    FILE is the file that auth.keys_file names. --add adds that line to it, and --revoke removes
    it. Running servers see the change within seconds.
    """
    if sum(file is not None for file in (add, revoke, shown)) > 1:
        raise click.UsageError("--add, --revoke and --list are one at a time")
    given: dict[str, Any] = {limit: value for limit, value in limits.items() if value is not None}
    if shown is not None:
        if name is not None or given or admin:
            raise click.UsageError("--list takes neither NAME nor limits")
        return list_keys(shown)
    if name is None:
        raise click.UsageError("Missing argument 'NAME'.")
    try:
        label(name)
    except vol.Invalid:
        print(
            "NAME must be 1 to 64 letters, digits, - _ and . that begin with a letter or a digit",
            file=sys.stderr,
        )
        return 2
    if revoke is not None:
        if given or admin:
            raise click.UsageError("--revoke takes no limits")
        return revoke_key(name, revoke)
    new_key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    try:
        entry = ClientKey(
            name=name,
            sha256=hashlib.sha256(new_key.encode()).hexdigest(),
            admin=admin,
            **{"queue_size": QUEUE_SIZE, **given},
        )
    except vol.MultipleInvalid as exc:
        raise click.UsageError(f"{exc.errors[0].path[0]} {exc.errors[0].error_message}") from None
    if add is not None:
        return add_key(entry, new_key, add)
    print("The key, shown this once, and its line for auth.keys in config.yaml:", file=sys.stderr)
    print(new_key)
    print(f"- {keys_file.entry_of(entry)}")
    return 0


def add_key(entry: ClientKey, key: str, file: Path) -> int:
    """Add *entry* to *file*, and print *key*, to which it belongs. Returns the exit code."""

    def edit(content: bytes) -> bytes:
        if entry.name in keys_file.names(content, str(file)):
            message = (
                f"{file}: a key is named {entry.name} already: take another name, or take that one "
                f"back first (`aioserver key {entry.name} --revoke {file}`)"
            )
            raise ConfigurationError([message])
        return keys_file.with_entry(content, keys_file.entry_of(entry), str(file))

    if code := _change(file, edit, new=True):
        return code
    print(f"{entry.name} is in {file}. The key, shown this once:", file=sys.stderr)
    print(key)
    return 0


def revoke_key(name: str, file: Path) -> int:
    """Take the key of *name* out of *file*. Returns the exit code."""

    def edit(content: bytes) -> bytes:
        names = keys_file.names(content, str(file))
        if name not in names:
            there = ", ".join(names[:20]) or "none"
            raise ConfigurationError([f"{file}: no key is named {name}; there are: {there}"])
        return keys_file.without_entry(content, name, str(file))

    if code := _change(file, edit):
        return code
    print(f"{name} is no longer in {file}", file=sys.stderr)
    return 0


def list_keys(file: Path) -> int:
    """Print the names and the limits of the keys in *file*. Returns the exit code."""
    try:
        keys = keys_file.read(file)
    except ConfigurationError as exc:
        return _refuse(exc)
    for key in keys:
        limits = {
            schema.key_of(field): value
            for field in LIMITS
            if (value := getattr(key, field.name)) != field.default
        }
        if key.models is not None:
            limits["models"] = ",".join(key.models)
        words = [f"{limit}={value}" for limit, value in limits.items()] + ["admin"] * key.admin
        words += ["expired"] * (key.expires_at <= time.time())
        print(" ".join([key.name, *words]))
    return 0


def _change(file: Path, edit: Callable[[bytes], bytes], *, new: bool = False) -> int:
    """Change *file*. Returns the exit code."""
    try:
        replaced_file.change(file, edit, new=new)
    except ConfigurationError as exc:
        return _refuse(exc)
    except FileNotFoundError:
        hint = f"{file.parent} is no folder" if new else "--add makes it"
        print(f"{file}: no such file ({hint})", file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"{file}: cannot be changed: {exc.strerror or exc}", file=sys.stderr)
        return 1
    return 0


def _refuse(error: ConfigurationError) -> int:
    for fault in error.faults:
        print(fault, file=sys.stderr)
    return 2
