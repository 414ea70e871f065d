"""The file of client keys that `auth.keys_file` names: how it is read, and how one entry of it is
added or taken out.

It is a list of entries as in `auth.keys`, with `sha256` only. A change touches only the lines of
one entry; all other bytes stay, comments included. A change is made in the text and read back. If
the result is not exactly the intended one, the change is refused, so that no layout written by
hand can be damaged.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import voluptuous as vol
import yaml

from aioserver.config import schema
from aioserver.config.credentials import key_fault
from aioserver.config.document import LOADER, Document, Fault, decoded
from aioserver.config.faults import ConfigurationError
from aioserver.config.schema import FAULTY
from aioserver.config.settings import ClientKey
from aioserver.config.validators import list_of
from aioserver.files.reading import MAX_FILE_BYTES, UnreadableFile, read_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

BY_HAND = "its layout is not one that a command can change: write each entry as `- {name: …}`"
# The byte order mark of UTF-8, with which some editors begin a file.
BOM = b"\xef\xbb\xbf"
_ENTRIES = list_of(schema.section(ClientKey))


class _Lines(NamedTuple):
    """The lines of one entry, from 0; *end* is the first line after it."""

    begin: int
    end: int


def read(path: Path, others: Iterable[ClientKey] = ()) -> tuple[ClientKey, ...]:
    """Return the keys in the file *path*. *others* are the keys of the configuration.

    Raises:
        ConfigurationError: the file cannot be read, or an entry cannot be used, for example
            because it has the name or the key of another.
    """
    try:
        content = read_file(path, f"no such file (`aioserver key NAME --add {path}` makes it)")
    except UnreadableFile as exc:
        raise ConfigurationError([f"{path}: {exc}"]) from None
    return parse(content, str(path), others)


def parse(content: bytes, source: str, others: Iterable[ClientKey] = ()) -> tuple[ClientKey, ...]:
    """Return the keys in *content*, that of the file *source*.

    Raises:
        ConfigurationError: as `read`.
    """
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError([f"{source}: larger than {MAX_FILE_BYTES} bytes"])
    document = Document(source)
    document.read(decoded(content, source), None)
    keys: tuple[ClientKey, ...] = ()
    if isinstance(document.values, dict):
        message = (
            "expected a list of keys (is this a configuration? Keys have a file of their own)"
        )
        document.faults.append(document.fault((), message))
    elif document.values is None:
        # An editor may be about to write it, so an empty file does not revoke every key.
        document.faults.append(document.fault((), "is empty (without any key it says `[]`)"))
    elif document.values is not FAULTY:
        keys = _keys(document, others)
    if document.faults:
        raise ConfigurationError([str(fault) for fault in sorted(document.faults)])
    return keys


def _keys(document: Document, others: Iterable[ClientKey]) -> tuple[ClientKey, ...]:
    """Return the usable entries of *document*, and add a fault to it for each other one."""
    try:
        entries = _ENTRIES(document.values)
    except vol.MultipleInvalid as exc:
        document.faults += [
            document.fault(error.path, str(error.error_message)) for error in exc.errors
        ]
        return ()
    except vol.Invalid as exc:
        document.faults.append(document.fault((), str(exc.error_message)))
        return ()
    names = {key.name: "auth.keys" for key in others}
    digests = {key.sha256: key.name for key in others}
    keys = []
    for index, entry in enumerate(entries):
        digest = entry.sha256.lower() if entry.sha256 is not None else None
        document.faults += _faults(document, index, entry, digest, names, digests)
        names.setdefault(entry.name, "this file")
        digests.setdefault(digest, entry.name)
        keys.append(replace(entry, sha256=digest))
    return tuple(keys)


def _faults(
    document: Document,
    index: int,
    entry: ClientKey,
    digest: str | None,
    names: dict[str, str],
    digests: dict[str | None, str],
) -> Iterator[Fault]:
    """Yield why *entry* cannot be used beside entries with these names and hashes."""
    if digest is None or entry.key_env is not None or entry.key_file is not None:
        yield document.fault((index,), "a key in this file has sha256, and no key_env or key_file")
    elif (fault := key_fault(digest, digests)) is not None:
        yield document.fault((index,), fault)
    if entry.name in names:
        yield document.fault(
            (index, "name"), f"another key in {names[entry.name]} is named {entry.name} as well"
        )


def with_entry(content: bytes, entry: str, source: str) -> bytes:
    """Return *content* with the line *entry*, `{name: …}`, as one more entry at its end.

    Raises:
        ConfigurationError: the content has a fault, or its layout cannot be changed.
    """
    before = () if _unwritten(content) else parse(content, source)
    text = content.decode("utf-8-sig")
    mark = content[: len(content) - len(text.encode())]
    newline = "\r\n" if "\r\n" in text else "\n"
    if before or _unwritten(content):
        column = _entries(text, len(before), source)[0] if before else 0
        ended = text if text.endswith("\n") or not text else text + newline
        text = f"{ended}{' ' * column}- {entry}{newline}"
    else:
        begin, end = _empty_list(text)
        text = f"{text[:begin]}- {entry}{text[end:]}"
    changed = mark + text.encode()
    _check(changed, [*before, *parse(f"- {entry}".encode(), source)], source)
    return changed


def without_entry(content: bytes, name: str, source: str) -> bytes:
    """Return *content* without the lines of the entry of *name*, which exists.

    Raises:
        ConfigurationError: the content has a fault, or its layout cannot be changed.
    """
    before = parse(content, source)
    index = [key.name for key in before].index(name)
    text = content.decode("utf-8-sig")
    mark = content[: len(content) - len(text.encode())]
    column, entries = _entries(text, len(before), source)
    lines = text.splitlines(keepends=True)
    begin, end = entries[index]
    newline = "\r\n" if lines[begin].endswith("\r\n") else "\n"
    left = [] if len(before) > 1 else [f"{' ' * column}[]{newline}"]
    changed = mark + "".join([*lines[:begin], *left, *lines[end:]]).encode()
    _check(changed, [*before[:index], *before[index + 1 :]], source)
    return changed


def names(content: bytes, source: str) -> list[str]:
    """Return the names of the keys in *content*, which may have no entry yet.

    Raises:
        ConfigurationError: the content has a fault.
    """
    return [] if _unwritten(content) else [key.name for key in parse(content, source)]


def _unwritten(content: bytes) -> bool:
    """Return whether *content* has nothing but comments."""
    lines = content.removeprefix(BOM).splitlines()
    return all(not line.strip() or line.strip().startswith(b"#") for line in lines)


def _entries(text: str, number: int, source: str) -> tuple[int, list[_Lines]]:
    """Return the column at which the entries of a list of *number* begin, and the lines of each.

    Raises:
        ConfigurationError: they have no lines of their own.
    """
    column, begins, ends = -1, list[int](), list[int]()
    for token in yaml.scan(text, Loader=LOADER):
        if isinstance(token, yaml.BlockEntryToken) and column in {-1, token.start_mark.column}:
            column = token.start_mark.column
            begins.append(token.start_mark.line)
            ends.append(token.start_mark.line + 1)
        elif begins and isinstance(token, yaml.ScalarToken | yaml.FlowMappingEndToken):
            mark = token.end_mark
            ends[-1] = mark.line + (mark.column > 0)
    entries = [_Lines(*lines) for lines in zip(begins, ends, strict=True)]
    apart = all(one.end <= other.begin for one, other in itertools.pairwise(entries))
    if len(entries) != number or not apart:
        raise ConfigurationError([f"{source}: {BY_HAND}"])
    return column, entries


def _empty_list(text: str) -> tuple[int, int]:
    """Return where `[]` begins and ends in *text*, which has nothing else but comments."""
    tokens = yaml.scan(text, Loader=LOADER)
    token = next(token for token in tokens if isinstance(token, yaml.FlowSequenceStartToken))
    begin = token.start_mark.index
    return begin, text.index("]", begin) + 1


def _check(changed: bytes, keys: list[ClientKey], source: str) -> None:
    """Check that *changed* has exactly *keys*.

    Raises:
        ConfigurationError: the keys differ.
    """
    try:
        if list(parse(changed, source)) == keys:
            return
    except ConfigurationError:
        pass
    raise ConfigurationError([f"{source}: {BY_HAND}"])


def entry_of(key: ClientKey) -> str:
    """Return *key* as an entry in one line: its name and hash, and the values that differ from the
    defaults.
    """
    parts: list[tuple[str, Any]] = [("name", f'"{key.name}"'), ("sha256", f'"{key.sha256}"')]
    for field in schema.fields(ClientKey):
        value = getattr(key, field.name)
        if field.name not in {"name", "sha256"} and value != field.default:
            # A word stands without quotes, as is usual.
            plain = isinstance(value, str) and value.isalpha()
            parts.append((schema.key_of(field), value if plain else json.dumps(value)))
    return f"{{{', '.join(f'{name}: {value}' for name, value in parts)}}}"
