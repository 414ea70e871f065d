"""Bugs: where they are, without a word of what they were about, and how many places are told
apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aioserver.telemetry.bugs import ELSEWHERE, MAX_PLACES, Bugs
from aioserver.tracebacks import last_line

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "S3CR3T"


def look_up(text: str) -> Any:
    texts: dict[str, str] = {}
    return texts[text]


def attribute(text: str) -> Any:
    return getattr(object(), text)


def convert(text: str) -> Any:
    return int(text)


def grouped(text: str) -> Any:
    faults: list[Exception] = []
    try:
        look_up(text)
    except KeyError as exc:
        faults.append(exc)
    raise ExceptionGroup(text, faults)


def raised_by(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as exc:  # noqa: BLE001 - it is the result
        return exc
    raise AssertionError("it raised nothing")


@pytest.mark.parametrize(
    ("function", "name", "where"),
    [
        (look_up, "KeyError", "look_up"),
        (attribute, "AttributeError", "attribute"),
        (convert, "ValueError", "convert"),
        (grouped, "KeyError", "look_up"),
    ],
)
def test_the_last_line_says_what_and_where_and_nothing_of_the_message(
    function: Callable[[str], object], name: str, where: str
) -> None:
    bug = raised_by(lambda: function(SECRET))

    line = last_line(bug)

    begin, _, place = line.partition(" at telemetry/test_bugs.py:")
    number, _, rest = place.partition(" in ")
    assert (begin, rest) == (name, where)
    assert number.isdecimal()
    assert SECRET not in line
    assert SECRET in str(bug)


def test_an_exception_that_was_never_raised_is_reported_by_its_type() -> None:
    assert last_line(TimeoutError(SECRET)) == "TimeoutError"


def test_bugs_are_told_apart_by_place_up_to_a_limit() -> None:
    bugs = Bugs()
    same = raised_by(lambda: look_up(SECRET))
    kinds = [type(f"Fault{number}", (Exception,), {}) for number in range(MAX_PLACES + 5)]

    for bug in (same, same, *(kind() for kind in kinds)):
        bugs.note(bug)

    assert bugs.value == sum(bugs.places.values()) == MAX_PLACES + 7
    assert bugs.places[last_line(same)] == 2
    assert len(bugs.places) == MAX_PLACES + 1
    assert bugs.places[ELSEWHERE] == 6
