"""Errors as they go from one instance to another, so that a client gets the same one at each."""

from __future__ import annotations

import msgspec

from aioserver import provider_errors
from aioserver.errors import AioserverError, InternalError
from aioserver.provider_errors import ProviderFault, ProviderRefused
from aioserver.telemetry.outcome import Outcome


class Fault(msgspec.Struct, array_like=True):
    """An error: the name of its class, and the attributes that one object sets for itself."""

    kind: str
    message: str
    retry_after: float | None = None
    param: str | None = None
    paid: bool = False
    provider: str = ""
    attempts: int = 0
    provider_headers: dict[str, str] = {}
    status: int = 0
    body: bytes = b""
    # Whether status and body are `ProviderFault.provider_answer`.
    passed: bool = False


_CLASSES = {cls.__name__: cls for cls in provider_errors.subclasses(AioserverError)}


def fault_of(error: AioserverError) -> Fault:
    """Return *error* in the form in which it is sent."""
    fault = Fault(
        type(error).__name__, error.message, error.retry_after, error.param, paid=error.paid
    )
    if isinstance(error, ProviderFault) and (outcome := error.request_outcome) is not None:
        fault.provider, fault.attempts = outcome.provider, outcome.attempts
        fault.provider_headers = dict(outcome.headers)
    if isinstance(error, ProviderRefused):
        fault.status, fault.body = error.provider_status, error.provider_body
    if isinstance(error, ProviderFault) and error.provider_answer is not None:
        fault.status, fault.body = error.provider_answer
        fault.passed = True
    return fault


def error_of(fault: Fault) -> AioserverError:
    """Return the error of *fault*, or an `InternalError` if its class is unknown here."""
    cls = _CLASSES.get(fault.kind)
    if cls is None or not issubclass(cls, AioserverError):
        return InternalError("internal error")
    if issubclass(cls, ProviderRefused):
        # As at the owner, the text of the exception does not quote the provider's reason.
        text = f"{fault.provider or 'a provider'} answered {fault.status}"
        refused = cls(text, fault.status, fault.body)
        refused.message = fault.message
        refused.retry_after, refused.param = fault.retry_after, fault.param
        error: AioserverError = refused
    else:
        error = cls(fault.message, retry_after=fault.retry_after, param=fault.param)
    error.paid = fault.paid
    # The owner has counted the error already.
    error.counted = True
    if isinstance(error, ProviderFault):
        if fault.provider:
            error.request_outcome = Outcome(
                fault.provider, "", fault.attempts, fault.provider_headers
            )
        if fault.passed:
            error.provider_answer = fault.status, fault.body
    return error
