"""Writes what is made of the code: the tables of `configuration.md`, `config.schema.json`, the
listing of files in `aioserver/README.md`, and `deploy/alerts.yaml` from the table of findings.

python docs/tables.py            write them
python docs/tables.py --check    exit with 1 if they are stale
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aioserver.config import json_schema
from aioserver.config.schema import fields, ignored_keys, key_of, required, shipped_defaults
from aioserver.config.settings import Settings
from aioserver.config.shipped import SHIPPED
from aioserver.monitoring import findings
from aioserver.server.reload import ONLY_BY_RESTART, TLS

if TYPE_CHECKING:
    import dataclasses
    from collections.abc import Iterator, Mapping

PAGE = Path(__file__).with_name("configuration.md")
PACKAGE = Path(__file__).parents[1] / "aioserver"
MAP = PACKAGE / "README.md"
# What ships with the package; the file of the same name in the repository's root is a link to it.
SCHEMA = SHIPPED.with_name("config.schema.json")
ALERTS = PAGE.parents[1] / "deploy" / "alerts.yaml"
ABOUT_ALERTS = """\
# Prometheus alerting rules for aioserver: `rule_files: [alerts.yaml]` in prometheus.yml, and a job that is named
# "aioserver", as docs/monitoring.md shows. Each rule says what to do; the numbers are where operators usually begin.
# This file is made by `python docs/tables.py`.
"""
BEGIN = "<!-- The rest of this page is made by `python docs/tables.py`. -->\n"
WITHOUT_EFFECT = """
## Settings of the old system without effect

| key | what does its work here |
| --- | --- |
"""
# A line of the map has so many columns of text at most.
MAX_MEANING = 64
# What ends a sentence, or a part of one.
PART_END = re.compile(r"[.;:,](?=\s)")
HEAD = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n"


def sections(cls: type[Any], path: str = "") -> Iterator[str]:
    """Yield a heading and a table for each section that has settings, outer sections first."""
    rows = []
    inner = []
    shipped = shipped_defaults(cls)
    for field in fields(cls):
        validator = field.metadata["validator"]
        name = f"{path}.{key_of(field)}".removeprefix(".")
        if validator.inner is None:
            rows.append(row(field, name, shipped))
        else:
            inner.append((validator.inner, name + validator.suffix))
    if rows:
        yield f"\n### `{path}`\n\n{inspect.getdoc(cls)}\n\n{HEAD}{''.join(rows)}"
    for inner_cls, inner_path in inner:
        yield from sections(inner_cls, inner_path)


def without_effect(cls: type[Any], path: str = "") -> Iterator[str]:
    """Yield a row for each key that is accepted and dropped, with what does its work."""
    for key, instead in ignored_keys(cls).items():
        yield f"| `{f'{path}.{key}'.removeprefix('.')}` | {instead} |\n"
    for field in fields(cls):
        if (inner := field.metadata["validator"].inner) is not None:
            yield from without_effect(inner, f"{path}.{key_of(field)}".removeprefix("."))


def row(field: dataclasses.Field[Any], name: str, shipped: Mapping[str, Any]) -> str:
    """Return the row of one setting; *name* is its whole path, and *shipped* has the defaults that
    are in the shipped file.
    """
    metadata = field.metadata
    if metadata["default_text"]:
        default = metadata["default_text"]
    elif key_of(field) in shipped:
        default = f"`{json.dumps(shipped[key_of(field)])}`"
    elif required(field):
        default = "required"
    else:
        default = f"`{json.dumps(default_of(field))}`"
    by_restart = any(
        f"{name}.".startswith(f"{restart}.") for restart in ONLY_BY_RESTART if restart != TLS
    )
    meaning = metadata["meaning"] + " (changed only by a restart)" * by_restart
    return f"| `{key_of(field)}` | {metadata['validator'].kind} | {default} | {meaning} |\n"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the value of the key when it is missing."""
    factory: Any = field.default_factory
    return factory() if callable(factory) else field.default


def meaning(file: Path) -> str:
    """Return the first sentence of the docstring of *file*, without its last parts if a line has no
    room for them.
    """
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split()) + " "
    parts = []
    for match in PART_END.finditer(first):
        before = first[: match.start()]
        if before.count("(") == before.count(")") and before.count("`") % 2 == 0:
            parts.append(before)
            if match[0] == ".":
                break
    fitting = (part for part in reversed(parts) if len(part) <= MAX_MEANING)
    return next(fitting, parts[0])


def listing(folder: Path, depth: int = 0) -> Iterator[str]:
    """Yield a line for each module in *folder*, and for each folder in it with its modules."""
    indent = "  " * depth
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and (glossary := path / "__init__.py").exists():
            yield f"{f'{indent}{path.name}/':<24}{meaning(glossary)}\n"
            yield from listing(path, depth + 1)
        elif path.suffix == ".py" and (path.name != "__init__.py" or folder == PACKAGE):
            yield f"{f'{indent}{path.name}':<24}{meaning(path)}\n"


def main(*, check: bool) -> int:
    """Write the tables, or compare them with the page. Returns the exit code."""
    before, marker, _ = PAGE.read_text("utf-8").partition(BEGIN)
    if not marker:
        sys.stderr.write(f"{PAGE} has no line {BEGIN}")
        return 1
    introduction, fence, _ = MAP.read_text("utf-8").partition("```\n")
    ignored = "".join((WITHOUT_EFFECT, *without_effect(Settings)))
    alerts = {"groups": [{"name": "aioserver", "rules": [*findings.rules()]}]}
    made = {
        PAGE: before + marker + "".join(sections(Settings)) + ignored,
        SCHEMA: json_schema.text(),
        ALERTS: ABOUT_ALERTS + yaml.safe_dump(alerts, sort_keys=False, width=1 << 16),
        MAP: introduction + fence + "".join(listing(PACKAGE)) + fence,
    }
    stale = [
        path for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text
    ]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.name} is stale: run `python docs/tables.py`\n")
        else:
            path.write_text(made[path], "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
