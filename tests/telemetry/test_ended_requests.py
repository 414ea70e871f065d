"""What is kept of requests that have ended: how much, and of whom."""

from __future__ import annotations

import json
from datetime import datetime
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from aioserver.telemetry.ended_requests import MAX_KEPT, MAX_NAME, EndedRequests
from aioserver.telemetry.request_log import RequestRecord

if TYPE_CHECKING:
    from aioserver.telemetry.ended_requests import End


def described(end: End[RequestRecord]) -> dict[str, Any]:
    record, _now, _code, _outcome, status = end
    return {"request_id": record.request_id, "face": record.face, "status": status}


def opened() -> EndedRequests[RequestRecord]:
    return EndedRequests(described)


def keep(
    ended: EndedRequests[RequestRecord],
    caller: str,
    request_id: str,
    face: str = "",
    status: int = 200,
) -> None:
    record = RequestRecord(request_id=request_id, face=face)
    ended.keep(caller, request_id, (record, monotonic(), "", "ok", status))


def test_a_busy_caller_pushes_out_its_own_requests_and_not_those_of_others() -> None:
    ended = opened()
    keep(ended, "quiet", "only")
    for number in range(5 * MAX_KEPT):
        keep(ended, "busy", f"b{number}")
        keep(ended, f"other-{number % 3}", f"o{number}") if number % 50 == 0 else None
        assert len(ended) <= MAX_KEPT

    assert ended.find("quiet", "only") is not None
    assert all(ended.find(f"other-{n % 3}", f"o{n}") for n in range(0, 5 * MAX_KEPT, 50))
    assert ended.find("busy", "b0") is None
    assert ended.find("busy", f"b{5 * MAX_KEPT - 1}") is not None


def test_one_id_of_two_callers_is_two_requests_and_an_admin_gets_the_later_one() -> None:
    ended = opened()
    keep(ended, "a", "r1", face="sse")
    keep(ended, "b", "r1", face="openai")
    shared = [json.loads(ended.find(name, "r1") or b"") for name in ("a", "b")]

    assert [fields["face"] for fields in shared] == ["sse", "openai"]
    assert ended.find("c", "r1") is None
    assert ended.find(None, "r1") in {ended.find(name, "r1") for name in ("a", "b")}
    assert ended.find(None, "r2") is None


def test_the_later_request_of_an_id_replaces_the_earlier_one() -> None:
    ended = opened()
    keep(ended, "a", "r1", status=503)
    keep(ended, "a", "r1", status=200)

    assert len(ended) == 1
    assert json.loads(ended.find("a", "r1") or b"")["status"] == 200


def test_a_long_id_is_found_by_the_part_of_it_that_the_log_has() -> None:
    ended = opened()
    keep(ended, "a", "x" * MAX_NAME)

    assert ended.find("a", "x" * 256) is not None


def test_callers_of_one_request_each_make_room_for_another() -> None:
    ended = opened()
    for number in range(2 * MAX_KEPT):
        keep(ended, f"c{number}", "r1")
        assert len(ended) <= MAX_KEPT

    assert ended.find(f"c{2 * MAX_KEPT - 1}", "r1") is not None
    assert ended.find("c0", "r1") is None


def test_the_moment_of_a_request_is_that_of_its_end() -> None:
    ended = opened()
    record = RequestRecord()
    ended.keep("a", "r1", (record, monotonic() - 3600, "", "ok", 200))

    kept = json.loads(ended.find("a", "r1") or b"")
    assert abs(datetime.fromisoformat(kept["ts"]).timestamp() - (time() - 3600)) < 60
