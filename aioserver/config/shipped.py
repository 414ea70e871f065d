"""The file that ships with the package. Its values replace those that another file leaves out: a
section, or a key without a default.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.config.document import Document
from aioserver.config.schema import fields, shipped_values

if TYPE_CHECKING:
    from collections.abc import Callable

# The packaged copy of the file in the repository: it is used if there is no other file.
SHIPPED = Path(__file__).parent.with_name("config.yaml")


def values(path: str) -> Callable[[], dict[str, Any]]:
    """Return the function that returns a copy of the section at the dotted *path* of the shipped
    file.
    """

    def copied() -> dict[str, Any]:
        section = _shipped()
        for key in path.split("."):
            section = section[key]
        return deepcopy(section)

    return copied


def fill(cls: type[Any], mapping: Any) -> None:
    """Add the sections that *mapping*, which is to become a *cls*, leaves out, or has without a
    value.

    A variable of the environment may then change one value inside such a section. A provider with
    `like` inherits them from the other one.
    """
    if not isinstance(mapping, dict):
        return
    for field in fields(cls):
        if (inner := field.metadata["validator"].inner) is None:
            continue
        value, shipped = mapping.get(field.name), shipped_values(inner)
        if value is None and shipped is not None and mapping.get("like") is None:
            value = mapping[field.name] = shipped()
        elif value is None and field.default_factory is inner:
            value = mapping[field.name] = {}
        if not isinstance(value, dict):
            continue
        for part in value.values() if field.metadata["validator"].suffix else (value,):
            fill(inner, part)


@cache
def _shipped() -> dict[str, Any]:
    document = Document(str(SHIPPED))
    document.read(SHIPPED.read_text("utf-8"), {})
    assert isinstance(document.values, dict), "the shipped file is tested"
    return document.values
