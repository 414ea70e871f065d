"""`aioserver key`: make a client key."""

from __future__ import annotations

import hashlib
import secrets
import sys

import voluptuous as vol

from aioserver.config.validators import label

PREFIX = "aio-"  # by which people, and scanners of repositories, know one
BYTES = 32


def key(name: str, *, admin: bool = False) -> int:
    """Print a new key and, below it, the line for `auth.keys`: its hash, from which nobody gets it.

    The two lines alone are on stdout, what they are on stderr. Returns the exit code: 0, or 2 where
    *name* cannot be the name of a caller.
    """
    try:
        label(name)
    except vol.Invalid as why:
        print(f"NAME: {why.error_message}, 64 at most", file=sys.stderr)
        return 2
    made = PREFIX + secrets.token_urlsafe(BYTES)
    digest = hashlib.sha256(made.encode()).hexdigest()
    print("The key, shown this once, and its line for auth.keys in config.yaml:", file=sys.stderr)
    print(made)
    print(f'- {{name: "{name}", sha256: "{digest}"{", admin: true" if admin else ""}}}')
    return 0
