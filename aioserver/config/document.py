"""YAML 1.1 text to plain values, with the place of each and every fault at once.

Not `yaml.safe_load`: it knows no places, keeps the last of two equal keys, follows aliases (nine
lines of them fill the memory) and reads `12:30:45` as 45045 and `010` as 8. Here the values are
put together from the parser's events: one bounded walk, references to the environment replaced in
scalars only after parsing, so that a value can never add structure.

No fault shows a scalar: it may be a secret in the wrong place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import yaml

from aioserver.config.schema import FAULTY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Steps: TypeAlias = tuple[str | int, ...]  # to a value, from the top

MAX_DEPTH = 32  # the settings nest six deep
MAX_VALUES = 10_000  # the shipped file has 150
PREFIX = "AIOSERVER__"

# The C parser is twenty times faster; the wheels of PyYAML all have it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = yaml.reader.Reader.NON_PRINTABLE
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|\$\{")
_WORDS = {"": None, "~": None, "null": None, "yes": True, "true": True, "on": True}
_WORDS |= {"no": False, "false": False, "off": False}
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,39})|[-+]?0x[0-9a-fA-F]{1,32}")
_FRACTION = re.compile(
    r"(?:[-+]?[0-9][0-9_]{0,39}\.[0-9_]{0,39}|\.[0-9][0-9_]{0,39})(?:[eE][-+][0-9]{1,4})?"
)
_ENDLESS = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


class Place(NamedTuple):
    """Where something is said: a file with line and column from 1, or a variable (line 0)."""

    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Fault(NamedTuple):
    """One fault; sorted, they stand in the order of the file."""

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}{' ' if self.path else ''}{self.path}: {self.message}"


class _Unreadable(Exception):
    """The rest of the text cannot be read."""


class Document:
    """The values of one text, and where they stand. Its faults are collected, never raised."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: Any = None
        self.faults: list[Fault] = []
        self.referenced: set[Steps] = set()  # what came from the environment
        self._places: dict[Steps, Place] = {(): Place(1, 1, source)}
        self._count = 0
        self._environ: Mapping[str, str] | None = None

    def place(self, path: Steps) -> Place:
        """Where *path* is said, or else the nearest section around it."""
        while path not in self._places:
            path = path[:-1]
        return self._places[path]

    def fault(self, path: Iterable[Any], message: str, place: Place | None = None) -> Fault:
        """The fault *message* of *path*, at *place* if that is not the place of its key."""
        path = tuple(path)
        return Fault(place or self.place(path), dotted(path), message)

    def read(self, text: str, environ: Mapping[str, str] | None) -> None:
        """Fill in what *text* says; *environ* None: `${NAME}` stays as it is."""
        self._environ = environ
        try:
            self.values = self._read(text)
        except _Unreadable:
            self.values = FAULTY
        except yaml.YAMLError as exc:
            self.values = FAULTY
            mark = getattr(exc, "problem_mark", None) or getattr(exc, "context_mark", None)
            place = Place(mark.line + 1, mark.column + 1, self.source) if mark else None
            # What YAML quotes is its own "<block end>", or a part of the text.
            problem = re.sub(r"'(?!<)[^']{2,}'", "…", str(getattr(exc, "problem", "") or ""))
            self._refuse((), f"not valid YAML: {problem or 'cannot be parsed'}", place)

    def override(self, variable: str, value: str) -> None:
        """Set what *variable* names: `AIOSERVER__CHAT__WEBSOCKET__PORT` is chat.websocket.port.

        A value that starts with `[`, `{` or a quote is read as YAML, any other as one scalar.
        """
        place = Place(0, 0, variable)
        node = self.values
        path: Steps = ()
        *sections, last = variable.removeprefix(PREFIX).split("__")
        for step in sections:
            name = _folded(node, step)
            path = (*path, name)
            if node.get(name) is None:
                node[name] = {}
                self._places[path] = place
            node = node[name]
            if not isinstance(node, dict):
                self._refuse(path, "is not a section, and so has nothing to set in it", place)
                return
        name = _folded(node, last)
        path = (*path, name)
        for known in [known for known in self._places if known[: len(path)] == path]:
            del self._places[known]
        self._places[path] = place
        self.referenced.add(path)
        if value[:1] not in {"[", "{", '"', "'"}:
            node[name] = scalar(value)
            return
        inner = Document(variable)
        inner.read(value, None)
        node[name] = inner.values
        self.faults += [Fault(place, dotted(path), fault.message) for fault in inner.faults]

    def _refuse(self, path: Steps, message: str, place: Place | None = None) -> None:
        self.faults.append(self.fault(path, message, place))

    def _read(self, text: str) -> Any:
        if (bad := _UNPRINTABLE.search(text)) is not None:
            start = text.rfind("\n", 0, bad.start()) + 1
            place = Place(text.count("\n", 0, start) + 1, bad.start() - start + 1, self.source)
            self._stop((), "a control character, which YAML does not allow", place)
        events = yaml.parse(text, Loader=_LOADER)
        next(events)  # the stream's start
        if not isinstance(next(events), yaml.DocumentStartEvent):
            return None
        value = self._value(next(events), (), events)
        next(events)  # the document's end
        if not isinstance(after := next(events), yaml.StreamEndEvent):
            self._refuse((), "a second document in the file", self._at(after))
        return value

    def _stop(self, path: Steps, message: str, place: Place | None = None) -> None:
        self._refuse(path, message, place)
        raise _Unreadable

    def _at(self, event: Any) -> Place:
        return Place(event.start_mark.line + 1, event.start_mark.column + 1, self.source)

    def _value(self, event: Any, path: Steps, events: Iterator[Any]) -> Any:
        """The value that starts with *event*; FAULTY where it has a fault of its own."""
        self._count += 1
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            self._stop(path[:MAX_DEPTH], "too many values, or too deep", self._at(event))
        if isinstance(event, yaml.AliasEvent):
            self._refuse(path, "aliases are refused (write the value out)", self._at(event))
            return FAULTY
        if event.anchor is not None:
            self._refuse(path, "anchors are refused (write the value out)", self._at(event))
        if event.tag is not None:
            self._refuse(path, "tags are refused (quotes make it text)", self._at(event))
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(path, events)
        else:
            value = self._sequence(path, events)
        return FAULTY if event.tag is not None else value

    def _sequence(self, path: Steps, events: Iterator[Any]) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            inside = (*path, len(values))
            self._places.setdefault(inside, self._at(event))
            values.append(self._value(event, inside, events))
        return values

    def _mapping(self, path: Steps, events: Iterator[Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            place = self._at(event)
            if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
                self._refuse(path, "a key must be a plain name", place)
                self._value(event, (*path, "?"), events)
                self._value(next(events), (*path, "?"), events)
                continue
            # The name as it is written: no `on` becomes True, no 1.10 becomes 1.1.
            inside = (*path, event.value)
            if event.value in values:
                first = self.place(inside).line
                self._refuse(inside, f"this key is there twice (first in line {first})", place)
                self._value(next(events), inside, events)
                continue
            self._places.setdefault(inside, place)
            values[event.value] = self._value(next(events), inside, events)
        return values

    def _scalar(self, event: yaml.ScalarEvent, path: Steps) -> Any:
        text, bare, environ = event.value, event.implicit[0], self._environ
        if environ is None or "${" not in text:
            return scalar(text) if bare else text
        self.referenced.add(path)
        faulty = False

        def replaced(match: re.Match[str]) -> str:
            nonlocal faulty
            name, default = match.groups()
            if match[0] == "$${":
                return "${"
            if name is None:
                self._refuse(path, "${ without a name (${NAME}, ${NAME:-default}; $${ is ${)")
            elif name in environ or default is not None:
                return environ.get(name) or default or ""  # empty counts as unset, as in sh
            else:
                self._refuse(path, f"{name} is not set (or write ${{{name}:-default}})")
            faulty = True
            return ""

        result = _REFERENCE.sub(replaced, text)
        if faulty:
            return FAULTY
        whole = _REFERENCE.fullmatch(text) is not None and not text.startswith("$$")
        return scalar(result) if bare and whole else result


def scalar(text: str) -> Any:
    """The value of a scalar without quotes: as YAML 1.1, but for what it surprises with.

    What is text for PyYAML is text here, so that what it writes is read back as the same.
    """
    if text.lower() in _WORDS and text in {text.lower(), text.upper(), text.capitalize()}:
        return _WORDS[text.lower()]
    if _WHOLE.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FRACTION.fullmatch(text):
        return float(text.replace("_", ""))
    if _ENDLESS.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def dotted(path: Steps) -> str:
    """*path* in words; a step that looks like no name is not shown."""
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step}" if _NAME.fullmatch(step) else ".?"
        for step in path
    ]
    return "".join(steps).removeprefix(".")


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}", re.ASCII)


def _folded(node: Mapping[str, Any], step: str) -> str:
    """The key of *node* that *step* means, whatever their case."""
    return next((key for key in node if key.casefold() == step.casefold()), step.lower())
