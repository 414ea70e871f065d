"""The programs that the samples of `deploy/` are for."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
# The programs that build and run an image.
ENGINES = ("docker", "podman")


def installed(program: str) -> str:
    """The path of *program*. Without it the test skips, or fails with CI=true."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        why = f"{program} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return path


def edited(name: str, edits: dict[str, str]) -> str:
    """The sample *name* with the *edits* that an operator would make, each in exactly one
    place.
    """
    text = (DEPLOY / name).read_text()
    for old, new in edits.items():
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def free_port() -> int:
    """A port that is free on both loopback addresses, since the server listens on `localhost`.

    It is below those from which the kernel takes the clients' own, so that no connection gets it
    meanwhile.
    """
    while True:
        port = random.randrange(12000, 32000)
        try:
            for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
                socket.create_server((host, port), family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
        return port
