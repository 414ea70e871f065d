"""A value that a JSON Schema (2020-12) allows, made of given texts: the same for the same schema
and texts. No I/O.

It supports the usual keywords of tools and of structured output: `type`, `enum`, `const`,
`properties`, `required`, `items`, `anyOf`, `oneOf`, `allOf`, local `$ref`, bounds of numbers,
strings and arrays, and the usual formats. It does not support `pattern`, `not`, `if` and
`dependentSchemas`: a value with a `pattern` is its `examples` or `default`, if the schema has one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_FORMATS = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "url": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
# Levels of a value: a schema that refers to itself has no end of its own.
_MAX_DEPTH = 12
# The bound of values in one value, characters of one text and items of one array: a schema may
# come from anyone.
_MAX_VALUES = 500
_MAX_TEXT = 1000
_MAX_ITEMS = 20
_VARIANTS = ("anyOf", "oneOf")
# The keywords that parts of an `allOf` combine; for all others the last one counts.
_JOINED = ("properties", "required")


class Sampler:
    """Makes one value.

    Each of *texts* becomes one string of it; further strings are *otherwise*.
    """

    def __init__(
        self, schema: Mapping[str, Any], texts: Iterable[str] = (), otherwise: str = "text"
    ) -> None:
        self._schema = schema
        self._texts = iter(texts)
        self._otherwise = otherwise
        self._values_left = _MAX_VALUES

    def value(self) -> Any:
        """Return the value.

        It has the required properties of each object, or all where no `required` is named.
        """
        return self._value(self._schema, 0)

    def _value(self, definition: Any, depth: int) -> Any:
        schema = self._flat(definition)
        self._values_left -= 1
        for name in ("const", "default") if "pattern" in schema else ("const",):
            if name in schema:
                return schema[name]
        for name in ("enum", "examples") if "pattern" in schema else ("enum",):
            choices = schema.get(name)
            if isinstance(choices, list) and choices:
                return choices[0]
        kind = _type(schema)
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind in {"integer", "number"}:
            return _number(schema, whole=kind == "integer")
        if kind == "boolean":
            return True
        return None if kind == "null" else self._string(schema)

    def _flat(self, definition: Any) -> dict[str, Any]:
        """Return *definition* with its references resolved, all of `allOf`, and the first variant
        that is not null.
        """
        schema = dict(definition) if isinstance(definition, dict) else {}
        # A step removes one keyword and may bring another. The bounds are there since they can
        # form a circle.
        for _ in range(_MAX_DEPTH):
            if self._values_left <= 0:
                break
            if "$ref" in schema:
                schema = {**self._target(schema.pop("$ref")), **schema}
            elif "allOf" in schema:
                for part in objects(schema.pop("allOf")):
                    schema = _merged(schema, part)
            elif variants := [name for name in _VARIANTS if name in schema]:
                choices = objects(schema.pop(variants[0]))
                values = [choice for choice in choices if choice.get("type") != "null"]
                schema = _merged(schema, values[0]) if values else schema
            else:
                break
            self._values_left -= 1
        return schema

    def _target(self, reference: Any) -> dict[str, Any]:
        target: Any = self._schema
        if not isinstance(reference, str) or not reference.startswith("#"):
            return {}
        # RFC 6901: `~1` is a slash, `~0` a tilde.
        for name in reference.split("/")[1:]:
            key = name.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, dict) else None
        return target if isinstance(target, dict) else {}

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict) or depth >= _MAX_DEPTH:
            return {}
        if isinstance(required, list):
            needed = {name for name in required if isinstance(name, str)}
            properties = {name: kind for name, kind in properties.items() if name in needed}
        return {
            name: self._value(kind, depth + 1)
            for name, kind in properties.items()
            if self._values_left > 0
        }

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        if depth >= _MAX_DEPTH:
            return []
        first = schema.get("prefixItems")
        kinds = list(first)[:_MAX_ITEMS] if isinstance(first, list) else []
        least = schema.get("minItems")
        length = min(_MAX_ITEMS, least if isinstance(least, int) else len(kinds))
        kinds += [schema.get("items")] * (length - len(kinds))
        return [self._value(kind, depth + 1) for kind in kinds if self._values_left > 0]

    def _string(self, schema: Mapping[str, Any]) -> str:
        kind = schema.get("format")
        if isinstance(kind, str) and kind in _FORMATS:
            return _FORMATS[kind]
        text = next(self._texts, self._otherwise)
        least, most = schema.get("minLength"), schema.get("maxLength")
        if isinstance(least, int) and len(text) < least <= _MAX_TEXT:
            text = ((text or "x") * least)[:least]
        if isinstance(most, int) and most >= 0:
            text = text[:most]
        return text[:_MAX_TEXT]


def objects(items: Any) -> list[dict[str, Any]]:
    """Return the objects among *items*; none if that is no list."""
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _merged(schema: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**schema, **part}
    properties, required = ([of.get(name) for of in (schema, part)] for name in _JOINED)
    if all(isinstance(value, dict) for value in properties):
        merged["properties"] = {**schema["properties"], **part["properties"]}
    if all(isinstance(value, list) for value in required):
        merged["required"] = [*schema["required"], *part["required"]]
    return merged


def _type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    if isinstance(kind, str):
        return kind
    if "properties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "string"


def _number(schema: Mapping[str, Any], *, whole: bool) -> float:
    """Return 1, or 1.5 if that is allowed; else an allowed number near to it."""
    multiple: Any = schema.get("multipleOf")
    step: float = multiple if _number_like(multiple) and multiple > 0 else int(whole)
    low, above = (_bound(schema.get(name), -math.inf) for name in ("minimum", "exclusiveMinimum"))
    high, below = (_bound(schema.get(name), math.inf) for name in ("maximum", "exclusiveMaximum"))
    if step:
        low, high = max(low, above + step), min(high, below - step)
        number = math.ceil(min(max(1, low), high) / step) * step
        number = number - step if number > high else number
        return int(number) if whole else number
    least, most = max(low, above), min(high, below)
    if least < 1.5 < most:
        return 1.5
    if low == high:
        return low
    if math.isfinite(least) and math.isfinite(most):
        return (least + most) / 2
    return least + 1 if math.isfinite(least) else most - 1


def _number_like(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bound(value: Any, otherwise: float) -> float:
    return float(value) if _number_like(value) and abs(value) < 2**53 else otherwise
