"""The file that ships with the package, and its values, which count for a section that another
file leaves out.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.config.document import Document
from aioserver.config.schema import fields

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
    """Add the sections that *mapping*, which is to become a *cls*, leaves out.

    A variable of the environment may then change one value inside such a section. A provider with
    `like` has what the other one has.
    """
    if not isinstance(mapping, dict):
        return
    for field in fields(cls):
        shipped, inner = field.metadata.get("shipped"), field.metadata["validator"].inner
        if shipped is not None and field.name not in mapping and mapping.get("like") is None:
            mapping[field.name] = shipped()
        value = mapping.get(field.name)
        if inner is None or not isinstance(value, dict):
            continue
        for part in value.values() if field.metadata["validator"].suffix else (value,):
            fill(inner, part)


@cache
def _shipped() -> dict[str, Any]:
    document = Document(str(SHIPPED))
    document.read(SHIPPED.read_text("utf-8"), {})
    assert isinstance(document.values, dict), "the shipped file is tested"
    return document.values
