"""Browser sessions: a browser gets one for a key or a token, and holds it in a cookie.

A session is `name.expiry.mac`, with an HMAC (RFC 2104) of the name, the expiry and a *binding*: the
hash of its key, or the settings of tokens. So a session ends when its key or these settings change.
It is valid in every process with the same secret, and is not stored anywhere.

The secret is random and has no other use. It is not derived from the key of a provider, since such
keys are sometimes words of a manual, and an attacker who guesses the key would then know the
secret. The process that starts the workers makes it, and the instances of a cluster agree on one
through Redis.
"""

from __future__ import annotations

import hmac
import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SESSION_SECONDS = 12 * 3600
# The bytes of a secret: as many as the digest's (RFC 2104, 3).
SECRET_BYTES = 32
# The bytes of a binding. All have the same length, so that a binding and a text that follows it
# cannot be taken for another such pair.
BOUND_BYTES = 32
# The most digits of an expiry: a longer number is not a date, and int() is slow with thousands of
# digits.
MAX_EXPIRY_DIGITS = 15


def new_secret() -> bytes:
    """Return a secret for `Sessions`."""
    return secrets.token_bytes(SECRET_BYTES)


class Sessions:
    """Makes sessions, and reads them.

    Always: a session that another secret has signed is invalid; without a *secret* a random one
    signs. *clock* shows wall time: a session may be older than the process.
    """

    def __init__(
        self, secret: bytes | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self.use(new_secret() if secret is None else secret)

    def use(self, secret: bytes) -> None:
        """Sign with *secret* from now on; sessions that another secret has signed end.

        Raises:
            ValueError: it is too short for a secret.
        """
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"a secret for sessions has at least {SECRET_BYTES} bytes")
        self.secret = secret

    def make(self, name: str, bound: bytes, until: float | None = None) -> tuple[str, int]:
        """Return a session of *name* that is *bound* to BOUND_BYTES, and the seconds for which it
        is valid: SESSION_SECONDS, and not after *until*, in wall time. They may be below 1.
        """
        now = int(self._clock())
        expiry = now + SESSION_SECONDS if until is None else min(now + SESSION_SECONDS, int(until))
        text = f"{name}.{expiry}"
        return f"{text}.{self._mac(text, bound)}", expiry - now

    def seconds(self, session: str, bound: bytes) -> float:
        """Return the seconds for which *session* is still valid; 0.0 if it is not valid, or not
        *bound* to these bytes.
        """
        text, _, mac = session.rpartition(".")
        expiry = text.rpartition(".")[2]
        if not (expiry.isascii() and expiry.isdigit() and len(expiry) <= MAX_EXPIRY_DIGITS):
            return 0.0
        expected = self._mac(text, bound)
        if not hmac.compare_digest(expected.encode(), mac.encode("utf-8", "surrogatepass")):
            return 0.0
        return max(0.0, int(expiry) - self._clock())

    def _mac(self, text: str, bound: bytes) -> str:
        assert len(bound) == BOUND_BYTES
        message = bound + text.encode("utf-8", "surrogatepass")
        return hmac.digest(self.secret, message, "sha256").hex()


def name_in(session: str) -> str:
    """Return the name in *session*, which may be a guess."""
    # A name may contain dots; the other two parts cannot.
    return session.rpartition(".")[0].rpartition(".")[0]
