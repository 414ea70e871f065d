"""Every fault of a provider, as a client of Anthropic's API sees it, streamed and whole; nothing
is held afterwards.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faces import over_anthropic
from tests.support.server import HTTP_CLIENT, MakeServer, RunningServer

# Silence soon ends, only where it must: on a busy machine anybody may be silent.
IMPATIENT = {"llm.providers.sim.http_client": {**HTTP_CLIENT, "read_timeout": 0.3}}
# What the simulator says where our key is refused; nothing of it may be shown.
TEXTS_ABOUT_KEYS = (b"Incorrect API key", b"The simulator says")
AUTH, ERROR, LIMITED = "provider_auth_error", "provider_error", "provider_rate_limited"
BAD, CUT, SILENT = "provider_bad_response", "provider_disconnected", "read_timeout"

# The status and the type that a client sees, what is counted, and whether the provider's own words
# pass.
BEFORE: dict[str, tuple[int, str, str, str, bool]] = {
    "fault-status-400": (400, "invalid_request_error", ERROR, "http_4xx", True),
    "fault-status-401": (502, "api_error", AUTH, "http_4xx", False),
    "fault-status-404": (404, "not_found_error", ERROR, "http_4xx", True),
    "fault-status-413": (413, "request_too_large", ERROR, "http_4xx", True),
    "fault-status-500": (500, "api_error", ERROR, "http_5xx", True),
    "fault-status-529": (529, "overloaded_error", ERROR, "http_5xx", True),
    "fault-retry-after-7": (429, "rate_limit_error", LIMITED, "http_429", True),
    "fault-html": (502, "api_error", BAD, "bad_response", False),
    "fault-drop": (502, "api_error", CUT, "disconnected", False),
    "fault-silent": (504, "timeout_error", SILENT, "timeout", False),
}
BEFORE_STREAMED = {
    **BEFORE,
    "fault-head-only": (504, "timeout_error", SILENT, "timeout", False),
    # The pings are no answer, and are held.
    "fault-comments-stall-3": (504, "timeout_error", SILENT, "timeout", False),
}


async def counted(server: RunningServer) -> tuple[Any, Any]:
    """The attempts by outcome, and the requests by face and code."""
    return (
        await server.counted("provider_attempts", "outcome"),
        await server.counted("requests", "face", "code"),
    )


@pytest.mark.parametrize(
    ("model", "stream"),
    [
        *((model, True) for model in BEFORE_STREAMED),
        *((name, False) for name in ("fault-retry-after-7", "fault-html", "fault-silent")),
    ],
)
async def test_a_fault_before_the_first_event_has_its_status_and_its_type(
    model: str, stream: bool, make_server: MakeServer
) -> None:
    status, kind, code, outcome, passes = BEFORE_STREAMED[model]
    server = await make_server(**(IMPATIENT if code == SILENT else {}))

    seen = await over_anthropic(server, model, stream=stream)
    await server.nothing_held()

    assert (seen.status, seen.end, seen.error["type"]) == (status, "error", kind)
    assert seen.code == (None if passes else code)
    assert (b"req_simulated" in seen.raw) == passes
    assert await counted(server) == ({(outcome,): 1}, {("anthropic", code): 1})
    if code == AUTH:
        assert not any(text in seen.raw for text in TEXTS_ABOUT_KEYS)
    if "retry-after" in seen.headers:
        # Who is told when to come back may.
        assert status in {429, 503}
        assert 1 <= int(seen.headers["retry-after"]) <= 7
        assert "x-should-retry" not in seen.headers
    elif status >= 500:
        assert seen.headers["x-should-retry"] == "false"


WITHIN = {
    "fault-stall-3": (SILENT, "timeout_error"),
    "fault-cut-mid-3": (CUT, "api_error"),
    "fault-bad-json-3": (BAD, "api_error"),
    "fault-endless-line": (BAD, "api_error"),
}


@pytest.mark.parametrize("model", WITHIN)
async def test_a_fault_within_the_answer_is_one_error_event(
    model: str, make_server: MakeServer
) -> None:
    code, kind = WITHIN[model]
    server = await make_server(**(IMPATIENT if code == SILENT else {}))
    text = (await over_anthropic(server, "plain")).text

    seen = await over_anthropic(server, model)
    await server.nothing_held()

    assert (seen.status, seen.end) == (200, "error")
    assert (seen.error["type"], seen.code) == (kind, code)
    assert seen.text
    assert text.startswith(seen.text)
    assert b"xxxxxxxx" not in seen.raw
    assert (await server.counted("requests", "code"))[code,] == 1


GOOD = (
    "after-done",
    "open-done",
    "no-done",
    "comments",
    "thinking",
    "1xx",
    "http10",
    "close-next",
    "limits-day",
)


async def test_unusual_but_good_answers_read_the_same(server: RunningServer) -> None:
    text = (await over_anthropic(server, "plain")).text

    for name in GOOD:
        seen = await over_anthropic(server, f"fault-{name}")

        assert (seen.end, seen.text) == ("complete", text), name
    await server.nothing_held()
