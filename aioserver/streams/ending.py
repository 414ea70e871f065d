"""Endings that others wait for: each step is done, even if another raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def run_all(steps: Iterable[Callable[[], object]]) -> None:
    """Call each of *steps*, then raise the first exception that one of them has raised.

    A `finally` or a done callback with several steps uses this: otherwise a bug in the first step
    would keep readers waiting, or places taken, for ever.
    """
    fault: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is raised below
            fault = fault or exc
    if fault is not None:
        raise fault
