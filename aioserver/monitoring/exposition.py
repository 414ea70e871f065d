"""Prometheus text: the metrics of `/metrics`, one after the other
(https://prometheus.io/docs/instrumenting/exposition_formats/).

Of the package prometheus-client a server would use these lines alone, and hold an HTTP server, a
WSGI server and a registry for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Names are plain; labels and texts may hold anything.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metric:
    """One metric: its *kind* is `counter`, `gauge` or `histogram`, and *about* its help text.

    Always: a sample stands in `text` as soon as it is added, with its *labels* in the order of
    their names.
    """

    __slots__ = ("_lines", "_name", "_order")

    def __init__(self, name: str, kind: str, about: str, labels: Sequence[str] = ()) -> None:
        self._name = name = name + "_total" if kind == "counter" else name
        about = about.replace("\\", r"\\").replace("\n", r"\n")
        self._lines = [f"# HELP {name} {about}\n# TYPE {name} {kind}\n"]
        # The labels by their names, each with its place among the values of a sample.
        self._order = sorted((label, place) for place, label in enumerate(labels))

    def add(self, values: Sequence[str], number: float) -> None:
        """Add the sample whose labels have these *values*."""
        self._line("", self._labels(values), number)

    def add_histogram(
        self, values: Sequence[str], buckets: Iterable[tuple[str, int]], total: float
    ) -> None:
        """Add a histogram. *buckets*: each bound, and how many are not above it; the last one
        counts all, whose sum is *total*.
        """
        labels, count = self._labels(values), 0
        for bound, count in buckets:
            self._line("_bucket", sorted([*labels, f'le="{bound}"']), count)
        self._line("_count", labels, count)
        self._line("_sum", labels, total)

    def text(self) -> str:
        """Return the lines of the metric."""
        return "".join(self._lines)

    def _labels(self, values: Sequence[str]) -> list[str]:
        return [f'{label}="{_escaped(values[place])}"' for label, place in self._order]

    def _line(self, suffix: str, labels: Sequence[str], number: float) -> None:
        written = f"{{{','.join(labels)}}}" if labels else ""
        self._lines.append(f"{self._name}{suffix}{written} {float(number)!r}\n")


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
