"""The keys of an issuer: which are read, and by which algorithm alone each verifies."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from aioserver.wings.jwt.signatures import MAX_KEYS, UselessKeys, read_keys
from tests.support.issuer import SigningKey, jwks, rsa_key

ALGORITHMS = ["RS256", "ES256", "EdDSA"]
GOOD = SigningKey("ES256", "good")


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_key_verifies_its_own_signatures_and_no_others(alg: str) -> None:
    key, other = SigningKey(alg), SigningKey(alg, number=1)
    message, _, signature = key.sign({"sub": "a"}).rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")

    (read,) = read_keys(jwks(key)).named["k1"].values()

    assert read.alg == alg
    assert read.verify(message.encode(), raw)
    assert not read.verify(message.encode() + b"x", raw)
    assert not read.verify(message.encode(), raw[:-1])
    assert not read.verify(message.encode(), b"")
    foreign = other.sign({"sub": "a"}).rpartition(".")[2]
    assert not read.verify(message.encode(), base64.urlsafe_b64decode(foreign + "=="))


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_key_is_known_whatever_it_is_called_and_no_other_key_by_its_name(alg: str) -> None:
    key, other = SigningKey(alg), SigningKey(alg, number=1)

    (known,) = read_keys(jwks(key)).thumbprints()

    again = read_keys(jwks(key.jwk(kid="k2", use="sig", x5t="later"), other.jwk()))
    assert known in again.thumbprints()
    assert len(again.thumbprints()) == 2
    assert again.named["k1"][alg].thumbprint != known == again.named["k2"][alg].thumbprint


def symmetric() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(HMACAlgorithm.to_jwk(b"secret" * 10))
    return {**made, "kid": "bad", "alg": "HS256"}


def of(kind: Any, key: Any, **more: Any) -> dict[str, Any]:
    return {**json.loads(kind.to_jwk(key.public_key())), "kid": "bad", **more}


@pytest.mark.parametrize(
    "jwk",
    [
        symmetric(),
        {**symmetric(), "alg": "RS256"},
        of(RSAAlgorithm, rsa_key(1024)),
        of(RSAAlgorithm, rsa_key(), alg="RS512"),
        of(RSAAlgorithm, rsa_key(), alg="PS256"),
        of(RSAAlgorithm, rsa_key(), alg="RSA-OAEP", use="enc"),
        of(RSAAlgorithm, rsa_key(), use="enc"),
        of(RSAAlgorithm, rsa_key(), key_ops=["encrypt"]),
        of(ECAlgorithm, ec.generate_private_key(ec.SECP384R1())),
        of(ECAlgorithm, ec.generate_private_key(ec.SECP256K1())),
        of(ECAlgorithm, ec.generate_private_key(ec.SECP256R1()), alg="ES384"),
        of(OKPAlgorithm, ed448.Ed448PrivateKey.generate()),
        {"kty": "RSA", "n": "AQ", "e": "AQAB", "kid": "bad"},
        {"kty": "RSA", "kid": "bad"},
        {"kty": "EC", "crv": "P-256", "x": "!", "y": "!", "kid": "bad"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA", "kid": "bad"},
        {"kty": "new", "kid": "bad"},
        {"kty": 5, "kid": "bad"},
    ],
)
def test_what_cannot_verify_here_is_dropped(jwk: dict[str, Any]) -> None:
    keys = read_keys(jwks(GOOD, jwk))

    assert not keys.named.get("bad")
    assert list(keys.named["good"]) == ["ES256"]
    with pytest.raises(UselessKeys):
        read_keys(jwks(jwk))


def test_a_private_part_is_not_read() -> None:
    key = SigningKey("RS256")
    private = json.loads(RSAAlgorithm.to_jwk(key.private))

    (read,) = (
        read_keys(jwks({**private, "key_ops": None, "kid": "k", "p": "broken"}))
        .named["k"]
        .values()
    )

    assert read.alg == "RS256"


def test_keys_of_one_id_stand_beside_each_other_by_algorithm() -> None:
    keys = [SigningKey(alg, "same") for alg in ALGORITHMS]

    assert sorted(read_keys(jwks(*keys)).named["same"]) == sorted(ALGORITHMS)


def test_a_key_need_not_be_named_where_it_is_the_only_one_of_its_kind() -> None:
    keys = read_keys(jwks(SigningKey("ES256", "a"), SigningKey("EdDSA", "b"), SigningKey("EdDSA")))

    assert list(keys.nameless) == ["ES256"]
    assert list(read_keys(jwks(SigningKey("EdDSA", None))).nameless) == ["EdDSA"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"keys": 5}',
        b'{"keys": []}',
        b"<html>",
        b"\xff",
        b'{"keys": ' + b"[" * 100_000,
        b'{"keys": [' + b"1," * 10 + b"1]}",
        jwks(*[SigningKey("EdDSA", str(number)) for number in range(MAX_KEYS + 1)]),
        jwks(GOOD) + b" " * (256 << 10),
    ],
)
def test_what_is_no_set_is_refused(content: bytes) -> None:
    with pytest.raises(UselessKeys):
        read_keys(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_keys_or_useless(content: bytes) -> None:
    with pytest.raises(UselessKeys):
        read_keys(content)
