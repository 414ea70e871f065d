"""The ids of tool calls: the engine sees its own, and the client gets ids that its API allows.

    kept                               it matches `^[a-zA-Z0-9_-]{1,64}$`
    toolu_b64_ and the base64url       any other
    toolu_, 12 digits, the index       the engine has sent none

An id that comes a second time in one answer first gets the suffix `_2`, which both its call and
its result have from then on.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode

_ALLOWED = re.compile("[a-zA-Z0-9_-]{1,64}")
_ENCODED = "toolu_b64_"


def shown(provider_id: str) -> str:
    """Return the engine's id of a call as the client gets it."""
    if _ALLOWED.fullmatch(provider_id) and not provider_id.startswith(_ENCODED):
        return provider_id
    written = urlsafe_b64encode(provider_id.encode("utf-8", "replace")).rstrip(b"=")
    return _ENCODED + written.decode()


def own(shown_id: str) -> str:
    """Return the engine's id of the call that a client knows by *shown_id*."""
    encoded = shown_id.removeprefix(_ENCODED)
    if encoded == shown_id:
        return shown_id
    try:
        return urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode() or shown_id
    except ValueError:
        # The client has made it up.
        return shown_id
