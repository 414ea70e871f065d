"""A bug in one place: the first call that a function makes of another one raises, as a bug in the
callee would.

Nothing is patched: the interpreter tells of each call (sys.settrace), and what the trace function
raises is raised in the callee, before its first statement.
"""

from __future__ import annotations

import dis
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import aioserver

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import CodeType, FrameType

ROOT = Path(aioserver.__file__).parent


class InjectedBugError(Exception):
    """What the callee raises."""


class Function(NamedTuple):
    """A function of the package: its module, without `aioserver.`, and its qualified name
    there.
    """

    module: str
    name: str


class Call(NamedTuple):
    """The call of *callee* by *section*."""

    section: Function
    callee: Function


@cache
def function_of(code: CodeType) -> Function | None:
    """The function of *code*; None if it is none of the package."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return Function(module, code.co_qualname.replace("<locals>.", ""))


@cache
def can_raise(code: CodeType) -> bool:
    """Return whether *code* calls something, or raises: what only stores and reads cannot fail."""
    return any(op.opname.startswith(("CALL", "RAISE")) for op in dis.get_instructions(code))


@cache
def _start(code: CodeType) -> int:
    """Return where *code* begins: a coroutine that goes on after an `await` is no new call."""
    return next(op.offset for op in dis.get_instructions(code) if op.opname == "RESUME")


def _call(frame: FrameType) -> Call | None:
    caller, code = frame.f_back, frame.f_code
    if caller is None or frame.f_lasti > _start(code) or not can_raise(code):
        return None
    section, callee = function_of(caller.f_code), function_of(code)
    return None if section is None or callee is None else Call(section, callee)


def _last(function: Function) -> str:
    """The name of *function* alone, as its code has it."""
    return function.name.rpartition(".")[2]


@contextmanager
def calls_of(sections: Collection[Function]) -> Iterator[dict[Call, None]]:
    """Note each call that one of *sections* makes within the block."""
    calls: dict[Call, None] = {}
    names = {_last(section) for section in sections}

    def trace(frame: FrameType, _event: str, _arg: object) -> None:
        # Of nearly every call the name says that it is none of these.
        if frame.f_back is None or frame.f_back.f_code.co_name not in names:
            return
        call = _call(frame)
        if call is not None and call.section in sections:
            calls[call] = None

    with _traced(trace):
        yield calls


@contextmanager
def calls_into(modules: tuple[str, ...]) -> Iterator[dict[Call, None]]:
    """Note each call within the block of a function of *modules*, of which the first names begin
    so, that comes from elsewhere.
    """
    calls: dict[Call, None] = {}

    def trace(frame: FrameType, _event: str, _arg: object) -> None:
        call = _call(frame)
        if (
            call is not None
            and call.callee.module.startswith(modules)
            and not call.section.module.startswith(modules)
        ):
            calls[call] = None

    with _traced(trace):
        yield calls


@contextmanager
def bug_at(call: Call) -> Iterator[list[Call]]:
    """Let the first *call* within the block raise; yields a list that is empty until then."""
    raised: list[Call] = []
    name = _last(call.callee)

    def trace(frame: FrameType, _event: str, _arg: object) -> None:
        if frame.f_code.co_name == name and not raised and _call(frame) == call:
            raised.append(call)
            raise InjectedBugError(f"{call.callee.module}: {call.callee.name}")

    with _traced(trace):
        yield raised


@contextmanager
def _traced(trace: object) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.settrace(before)
