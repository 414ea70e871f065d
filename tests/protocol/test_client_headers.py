"""Which headers of a client go on to the provider: a valid trace, and those that are named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from aioserver.protocol.request_headers import (
    MAX_TRACESTATE,
    NEVER_PASSED,
    NO_HEADERS,
    TRACE_HEADERS,
    ClientHeaders,
    collect,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def passed(*headers: tuple[str, str], names: frozenset[str] = frozenset()) -> list[bytes]:
    """The lines that go on, where a provider is passed everything that was collected."""
    collected = collect(CIMultiDict(headers), names)
    return collected.written(names | TRACE_HEADERS).splitlines()


# The trace.


def test_a_trace_goes_on_as_it_came() -> None:
    state = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
    headers = CIMultiDict([("TraceParent", PARENT), ("TraceState", state)])

    collected = collect(headers)

    assert collected.trace_id == TRACE
    assert collected.written(TRACE_HEADERS) == (
        f"traceparent: {PARENT}\r\ntracestate: {state}\r\n".encode()
    )


@pytest.mark.parametrize(
    "parent",
    [
        *("", "x", PARENT[:-1], f"{PARENT}0", f"{PARENT}-", f"{PARENT}-00", PARENT.upper()),
        PARENT.replace("00-", "ff-", 1),
        PARENT.replace(TRACE, "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT.replace("-", "_"),
        PARENT.replace("4", "g", 1),
        PARENT.replace("4", "\u0664", 1),  # a digit, but none of ours
        f"01{PARENT[2:]}00",
        f"01{PARENT[2:]}-\x7f",
        f"01{PARENT[2:]}-\udcff",
        f"01{PARENT[2:]}-" + "x" * 256,
        f"{PARENT},{PARENT}",
    ],
)
def test_an_invalid_trace_does_not_go_on_nor_its_state(parent: str) -> None:
    assert passed(("traceparent", parent), ("tracestate", "a=b")) == []
    assert collect(CIMultiDict([("traceparent", parent)])).trace_id == ""


@pytest.mark.parametrize("parent", [f"01{PARENT[2:]}", f"cc{PARENT[2:]}-what the future brings"])
def test_a_trace_of_a_later_version_goes_on(parent: str) -> None:
    assert passed(("traceparent", parent)) == [f"traceparent: {parent}".encode()]


def test_two_traces_are_none() -> None:
    assert passed(("traceparent", PARENT), ("traceparent", PARENT)) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a=1", "b=2"], "a=1,b=2"),
        ([" a=1 ,, b=2\t", ""], "a=1,b=2"),
        (["tenant@vendor=x", "0a/_-*=~!"], "tenant@vendor=x,0a/_-*=~!"),
        ([",".join(f"k{n}=v" for n in range(32))], ",".join(f"k{n}=v" for n in range(32))),
    ],
)
def test_the_states_of_a_trace_are_one(values: list[str], expected: str) -> None:
    lines = passed(("traceparent", PARENT), *(("tracestate", value) for value in values))

    assert lines[1:] == [f"tracestate: {expected}".encode()]


@pytest.mark.parametrize(
    "state",
    [
        *("", " ", "a", "=b", "a=", "A=b", "a b=c", "a=b=c", "a=b,a=c", "a=\x7f", "\xe4=b"),
        *(",".join(f"k{n}=v" for n in range(33)), "a=" + "b" * 257, "a" * 257 + "=b", "a=\udc80"),
    ],
)
def test_an_invalid_state_does_not_go_on_and_its_trace_does(state: str) -> None:
    lines = passed(("traceparent", PARENT), ("tracestate", state))

    assert lines == [f"traceparent: {PARENT}".encode()]


def test_a_long_state_loses_whole_members_from_its_end() -> None:
    members = [f"k{number}={'v' * 100}" for number in range(9)]

    _, line = passed(("traceparent", PARENT), ("tracestate", ",".join(members)))

    state = line.removeprefix(b"tracestate: ").decode()
    assert len(state) <= MAX_TRACESTATE
    assert state.split(",") == members[: len(state.split(","))]
    assert len(state) + 105 > MAX_TRACESTATE


# The headers that are named.


def test_only_the_named_headers_go_on_each_as_often_as_it_came() -> None:
    headers = [("X-Tenant", "t1"), ("x-other", "o"), ("x-tenant", "t2"), ("Cookie", "c")]

    assert passed(*headers, names=frozenset({"x-tenant"})) == [b"x-tenant: t1", b"x-tenant: t2"]
    assert passed(*headers) == []
    assert collect(CIMultiDict(headers)) is NO_HEADERS


def test_a_provider_is_passed_the_headers_that_it_names() -> None:
    collected = collect(CIMultiDict([("a", "1"), ("b", "2")]), {"a", "b"})

    assert collected.written({"b", "c"}) == b"b: 2\r\n"
    assert collected.written(()) == b""


@pytest.mark.parametrize(
    "name",
    # By name as well: some of them must not go, whatever the set says.
    sorted(
        {"authorization", "x-api-key", "api-key", "cookie", "sec-websocket-protocol"}
        | {"connection", "transfer-encoding", "upgrade", "host", "content-length", "expect"}
        | NEVER_PASSED
    ),
)
def test_some_headers_go_on_by_no_name(name: str) -> None:
    assert passed((name, "x"), names=frozenset({name})) == []


def test_a_header_of_one_connection_does_not_go_on() -> None:
    headers = [("Connection", "close, X-Hop"), ("x-hop", "1"), ("x-end", "2")]

    assert passed(*headers, names=frozenset({"x-hop", "x-end"})) == [b"x-end: 2"]


@pytest.mark.parametrize(
    "value", ["a\r\nHost: evil", "a\nb", "a\rb", "a\0b", "\x01", "\x7f", "\ud800"]
)
def test_a_value_that_could_end_its_line_does_not_go_on(value: str) -> None:
    assert passed(("x", value), names=frozenset({"x"})) == []


def test_a_value_that_is_not_ascii_goes_on_byte_for_byte() -> None:
    for value in ("caf\xe9".encode("latin-1"), "日本".encode(), b"\xff\xfe", b"a\tb"):
        text = value.decode("utf-8", "surrogateescape")
        assert passed(("x", text), names=frozenset({"x"})) == [b"x: " + value]


@given(st.lists(st.tuples(st.sampled_from(["x", "traceparent", "tracestate"]), st.text())))
def test_whatever_comes_each_line_is_one(headers: list[tuple[str, str]]) -> None:
    names = {"x"}
    written = collect(CIMultiDict(headers), names).written(names | TRACE_HEADERS)

    lines = written.split(b"\r\n")
    assert lines.pop() == b""
    for line in lines:
        assert line.partition(b": ")[0] in {b"x", b"traceparent", b"tracestate"}
        assert b"\n" not in line
        assert b"\r" not in line


def test_no_headers_are_falsy() -> None:
    assert not NO_HEADERS
    assert ClientHeaders([("x", b"")])
