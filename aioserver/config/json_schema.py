"""The JSON Schema (draft 7) of the configuration, made of the declarations of the settings.

An editor that understands it (most use the YAML language server) completes keys, shows their
meanings, and marks faults while the file is written. It accepts every configuration that
`aioserver check` accepts, and refuses faults that are visible in one value alone. It knows neither
the rules between two settings, nor the environment, nor the files that the configuration names.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from aioserver import __version__
from aioserver.config.schema import fields, ignored_keys, key_of, required, shipped_defaults
from aioserver.config.settings import Settings

if TYPE_CHECKING:
    import dataclasses
    from collections.abc import Mapping

# A value that a variable of the environment replaces may have any type.
VARIABLE = {"$ref": "#/definitions/variable"}


def document() -> dict[str, Any]:
    """Return the schema of a whole configuration."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"Configuration of aioserver {__version__}",
        "definitions": {"variable": {"type": "string", "pattern": r"\$\{"}},
        **section_schema(Settings),
    }


def text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def section_schema(cls: type[Any]) -> dict[str, Any]:
    """Return the schema of one section.

    A section that needs no key may also be empty, as all its lines may be comments.
    """
    keys = fields(cls)
    shipped = shipped_defaults(cls)
    needed = [key for field in keys if required(field) and (key := key_of(field)) not in shipped]
    return {
        "description": inspect.getdoc(cls),
        "type": "object" if needed else ["object", "null"],
        "properties": {
            **{key_of(field): _property(field, shipped) for field in keys},
            **{
                key: {"description": f"ignored: {instead}"}
                for key, instead in ignored_keys(cls).items()
            },
        },
        "required": needed,
        "additionalProperties": False,
    }


def _property(field: dataclasses.Field[Any], shipped: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of one key; *shipped* has the defaults that are in the shipped file."""
    metadata = field.metadata
    made = _made(metadata["validator"].json)
    if metadata["meaning"]:
        made = {"description": metadata["meaning"], **made}
    if key_of(field) in shipped:
        made["default"] = shipped[key_of(field)]
    # A section shows the defaults of its own keys.
    shown = not (required(field) or metadata["secret"] or metadata.get("default_text"))
    if shown and metadata["validator"].inner is None:
        factory: Any = field.default_factory
        default = factory() if callable(factory) else field.default
        made["default"] = list(default) if isinstance(default, tuple) else default
    return made


def _made(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return *part* of a validator's schema with its sections in place, and variables allowed for
    every value.
    """
    if "section" in part:
        return section_schema(part["section"])
    made = dict(part)
    if "items" in part:
        made["items"] = _made(part["items"])
    elif "additionalProperties" in part:
        made["additionalProperties"] = _made(part["additionalProperties"])
    elif "anyOf" in part:
        choices = [choice for alternative in part["anyOf"] for choice in _choices(alternative)]
        made["anyOf"] = [
            choice for number, choice in enumerate(choices) if choice not in choices[:number]
        ]
    elif part != {"type": "string"} and "const" not in part:
        return {"anyOf": [made, VARIABLE]}
    return made


def _choices(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    made = _made(part)
    return made["anyOf"] if made.keys() == {"anyOf"} else [made]
