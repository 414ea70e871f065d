"""Any file is a configuration, or a ConfigurationError whose lines begin with a place."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import yaml

from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import Settings
from tests.support.configurations import load, paths

# The file, and as a rule line and column in it.
FAULT = re.compile(r"F(?::\d+:\d+)?:? .", re.DOTALL)
SECRET = "canary-0123456789"
ENVIRON = {"S": SECRET, "N": "17", "EMPTY": ""}
# Each key, and what YAML means something by.
WORDS = (
    *(f"{step}: ".encode() for path in paths(Settings) for step in path.split(".")),
    *(
        b"${S}",
        b"${N:-1}",
        b"${",
        b"$$",
        b"&a ",
        b"*a",
        b"- ",
        b"!!int ",
        b"|\n",
        b"? ",
        b"<<: ",
        b"%YAML",
    ),
    *(
        b"http://h/v1",
        b"auth",
        b"keys",
        b"sha256",
        b"0x10",
        b"1_000",
        b"010",
        b"1:30",
        b".nan",
        b"yes",
    ),
)


def run(data: bytes) -> None:
    """Load *data*; what `check` would show of it has no secret."""
    shown = ""
    faults: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        try:
            shown = yaml.safe_dump(load(data, path, **ENVIRON).effective())
        except ConfigurationError as error:
            faults = tuple(fault.replace(str(path), "F", 1) for fault in error.faults)
    assert shown or faults, "neither a configuration nor a fault"
    for fault in faults:
        assert FAULT.match(fault), fault
        assert SECRET not in fault, "a secret is shown"
    if b"api_key: ${S}" in data and data.count(b"${S}") == 1:
        assert SECRET not in shown, "a secret is shown"
