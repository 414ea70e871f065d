"""Views of settings for people: plain data with secrets masked, and the names of settings.

Only names are shown where a value could be a secret: in the log lines about what a reload has
changed, and about settings that have no effect yet.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import voluptuous as vol

from aioserver.config.schema import fields, key_of


def plain(value: Any) -> Any:
    """Return *value* as a YAML file could hold it, with `***` for every secret."""
    match value:
        case tuple() | list():
            return [plain(item) for item in value]
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            return {
                key_of(field): _masked(field, value)
                for field in fields(value)
                if _writable(field, getattr(value, field.name))
            }
        case _:
            return value


def _writable(field: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether the value can be written: the file has no word for some values of settings
    that are left out.
    """
    if value is not None:
        return True
    try:
        field.metadata["validator"](None)
    except vol.Invalid:
        return False
    return True


def _masked(field: dataclasses.Field[Any], owner: Any) -> Any:
    value = plain(getattr(owner, field.name))
    if not field.metadata["secret"] or not value:
        return value
    if isinstance(value, dict):
        return dict.fromkeys(value, "***")
    if field.metadata["validator"].kind == "URL":
        # The host is no secret; the user's name, the password and the query may be.
        return re.sub(r"\?.*", "?***", re.sub(r"://.*@", "://***@", value))
    return "***"


def changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted names of the settings that differ between two instances of one class."""
    for field in fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        name = path + key_of(field)
        if before == after:
            continue
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            yield from changes(before, after, f"{name}.")
        elif isinstance(before, Mapping) and field.metadata["validator"].inner is not None:
            for key in dict.fromkeys((*before, *after)):
                if key in before and key in after:
                    yield from changes(before[key], after[key], f"{name}.{key}.")
                else:
                    yield f"{name}.{key}"
        else:
            yield name
