"""YAML 1.1 text to plain values, with the place of every value, and all faults at once.

Not `yaml.safe_load`: it knows no places, keeps the last of two equal keys, follows aliases (nine
lines of them fill the memory) and reads `12:30:45` as 45045 and `010` as 8. The values are built
from the events of the parser instead, in one walk whose depth and size are bounded. References to
the environment are replaced after parsing, and in scalars only, so that a value from the
environment can never add structure.

No fault of the layout quotes a scalar, which may be a secret in the wrong place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import yaml

from aioserver.config.faults import ConfigurationError
from aioserver.config.schema import FAULTY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# The keys and indexes that lead from the top of a document to a value.
KeyPath: TypeAlias = tuple[str | int, ...]

# The settings nest six deep.
MAX_DEPTH = 32
# The shipped file has 150 values.
MAX_VALUES = 10_000
# Variables with this prefix override settings.
PREFIX = "AIOSERVER__"

# The C parser is twenty times faster. All wheels of PyYAML contain it.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = yaml.reader.Reader.NON_PRINTABLE
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|\$\{")
# A part of the name of a variable that a shell can set.
_WORD = re.compile(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*", re.ASCII)
# A key that may be shown: a name, or that of a model, such as `openai/gpt-4*`.
_NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}(?:[/:][A-Za-z0-9_.-]{1,40}){0,8}\*?", re.ASCII
)

# The scalars of YAML 1.1 that are not text, without its octal and sexagesimal numbers and dates.
_WORDS = {"": None, "~": None, "null": None, "yes": True, "true": True, "on": True}
_WORDS |= {"no": False, "false": False, "off": False}
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,39})|[-+]?0x[0-9a-fA-F]{1,32}")
_FRACTION = re.compile(
    r"(?:[-+]?[0-9][0-9_]{0,39}\.[0-9_]{0,39}|\.[0-9][0-9_]{0,39})(?:[eE][-+][0-9]{1,4})?"
)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


class Place(NamedTuple):
    """Where a value was set: a file with line and column from 1, or a variable (line 0)."""

    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


def decoded(content: bytes, source: str) -> str:
    """Return the text of *content*, that of the file *source*, without a byte order mark.

    Raises:
        ConfigurationError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        column = exc.start - exc.object.rfind(b"\n", 0, exc.start)
        raise ConfigurationError([f"{Place(line, column, source)}: not UTF-8"]) from None


class Fault(NamedTuple):
    """One fault. Sorted faults are in the order of the file."""

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}{' ' if self.path else ''}{self.path}: {self.message}"


class _Unreadable(Exception):
    """The rest of the text cannot be read."""


class Document:
    """The values of one text with their places. Its faults are collected, never raised.

    `values` is `FAULTY` if the text cannot be read. `referenced` holds the paths whose values came
    from the environment.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: Any = None
        self.faults: list[Fault] = []
        self.referenced: set[KeyPath] = set()
        self._places: dict[KeyPath, Place] = {(): Place(1, 1, source)}
        self._count = 0
        self._environ: Mapping[str, str] | None = None

    def place(self, path: KeyPath) -> Place:
        """Return the place of *path*, or that of the nearest section around it."""
        while path not in self._places:
            path = path[:-1]
        return self._places[path]

    def written(self, path: KeyPath) -> bool:
        """Return whether the file or a variable sets the value at *path*."""
        return path in self._places

    def fault(self, path: Iterable[Any], message: str, place: Place | None = None) -> Fault:
        """Return a fault of the value at *path*; *place* defaults to the place of its key."""
        path = tuple(path)
        return Fault(place or self.place(path), dotted(path), message)

    def variable(self, path: KeyPath) -> str | None:
        """Return the variable that overrides the value at *path*; None: no variable can."""
        steps = [step for step in path if isinstance(step, str) and _WORD.fullmatch(step)]
        return PREFIX + "__".join(steps).upper() if steps and len(steps) == len(path) else None

    def read(self, text: str, environ: Mapping[str, str] | None) -> None:
        """Set `values` from *text*. With None for *environ*, `${NAME}` is not replaced."""
        self._environ = environ
        try:
            self.values = self._read(text)
        except _Unreadable:
            self.values = FAULTY
        except yaml.YAMLError as exc:
            self.values = FAULTY
            mark = getattr(exc, "problem_mark", None) or getattr(exc, "context_mark", None)
            # PyYAML quotes its own tokens, such as "<block end>", and parts of the text, which may
            # be secret.
            problem = re.sub(r"'(?!<)[^']{2,}'", "…", str(getattr(exc, "problem", "") or ""))
            if "quoted" in (getattr(exc, "context", None) or "") and "stream" in problem:
                # The fault is where the quote begins, and not at the end of the file.
                mark, problem = getattr(exc, "context_mark", mark), "this quote is not closed"
            elif mark and (quote := _quote_over_lines(text, mark)) is not None:
                problem, mark = f"this quote is closed on line {mark.line + 1} only", quote
            place = Place(mark.line + 1, mark.column + 1, self.source) if mark else None
            hint = _layout_hint(text, mark) if mark else ""
            self._refuse((), f"not valid YAML: {problem or 'cannot be parsed'}{hint}", place)

    def override(self, variable: str, value: str) -> None:
        """Set what *variable* names: `AIOSERVER__CHAT__WEBSOCKET__PORT` is chat.websocket.port.

        A value that starts with `[`, `{` or a quote is read as YAML, any other as one scalar.
        """
        place = Place(0, 0, variable)
        node = self.values
        path: KeyPath = ()
        *sections, last = variable.removeprefix(PREFIX).split("__")
        for step in sections:
            key = _matching_key(node, step)
            path = (*path, key)
            if node.get(key) is None:
                node[key] = {}
                self._places[path] = place
            node = node[key]
            if not isinstance(node, dict):
                self._refuse(path, "is not a section, so nothing can be set inside it", place)
                return
        key = _matching_key(node, last)
        path = (*path, key)
        for inner_path in [other for other in self._places if other[: len(path)] == path]:
            del self._places[inner_path]
        self._places[path] = place
        self.referenced.add(path)
        if value[:1] not in {"[", "{", '"', "'"}:
            node[key] = scalar(value)
            return
        inner = Document(variable)
        inner.read(value, None)
        node[key] = inner.values
        self.faults += [Fault(place, dotted(path), fault.message) for fault in inner.faults]

    def _refuse(self, path: KeyPath, message: str, place: Place | None = None) -> None:
        self.faults.append(self.fault(path, message, place))

    def _read(self, text: str) -> Any:
        if (match := _UNPRINTABLE.search(text)) is not None:
            start = text.rfind("\n", 0, match.start()) + 1
            place = Place(text.count("\n", 0, start) + 1, match.start() - start + 1, self.source)
            self._stop((), "a control character, which YAML does not allow", place)
        # The events come in this order: StreamStart, DocumentStart, those of
        # the value, DocumentEnd, StreamEnd.
        events = yaml.parse(text, Loader=LOADER)
        next(events)
        if not isinstance(next(events), yaml.DocumentStartEvent):
            return None
        value = self._value(next(events), (), events)
        next(events)
        if not isinstance(event := next(events), yaml.StreamEndEvent):
            self._refuse((), "a second document in the file", self._place_of(event))
        return value

    def _stop(self, path: KeyPath, message: str, place: Place | None = None) -> None:
        self._refuse(path, message, place)
        raise _Unreadable

    def _place_of(self, event: Any) -> Place:
        return Place(event.start_mark.line + 1, event.start_mark.column + 1, self.source)

    def _value(self, event: Any, path: KeyPath, events: Iterator[Any]) -> Any:
        """Return the value that starts with *event*, or `FAULTY` if it cannot be used."""
        self._count += 1
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            message = "too many values, or nested too deeply"
            self._stop(path[:MAX_DEPTH], message, self._place_of(event))
        if isinstance(event, yaml.AliasEvent):
            message = "aliases are refused (write the value out)"
            self._refuse(path, message, self._place_of(event))
            return FAULTY
        if event.anchor is not None:
            message = "anchors are refused (write the value out)"
            self._refuse(path, message, self._place_of(event))
        if event.tag is not None:
            message = "tags are refused (quotes make it text)"
            self._refuse(path, message, self._place_of(event))
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(path, events)
        else:
            value = self._sequence(path, events)
        return FAULTY if event.tag is not None else value

    def _sequence(self, path: KeyPath, events: Iterator[Any]) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            item_path = (*path, len(values))
            self._places.setdefault(item_path, self._place_of(event))
            values.append(self._value(event, item_path, events))
        return values

    def _mapping(self, path: KeyPath, events: Iterator[Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            place = self._place_of(event)
            if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
                self._refuse(path, "a key must be a plain name", place)
                self._value(event, (*path, "?"), events)
                self._value(next(events), (*path, "?"), events)
                continue
            # The key as it is written: `on` does not become True, nor 1.10 become 1.1.
            key_path = (*path, event.value)
            if event.value in values:
                first = self.place(key_path).line
                self._refuse(key_path, f"this key appears twice (first on line {first})", place)
                self._value(next(events), key_path, events)
                continue
            self._places.setdefault(key_path, place)
            values[event.value] = self._value(next(events), key_path, events)
        return values

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        text, plain, environ = event.value, event.implicit[0], self._environ
        if environ is None or "${" not in text:
            return scalar(text) if plain else text
        self.referenced.add(path)
        faulty = False

        def replacement(match: re.Match[str]) -> str:
            nonlocal faulty
            name, default = match.groups()
            if match[0] == "$${":
                return "${"
            if name is None:
                hint = "write ${NAME} or ${NAME:-default}; $${ stands for ${"
                self._refuse(path, f"${{ without a name ({hint})")
            elif name in environ or default is not None:
                # An empty variable counts as unset, as in the shell.
                return environ.get(name) or default or ""
            else:
                self._refuse(path, f"{name} is not set (set it, or write ${{{name}:-default}})")
            faulty = True
            return ""

        result = _REFERENCE.sub(replacement, text)
        if faulty:
            return FAULTY
        whole = _REFERENCE.fullmatch(text) is not None and not text.startswith("$$")
        return scalar(result) if plain and whole else result


def _quote_over_lines(text: str, mark: Any) -> Any:
    """Return the mark where the quoted text begins that ends in front of *mark*, if that is on an
    earlier line: the quote that begins the next text may have closed it. Otherwise return None.
    """
    last = None
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            if (token.start_mark.line, token.start_mark.column) >= (mark.line, mark.column):
                break
            last = token
    except yaml.YAMLError:
        pass
    if not isinstance(last, yaml.ScalarToken) or last.style not in {"'", '"'}:
        return None
    begins = last.start_mark
    return begins if begins.line < last.end_mark.line == mark.line else None


def _layout_hint(text: str, mark: Any) -> str:
    """Return the probable fault in the layout of the line at *mark*, where YAML gave up."""
    lines = text.splitlines()[mark.line : mark.line + 1]
    line = lines[0] if lines else ""
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent or line[mark.column : mark.column + 1] == "\t":
        return " (a tab: YAML indents with spaces only)"
    if 0 < len(indent) == mark.column or ":" in line[mark.column :]:
        return (
            " (is this line indented as the keys beside it are? a text with a colon needs quotes)"
        )
    return ""


def scalar(text: str) -> Any:
    """Return the value of a scalar without quotes, as in YAML 1.1, but `010` and dates are text.

    Any text for PyYAML is text here as well, so that a value that it has written is read back
    unchanged.
    """
    if text.lower() in _WORDS and text in {text.lower(), text.upper(), text.capitalize()}:
        return _WORDS[text.lower()]
    if _WHOLE.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FRACTION.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def dotted(path: KeyPath) -> str:
    """Return *path* as text. A key that does not look like a name is not shown."""
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step}" if _NAME.fullmatch(step) else ".?"
        for step in path
    ]
    return "".join(steps).removeprefix(".")


def _matching_key(node: Mapping[str, Any], step: str) -> str:
    """Return the key of *node* that *step* means; upper and lower case count as the same."""
    return next((key for key in node if key.casefold() == step.casefold()), step.lower())
