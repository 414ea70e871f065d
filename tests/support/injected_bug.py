"""A bug in one place: the first call that a function makes of another one raises, as a bug in the
callee would.

Nothing is patched: the interpreter tells of each call (sys.settrace), and what the trace function
raises is raised in the callee, before its first statement.
"""

from __future__ import annotations

import ast
import dis
import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aioserver
from tests.support.package import MODULES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import CodeType, FrameType

ROOT = Path(aioserver.__file__).parent
# The code of what may wait, and goes on later.
SUSPENDS = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


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


@cache
def begins_with_try(function: Function) -> bool:
    """Return whether the first statement of *function* that may raise is a `try`."""
    node: Any = MODULES[function.module]
    for name in function.name.split("."):
        named = (each for each in ast.walk(node) if getattr(each, "name", None) == name)
        node = next(named, ast.Module([], []))
    may_raise = (
        statement
        for statement in node.body
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(isinstance(part, ast.Call | ast.Await | ast.Try) for part in ast.walk(statement))
    )
    return isinstance(next(may_raise, None), ast.Try)


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


@dataclass(slots=True)
class _Running:
    """A function under way: its own *call*, and its *calls* of others. *net* is what is held more
    since it began, as far as it, and what it has called, did that; *takes*: some of it rose.
    """

    function: Function
    call: Call | None
    suspends: bool
    calls: set[Call] = field(default_factory=set)
    net: int = 0
    takes: bool = False


@contextmanager
def calls_of_taking(held: Callable[[], int]) -> Iterator[set[Call]]:
    """Note, once the block has ended, each call in it by a function of the package that takes
    something, itself or by what it calls. *held* says how much is held now.

    Where nothing else could give back, a call is none: that of a function that gives back more
    than it takes, or by one that has done so without a wait; and that of a function which begins
    with a `try`, in which it has what its caller has taken.
    """
    calls: set[Call] = set()
    gives: set[Call | Function | None] = set()
    running: dict[int, _Running] = {}
    level = held()

    def over(each: _Running | None) -> None:
        if each is not None and each.net < 0:
            gives.update({each.call} if each.suspends else {each.call, each.function})
        elif each is not None and each.takes:
            calls.update(each.calls)

    def account(frame: FrameType | None) -> None:
        nonlocal level
        change, level = -level, held()
        change += level
        while change and frame is not None:
            if (each := running.get(id(frame))) is not None:
                each.net += change
                each.takes |= change > 0
            frame = frame.f_back

    def trace(frame: FrameType, _event: str, _arg: object) -> object:
        begins = frame.f_lasti <= _start(frame.f_code)
        if begins:
            # Another one may have been there before.
            over(running.pop(id(frame), None))
        if (function := function_of(frame.f_code)) is None:
            return None
        frame.f_trace_lines = False
        account(frame)
        if begins:
            call = _call(frame)
            suspends = bool(frame.f_code.co_flags & SUSPENDS)
            running[id(frame)] = _Running(function, call, suspends)
            caller = running.get(id(frame.f_back))
            if call is not None and caller is not None:
                caller.calls.add(call)
        return returned

    def returned(frame: FrameType, event: str, _arg: object) -> object:
        if event == "return":
            account(frame)
        return returned

    with _traced(trace):
        yield calls
    for each in running.values():
        over(each)
    for call in list(calls):
        if call in gives or call.section in gives or begins_with_try(call.callee):
            calls.remove(call)


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
