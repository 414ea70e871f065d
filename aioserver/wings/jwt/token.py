"""A token (JWT, RFC 7519, as a JWS in its compact form, RFC 7515): taken apart, and its claims
checked.

Pure: bytes in, claims out. Checked claims are not yet trusted: a refusal does no harm, and saves
the look-up of a key, but only `Unverified.verified` proves whose token it is.
"""

from __future__ import annotations

import math
import re
from base64 import urlsafe_b64decode
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aioserver.auth.callers import SKEW
from aioserver.config.settings import DEFAULT_ROLE
from aioserver.errors import PermissionDenied, TokenRefused
from aioserver.protocol.json_body import ABSENT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config.settings import Jwt
    from aioserver.wings.jwt.signatures import Key

# Bytes of a token, and characters of the name of a caller and of a key's id.
MAX_TOKEN, MAX_NAME = 8 << 10, 255
# Without padding, and without other characters (RFC 7515, 2), which Python's decoder skips.
_PART = re.compile(rb"[A-Za-z0-9_-]+")


class Claims(NamedTuple):
    """The verified claims of a token: its caller, the effective role, and its end (Unix time); and
    the thumbprint of the key that has verified it.
    """

    name: str
    role: str
    expiry: float
    signer: str = ""


class Unverified(NamedTuple):
    """A token whose claims are valid, and whose signature is not verified yet.

    *kid*: the id of the key with which it was signed; None if it names none.
    """

    alg: str
    kid: str | None
    claims: Claims
    message: bytes
    signature: bytes

    def verified(self, keys: Mapping[str, Key]) -> Claims:
        """Return the claims, if one of *keys*, by their algorithms, has signed them.

        Raises:
            TokenRefused: none has.
        """
        key = keys.get(self.alg)
        if key is None:
            raise refused("alg" if self.kid is not None else "kid")
        if not key.verify(self.message, self.signature):
            raise refused("signature")
        return self.claims._replace(signer=key.thumbprint)


class _Head(msgspec.Struct, gc=False):
    """The members of a token's head that are read: `jku`, `x5u`, `jwk` and `b64` are not."""

    alg: str
    kid: str | None = None
    crit: msgspec.Raw = ABSENT


_HEAD = msgspec.json.Decoder(_Head)


def refused(rule: str) -> TokenRefused:
    """Return the error of a token that breaks *rule*; it contains no value of the token."""
    return TokenRefused(f"the token is refused: {rule}")


def read(token: bytes, jwt: Jwt, now: float) -> Unverified:
    """Return *token* taken apart, with claims that satisfy *jwt* at *now*, in wall time.

    Raises:
        TokenRefused: it is no token, or breaks a rule.
        PermissionDenied: its roles are not among those that are admitted.
    """
    if len(token) > MAX_TOKEN:
        raise refused(f"more than {MAX_TOKEN} bytes")
    parts = token.split(b".")
    if len(parts) != 3 or not all(map(_PART.fullmatch, parts)):
        raise refused("form")
    try:
        head = _HEAD.decode(_decoded(parts[0]))
        claims: object = msgspec.json.decode(_decoded(parts[1]))
        signature = _decoded(parts[2])
    except (ValueError, RecursionError):
        # msgspec's errors are ValueErrors.
        raise refused("form") from None
    if head.crit is not ABSENT:
        raise refused("crit")
    if head.kid is not None and len(head.kid) > MAX_NAME:
        raise refused("kid")
    if not isinstance(claims, dict):
        raise refused("form")
    expiry = _check(claims, jwt, now)
    name = _claim(claims, jwt.caller)
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
        raise refused("caller")
    role = role_of(claims, jwt)
    message = token[: len(parts[0]) + 1 + len(parts[1])]
    return Unverified(head.alg, head.kid, Claims(name, role, expiry), message, signature)


def _decoded(part: bytes) -> bytes:
    return urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def _check(claims: dict[str, object], jwt: Jwt, now: float) -> float:
    """Check the registered claims, and return when they expire.

    Raises:
        TokenRefused: one is missing, or does not hold.
    """
    if claims.get("iss") != jwt.issuer:
        raise refused("issuer")
    audience = claims.get("aud")
    if jwt.audience not in (audience if isinstance(audience, list) else [audience]):
        raise refused("audience")
    expiry = _moment(claims, "exp")
    if expiry is None:
        raise refused("exp")
    if now >= expiry + SKEW:
        raise refused(f"expired {int(now - expiry)} s ago")
    for name in ("nbf", "iat"):
        moment = _moment(claims, name)
        if moment is not None and now < moment - SKEW:
            raise refused(f"{name} is {math.ceil(moment - now)} s from now")
    return expiry


def _moment(claims: dict[str, object], name: str) -> float | None:
    """Return a moment of Unix time; None if the claim is not there.

    Raises:
        TokenRefused: it is no moment.
    """
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e15:
        raise refused(name)
    return float(value)


def _claim(claims: dict[str, object], path: str) -> object:
    """Return the claim of that name, or the one at the path of its dots; None if there is none."""
    if path in claims:
        return claims[path]
    value: object = claims
    for step in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value


def role_of(claims: dict[str, object], jwt: Jwt) -> str:
    """Return the first role of *jwt*, in the order of the file, that the token has.

    Raises:
        PermissionDenied: it has none, and there is none for such a token.
    """
    written = _claim(claims, jwt.roles)
    words = written.split() if isinstance(written, str) else written
    roles = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    for role in jwt.limits:
        if role in roles:
            return role
    if DEFAULT_ROLE not in jwt.limits:
        raise PermissionDenied("this token has none of the roles that are admitted here")
    return DEFAULT_ROLE
