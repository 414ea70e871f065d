"""Writes the tables of `configuration.md` from the declarations of the settings.

python docs/tables.py            write them
python docs/tables.py --check    exit with 1 if they are stale
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.config.schema import fields, required
from aioserver.config.settings import Settings
from aioserver.server.reload import ONLY_BY_RESTART

if TYPE_CHECKING:
    import dataclasses
    from collections.abc import Iterator

PAGE = Path(__file__).with_name("configuration.md")
BEGIN = "<!-- The rest of this page is made by `python docs/tables.py`. -->\n"
HEAD = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n"


def sections(cls: type[Any], path: str = "") -> Iterator[str]:
    """Yield a heading and a table for each section that has settings, outer sections first."""
    rows = []
    inner = []
    for field in fields(cls):
        validator = field.metadata["validator"]
        name = f"{path}.{field.name}".removeprefix(".")
        if validator.inner is None:
            rows.append(row(field, name))
        else:
            inner.append((validator.inner, name + validator.suffix))
    if rows:
        yield f"\n### `{path}`\n\n{inspect.getdoc(cls)}\n\n{HEAD}{''.join(rows)}"
    for inner_cls, inner_path in inner:
        yield from sections(inner_cls, inner_path)


def row(field: dataclasses.Field[Any], name: str) -> str:
    """Return the row of one setting; *name* is its whole path."""
    metadata = field.metadata
    if metadata["default_text"]:
        default = metadata["default_text"]
    elif required(field):
        default = "required"
    else:
        default = f"`{json.dumps(default_of(field))}`"
    by_restart = any(f"{name}.".startswith(f"{restart}.") for restart in ONLY_BY_RESTART)
    meaning = metadata["meaning"] + " (changed only by a restart)" * by_restart
    return f"| `{field.name}` | {metadata['validator'].kind} | {default} | {meaning} |\n"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the value of the key when it is missing."""
    factory: Any = field.default_factory
    return factory() if callable(factory) else field.default


def main(*, check: bool) -> int:
    """Write the tables, or compare them with the page. Returns the exit code."""
    page = PAGE.read_text("utf-8")
    before, marker, after = page.partition(BEGIN)
    if not marker:
        sys.stderr.write(f"{PAGE} has no line {BEGIN}")
        return 1
    tables = "".join(sections(Settings))
    if tables == after:
        return 0
    if check:
        sys.stderr.write("docs/configuration.md is stale: run `python docs/tables.py`\n")
        return 1
    PAGE.write_text(before + marker + tables, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
