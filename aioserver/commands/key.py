"""`aioserver key`: make a client key."""

from __future__ import annotations

import hashlib
import secrets
import sys

import click
import voluptuous as vol

from aioserver.commands import options
from aioserver.config.validators import label

# People, and scanners that look for secrets in repositories, recognize a key by this prefix.
PREFIX = "aio-"
RANDOM_BYTES = 32
# Requests of a new key that wait for its limits instead of a 429: the agents of a few people.
QUEUE_SIZE = 200


@click.command("key")
@click.argument("name")
@click.option("--admin", is_flag=True, help="Let it read /stats, /events and /metrics, too.")
@options.version
def command(name: str, *, admin: bool) -> int:
    """Make an API key for a client.

    NAME is the client's name in logs and limits. The key is printed this once; below it is the
    line for auth.keys in config.yaml, which holds only the key's SHA-256 hash.
    """
    return key(name, admin=admin)


def key(name: str, *, admin: bool = False) -> int:
    """Print a new key, and the line for `auth.keys` that holds only its hash.

    Only these two lines go to stdout; their explanation goes to stderr. Returns the exit code: 0,
    or 2 where *name* cannot be the name of a caller.
    """
    try:
        label(name)
    except vol.Invalid:
        print(
            "NAME must be 1 to 64 letters, digits, - _ and . that begin with a letter or a digit",
            file=sys.stderr,
        )
        return 2
    new_key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    digest = hashlib.sha256(new_key.encode()).hexdigest()
    print("The key, shown this once, and its line for auth.keys in config.yaml:", file=sys.stderr)
    print(new_key)
    more = ", admin: true" if admin else ""
    print(f'- {{name: "{name}", sha256: "{digest}", queue_size: {QUEUE_SIZE}{more}}}')
    return 0
