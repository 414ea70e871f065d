"""An error as it goes from one instance to another."""

from __future__ import annotations

import pytest

from aioserver import provider_errors
from aioserver.errors import AioserverError, InternalError
from aioserver.provider_errors import ProviderFault, ProviderRefused
from aioserver.telemetry.outcome import Outcome
from aioserver.wings.cluster.answers.faults import error_of, fault_of

CLASSES = sorted(set(provider_errors.subclasses(AioserverError)), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("passed", [None, (422, b'{"error":{}}')])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_looks_the_same_at_another_instance(
    cls: type[AioserverError], passed: tuple[int, bytes] | None
) -> None:
    if issubclass(cls, ProviderRefused):
        error: AioserverError = cls("why", 422, b'{"error":{}}', "theirs")
    else:
        error = cls("why", retry_after=2.5, param="model")
    error.paid = True
    if isinstance(error, ProviderFault):
        error.request_outcome = Outcome("p", "m", 3, {"x-ratelimit": "1"})
        error.provider_answer = passed

    other = error_of(fault_of(error))

    assert type(other) is cls
    assert "theirs" not in str(other)
    assert other.body() == error.body()
    assert (other.headers(), other.as_chunk()) == (error.headers(), error.as_chunk())
    assert other.http_status == error.http_status
    assert other.provider_answer == error.provider_answer


def test_an_error_that_is_unknown_here_is_an_internal_one() -> None:
    fault = fault_of(InternalError("x"))
    fault.kind = "SystemExit"

    assert type(error_of(fault)) is InternalError
