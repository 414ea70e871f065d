"""The fixture of tests of resources and their scheduler."""

from __future__ import annotations

import pytest

from tests.support.resources import World


@pytest.fixture
def world() -> World:
    return World()
