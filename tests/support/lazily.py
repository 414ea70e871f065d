"""Packages that take a second to import, and that few tests use: each process imports all tests."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """Looks like the module of its name, which is imported when a public name of it is asked for.

    Pytest asks all that stands in a module of tests for names such as `_mock_name` and
    `__wrapped__`.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def lazily(name: str) -> ModuleType:
    """Return what stands for the module *name*, which is imported when it is used first."""
    return _Later(name)
