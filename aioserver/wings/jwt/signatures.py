"""The public keys of an issuer (RFC 7517), each with the one algorithm that it verifies.

The key determines the algorithm, and the token never does (RFC 8725, 2.1 and 3.1). A symmetric key
is dropped as it is read, so that no HMAC can be verified. Only this file uses PyJWT.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt import PyJWK
from jwt.exceptions import PyJWTError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The bounds of a set: real sets have a tenth of it.
MAX_BYTES, MAX_KEYS = 256 << 10, 64
# Bits of an RSA key. More than the upper bound costs milliseconds for each token.
MIN_RSA, MAX_RSA = 2048, 8192
RS256: Final = "RS256"
ES256: Final = "ES256"
EDDSA: Final = "EdDSA"
ALGORITHMS: Final = (RS256, ES256, EDDSA)


class Key(NamedTuple):
    """A public key: *verify* returns whether a signature of a message is its own, by the algorithm
    *alg*. *thumbprint* is a digest of the key itself, independent of its id.
    """

    alg: str
    verify: Callable[[bytes, bytes], bool]
    thumbprint: str


class KeySet(NamedTuple):
    """The keys of an issuer: by their ids and algorithms, and those for tokens that name no key,
    which are the only ones of their algorithm.

    An id whose keys cannot be used has an empty entry.
    """

    named: Mapping[str, Mapping[str, Key]]
    nameless: Mapping[str, Key]

    def thumbprints(self) -> frozenset[str]:
        """Return the thumbprints of all keys."""
        sets = (*self.named.values(), self.nameless)
        return frozenset(key.thumbprint for keys in sets for key in keys.values())


class UselessKeys(ValueError):
    """There is no set of keys that can be used."""


class _Jwk(msgspec.Struct, gc=False, omit_defaults=True):
    """The public part of a key; nothing else of it is read."""

    kty: str
    kid: str | None = None
    alg: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    n: str = ""
    e: str = ""
    crv: str = ""
    x: str = ""
    y: str = ""


class _Jwks(msgspec.Struct, gc=False):
    keys: list[msgspec.Raw]


_JWKS = msgspec.json.Decoder(_Jwks)
_JWK = msgspec.json.Decoder(_Jwk)


def read_keys(content: bytes) -> KeySet:
    """Return the keys in *content*, a JWK set.

    Raises:
        UselessKeys: it is not a key set, is too large, or has no key that can be used.
    """
    if len(content) > MAX_BYTES:
        raise UselessKeys(f"more than {MAX_BYTES} bytes")
    try:
        written = _JWKS.decode(content).keys
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise UselessKeys("no JWK set") from None
    if len(written) > MAX_KEYS:
        raise UselessKeys(f"{len(written)} keys, at most {MAX_KEYS}")
    named: dict[str, dict[str, Key]] = {}
    by_algorithm: dict[str, list[Key]] = defaultdict(list)
    for raw in written:
        try:
            jwk = _JWK.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            # It may be of a kind that did not exist when this was written.
            continue
        keys = named.setdefault(jwk.kid, {}) if jwk.kid is not None else {}
        if (key := _usable(jwk)) is not None:
            keys.setdefault(key.alg, key)
            by_algorithm[key.alg].append(key)
    if not by_algorithm:
        raise UselessKeys(f"no key for {', '.join(ALGORITHMS)} among {len(written)}")
    nameless = {alg: keys[0] for alg, keys in by_algorithm.items() if len(keys) == 1}
    return KeySet(named, nameless)


def _usable(jwk: _Jwk) -> Key | None:
    """Return *jwk* as a key; None if it verifies nothing here."""
    if jwk.use not in {None, "sig"} or (jwk.key_ops is not None and "verify" not in jwk.key_ops):
        return None
    try:
        # A symmetric key lacks its `k`, which is not read.
        read = PyJWK(msgspec.to_builtins(jwk))
    except (PyJWTError, KeyError, ValueError, TypeError, OverflowError):
        return None
    alg, key, algorithm = read.algorithm_name, read.key, read.Algorithm
    fits = (
        (alg == RS256 and isinstance(key, RSAPublicKey) and MIN_RSA <= key.key_size <= MAX_RSA)
        or (
            (alg == ES256 and isinstance(key, EllipticCurvePublicKey))
            and isinstance(key.curve, SECP256R1)
        )
        or (alg == EDDSA and isinstance(key, Ed25519PublicKey))
    )
    if not fits:
        return None
    # Not a digest of the text: an issuer may write the same key in another way (RFC 7638 has rules
    # for that).
    content = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def verify(message: bytes, signature: bytes) -> bool:
        return algorithm.verify(message, key, signature)

    return Key(alg, verify, hashlib.sha256(content).hexdigest())
