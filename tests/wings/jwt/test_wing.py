"""The extra `jwt`: wanted where tokens are taken, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aioserver.config.settings import Auth, Jwt
from aioserver.server.wings import WINGS, faults
from aioserver.wings.jwt import wing as jwt_wing
from aioserver.wings.jwt.wing import JwtWing
from tests.support.configurations import load, refused, small
from tests.support.issuer import AUDIENCE, ISSUER, jwt_settings

if TYPE_CHECKING:
    from pathlib import Path

AUTH = Auth(jwt=Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_url="https://login.example/keys"))
# The shipped configuration is checked where none of the packages can be imported.
WITHOUT = """
import sys
for name in ("jwt", "cryptography"):
    sys.modules[name] = None
import asyncio
from aioserver.config import Configuration
from aioserver.server.app import open_server

async def main():
    async with open_server(Configuration.load(sys.argv[1], environ={}).settings) as server:
        print(server.context.access.keyed)

asyncio.run(main())
"""


def test_a_package_that_is_missing_or_too_old_is_a_fault_that_names_the_extra() -> None:
    missing = [*jwt_wing.faults(AUTH, {"no-such-package": (2, 13)})]
    old = [*jwt_wing.faults(AUTH, {"aiohttp": (99, 1)})]

    assert missing == [
        "auth.jwt: no-such-package>=2.13 is not installed (pip install '.[jwt]' in the clone)"
    ]
    assert old[0].startswith("auth.jwt: aiohttp>=99.1 is needed, and 3.")
    assert old[0].endswith("(the extra jwt)")
    assert [*jwt_wing.faults(AUTH)] == []
    assert [*jwt_wing.faults(None, {"no-such-package": (1, 0)})] == []
    assert [*jwt_wing.faults(Auth(keys=()), {"no-such-package": (1, 0)})] == []


def test_a_server_without_tokens_needs_none_of_the_packages(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{small()}auth: {{keys: []}}\n")

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, file],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert done.stdout == "True\n", done.stderr


def test_without_the_wing_the_section_is_a_fault(tmp_path: Path) -> None:
    text = f"{small()}auth: {{jwt: {jwt_settings('https://login.example/keys')}}}\n"
    settings = load(text, tmp_path / "config.yaml").settings
    others = [wing() for wing in WINGS if wing is not JwtWing]

    assert "auth.jwt needs the wing jwt" in " ".join(faults(settings, others))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"jwks_url": "http://login.example/keys"}, "auth.jwt.jwks_url: expected https://"),
        ({"jwks_url": "https://user:secret@login.example/"}, "auth.jwt.jwks_url: expected"),
        ({"jwks_url": None}, "auth.jwt: needs exactly one of jwks_url, jwks_file"),
        ({"jwks_file": "x"}, "auth.jwt: needs exactly one of jwks_url, jwks_file"),
        ({"limits": {}}, "auth.jwt.limits: without any role every token is refused"),
        ({"limits": {"a": {"name": "x"}}}, "auth.jwt.limits.a.name: unknown key"),
        ({"limits": {"a": {"priority": 11}}}, "auth.jwt.limits.a.priority: must be at most 10"),
        ({"issuer": None}, "auth.jwt.issuer: expected text"),
    ],
)
def test_what_cannot_be_used_is_a_fault(
    tmp_path: Path, changes: dict[str, object], fault: str
) -> None:
    section = jwt_settings("https://login.example/keys") | changes
    written = str(section).replace("None", "null")
    text = f"{small()}auth: {{jwt: {written}}}\n"

    (line,) = refused(lambda: load(text, tmp_path / "config.yaml"))

    assert fault in line
    assert "secret" not in line


def test_a_section_without_values_and_one_beside_open_are_faults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"

    assert len(refused(lambda: load(f"{small()}auth:\n  jwt:\n", file))) == 3
    text = f"{small()}auth: {{open: true, jwt: {jwt_settings('https://l.example/keys')}}}\n"
    (line,) = refused(lambda: load(text, file))
    assert line.endswith("auth.open: cannot be open and have jwt")
    text = f"{small()}auth: {{jwt: {jwt_settings('http://127.0.0.1:9/keys')}}}\n"
    assert load(text, file).warnings == ()
