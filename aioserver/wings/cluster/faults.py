"""Errors on their way between instances: an error at the owner looks the same to a client
elsewhere.
"""

from __future__ import annotations

from aioserver import provider_errors
from aioserver.errors import AioserverError, InternalError
from aioserver.provider_errors import ProviderFault, ProviderRefused
from aioserver.telemetry.outcome import Outcome
from aioserver.wings.cluster.peer_messages import Fault

_CLASSES = {cls.__name__: cls for cls in provider_errors.subclasses(AioserverError)}


def pack(error: AioserverError) -> Fault:
    """Return *error* as a part of a message."""
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


def unpack(fault: Fault) -> AioserverError:
    """Return the error of which *fault* was made.

    An `InternalError` if its class is unknown here.
    """
    cls = _CLASSES.get(fault.kind)
    if cls is None or not issubclass(cls, AioserverError):
        return InternalError("internal error")
    if issubclass(cls, ProviderRefused):
        refused = cls(fault.message, fault.status, fault.body)
        refused.retry_after, refused.param = fault.retry_after, fault.param
        error: AioserverError = refused
    else:
        error = cls(fault.message, retry_after=fault.retry_after, param=fault.param)
    error.paid = fault.paid
    # It was counted where it happened.
    error.counted = True
    if isinstance(error, ProviderFault):
        if fault.provider:
            error.request_outcome = Outcome(
                fault.provider, "", fault.attempts, fault.provider_headers
            )
        if fault.passed:
            error.provider_answer = fault.status, fault.body
    return error
