"""How what a server does is noted: a method of the package calls somebody else, too."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable


def noted(
    kind: type,
    name: str,
    *,
    before: Callable[..., object] | None = None,
    after: Callable[..., object] | None = None,
) -> AbstractContextManager[object]:
    """Let the method *name* of *kind* call *before* with all that it is called with; and *after*
    with what it returns, and all that, too.
    """
    method = getattr(kind, name)

    def noting(*args: Any, **options: Any) -> Any:
        if before is not None:
            before(*args, **options)
        result = method(*args, **options)
        if after is not None:
            after(result, *args, **options)
        return result

    return mock.patch.object(kind, name, noting)


def together(*patches: AbstractContextManager[object]) -> ExitStack:
    """Return all of *patches* as one."""
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack
