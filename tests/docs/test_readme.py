"""The shipped configuration is the packaged one; the tests that pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))


def test_the_packaged_configuration_is_the_shipped_one() -> None:
    assert (ROOT / "config.yaml").read_bytes() == (ROOT / "aioserver/config.yaml").read_bytes()


@pytest.mark.parametrize("page", ["concurrency", "threat-model"])
def test_every_test_that_the_page_names_exists(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    names = re.findall(r"`(test_\w+)`", text)

    missing = [name for name in names if f"def {name}(" not in TESTS]

    assert len(names) > 30
    assert missing == []
