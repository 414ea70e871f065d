"""The trees in the docstrings of errors.py and provider_errors.py are those of the classes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aioserver import errors, provider_errors
from aioserver.errors import AioserverError, InternalError
from aioserver.provider_errors import ProviderFault

if TYPE_CHECKING:
    from types import ModuleType

# Indentation, class name, and what the class states.
NODE = re.compile(r"^( {4,})([A-Z]\w+)(.*)$", re.MULTILINE)

Tree = list[tuple[int, str, list[str]]]


def drawn(module: ModuleType) -> Tree:
    return [
        (len(indent) // 4 - 1, name, statement.split())
        for indent, name, statement in NODE.findall(module.__doc__ or "")
    ]


def built(cls: type[AioserverError], depth: int = 0) -> Tree:
    tree = [(depth, cls.__name__, statement(cls))]
    for child in cls.__subclasses__():
        if child.__module__ == cls.__module__:
            tree += built(child, depth + 1)
    return tree


def statement(cls: type[AioserverError]) -> list[str]:
    if cls.code == InternalError.code and cls is not InternalError:
        return []  # never raised itself
    words = [str(cls.status), cls.code]
    if cls.close is not None:
        words.append(str(cls.close))
    if issubclass(cls, ProviderFault):
        words += ["once" if cls.once else "retry"] if cls.retry else []
        words += ["failover"] if cls.failover else []
        words += ["breaker"] if cls.breaker_failure else []
    return words


def test_tree_of_errors_is_drawn_in_their_order() -> None:
    *tree, last = drawn(errors)

    assert last[:2] == (1, "ProviderFault")
    assert tree == [node for node in built(AioserverError) if node[1] != "ProviderFault"]


def test_tree_of_provider_errors_is_drawn_in_their_order() -> None:
    assert drawn(provider_errors) == built(ProviderFault)
