"""Error codes, tests and links that the pages in docs/ name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioserver import errors, provider_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ERROR_PAGE = (ROOT / "docs/errors.md").read_text()
PROMISES = (ROOT / "docs/threat-model.md").read_text()


def every_error(cls: type[errors.AioserverError]) -> Iterator[type[errors.AioserverError]]:
    """The classes below *cls*."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from every_error(subclass)


def table(page: str, title: str) -> list[list[str]]:
    """The rows of the first table below *title*, without its head."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [re.split(r"\s*\|\s*", row[1:-1].strip(" ")) for row in rows[2:]]


CODES = {row[0].strip("` "): row for row in table(ERROR_PAGE, "Error codes")}


ERRORS = [*every_error(errors.AioserverError)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_explained_with_its_status_and_close_code(
    error: type[errors.AioserverError],
) -> None:
    if error is provider_errors.ProviderFault:
        return  # what they have in common: nobody raises it

    row = CODES[error.code]

    if not issubclass(error, provider_errors.ProviderRefused):  # whose status is the provider's
        assert str(error.status) in row[1]
        assert ("retry" in row[3]) == error.retryable, row[3]
    if error.close is not None:
        assert f"({error.close})" in row[1]


def test_the_table_of_codes_has_a_row_for_each_and_its_cells() -> None:
    rows = table(ERROR_PAGE, "Error codes")

    assert len(CODES) == len(rows) > 30
    assert {len(row) for row in rows} == {5}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {slug(title) for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_the_page_names_exists(page: Path) -> None:
    files = re.findall(r"`(tests/[\w/.]+)`", page.read_text())

    assert [name for name in files if not (ROOT / name).exists()] == []


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_no_promise_is_without_tests_that_exist() -> None:
    promises = [line for line in PROMISES.splitlines() if re.match(r"\| [A-Z]\d+ \|", line)]

    assert len(promises) > 15
    for line in promises:
        held_by = re.findall(r"`([^`]+)`", line.rpartition(" | ")[2])
        assert held_by, line
        assert all((ROOT / "tests" / name).exists() for name in held_by), line
