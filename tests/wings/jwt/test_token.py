"""A token: each rule that it may break, and what is never said of it."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from aioserver.auth.callers import SKEW
from aioserver.config.settings import Jwt, Role
from aioserver.errors import PermissionDenied, TokenRefused
from aioserver.wings.jwt.signatures import read_keys
from aioserver.wings.jwt.token import MAX_TOKEN, read
from tests.support.issuer import AUDIENCE, ISSUER, SigningKey, claims, jwks

if TYPE_CHECKING:
    from aioserver.wings.jwt.token import Claims

KEYS = {alg: SigningKey(alg, alg) for alg in ("RS256", "ES256", "EdDSA")}
SET = read_keys(jwks(*KEYS.values()))
ROLES = {"staff": Role(max_concurrent=20), "operator": Role(admin=True), "default": Role()}
KEY = KEYS["ES256"]


def settings(**changes: Any) -> Jwt:
    return Jwt(
        **{"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": "x", "limits": ROLES} | changes
    )


def accept(token: str | bytes, jwt: Jwt | None = None) -> Claims:
    data = token.encode() if isinstance(token, str) else token
    unverified = read(data, jwt or settings(), time.time())
    keys = SET.nameless if unverified.kid is None else SET.named.get(unverified.kid)
    assert keys is not None, "no such key"
    return unverified.verified(keys)


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def refusal(token: str | bytes, jwt: Jwt | None = None) -> str:
    with pytest.raises(TokenRefused) as caught:
        accept(token, jwt)
    assert caught.value.status == 401
    assert caught.value.headers()["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    return caught.value.message.removeprefix("the token is refused: ")


@pytest.mark.parametrize("alg", KEYS)
def test_a_token_in_order_has_its_caller_its_role_and_its_end(alg: str) -> None:
    said = claims(roles=["other", "staff"])

    name, role, expiry, signer = accept(KEYS[alg].sign(said))

    assert (name, role) == ("alice", "staff")
    assert expiry == said["exp"]
    assert signer == SET.named[alg][alg].thumbprint


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"iss": "https://other.example"}, "issuer"),
        ({"iss": None}, "issuer"),
        ({"iss": [ISSUER]}, "issuer"),
        ({"aud": "other"}, "audience"),
        ({"aud": ["other", "more"]}, "audience"),
        ({"aud": None}, "audience"),
        ({"aud": {"aioserver": 1}}, "audience"),
        ({"exp": None}, "exp"),
        ({"exp": "tomorrow"}, "exp"),
        ({"exp": True}, "exp"),
        ({"exp": 1e300}, "exp"),
        ({"nbf": "x"}, "nbf"),
        ({"iat": []}, "iat"),
        ({"sub": None}, "caller"),
        ({"sub": ""}, "caller"),
        ({"sub": 5}, "caller"),
        ({"sub": "x" * 256}, "caller"),
        ({"sub": "a\nb"}, "caller"),
        ({"sub": "a\u202eb"}, "caller"),
        ({"sub": "a\x00b"}, "caller"),
    ],
)
def test_a_claim_that_is_not_in_order_is_named_and_not_shown(
    changes: dict[str, Any], rule: str
) -> None:
    assert refusal(KEY.sign(claims(**changes))) == rule


def test_times_hold_within_the_skew() -> None:
    now = time.time()
    for changes in (
        {"exp": now - SKEW + 5},
        {"nbf": now + SKEW - 5},
        {"iat": now + SKEW - 5},
        {"exp": int(now) + 60},
        {"aud": ["x", AUDIENCE]},
    ):
        accept(KEY.sign(claims(**changes)))
    assert refusal(KEY.sign(claims(exp=now - 40.5))) == "expired 40 s ago"
    assert refusal(KEY.sign(claims(nbf=now + 90))) == "nbf is 90 s from now"
    assert refusal(KEY.sign(claims(iat=now + 90))) == "iat is 90 s from now"


# Signatures.


def test_no_other_algorithm_gets_in() -> None:
    said = claims()
    public = KEYS["RS256"].private.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    body = part(said)
    for alg, kid in (("HS256", "RS256"), ("HS256", None), ("RS256", "RS256")):
        head = part({"alg": alg} if kid is None else {"alg": alg, "kid": kid})
        message = f"{head}.{body}"
        for secret in (pem, jwks(KEYS["RS256"]), b""):
            mac = part(hmac.digest(secret, message.encode(), "sha256"))
            assert refusal(f"{message}.{mac}") in {"alg", "kid", "signature"}
    for alg in ("none", "None", "", "RS384", "PS256", "ES384", "Ed25519", "rs256"):
        token = KEY.sign(said)
        _, claimed, signature = token.split(".")
        assert refusal(f"{part({'alg': alg, 'kid': 'ES256'})}.{claimed}.{signature}") == "alg"
    assert refusal(f"{part({'alg': 'none', 'kid': 'ES256'})}.{part(said)}.") == "form"


def test_a_key_verifies_by_its_own_algorithm_alone() -> None:
    token = KEYS["EdDSA"].sign(claims(), {"kid": "ES256"})

    assert refusal(token) == "alg"


@pytest.mark.parametrize("alg", KEYS)
def test_a_token_that_was_changed_is_refused(alg: str) -> None:
    head, body, signature = KEYS[alg].sign(claims()).split(".")
    other = part(claims(sub="root"))

    assert refusal(f"{head}.{other}.{signature}") == "signature"
    assert refusal(f"{head}.{body}.{signature[:-6]}AAAAAA") == "signature"
    assert refusal(f"{head}.{body}.AAAA") == "signature"
    foreign = SigningKey(alg, alg, number=1).sign(claims())
    assert refusal(foreign) == "signature"


def test_a_crit_is_refused_and_other_names_of_keys_are_not_read() -> None:
    evil = SigningKey("RS256", "RS256", number=1)
    for other in ("jku", "x5u"):
        more = {other: "http://127.0.0.1:1/"}
        accept(KEY.sign(claims(), more))
        assert refusal(evil.sign(claims(), more)) == "signature"
    assert refusal(evil.sign(claims(), {"jwk": evil.jwk()})) == "signature"
    for crit in (["exp"], [], ["b64"], "x"):
        _, body, signature = KEY.sign(claims()).split(".")
        head = part({"alg": "ES256", "kid": "ES256", "crit": crit})
        assert refusal(f"{head}.{body}.{signature}") == "crit"
    message = f"{part({'alg': 'EdDSA', 'kid': 'EdDSA', 'b64': False})}.{part(claims())}"
    signed = part(KEYS["EdDSA"].private.sign(message.encode()))
    assert accept(f"{message}.{signed}").name == "alice"


def test_a_token_without_the_id_of_a_key_is_of_the_only_one_of_its_kind() -> None:
    key = SigningKey("ES256", None)
    key.private = KEY.private

    assert accept(key.sign(claims())).name == "alice"


@pytest.mark.parametrize(
    "token",
    [
        "",
        "..",
        "a.b",
        "a.b.c.d",
        "a.b.c",
        "e30.e30.",
        ".e30.e30",
        f"{part([])}.{part({})}.AA",
        f"{part({})}.{part({})}.AA",
        f"{part({'alg': 5})}.{part({})}.AA",
        f"{part({'alg': 'ES256', 'kid': 5})}.{part({})}.AA",
        f"{part({'alg': 'ES256'})}.{part([])}.AA",
        f"{part({'alg': 'ES256'})}.{part('x')}.AA",
        f"{part(b'{' + b'[' * 4000)}.{part({})}.AA",
        f"{part({'alg': 'ES256'})}.{part(b'[' * 4000)}.AA",
        KEY.sign(claims()).replace(".", "=.", 1),
        KEY.sign(claims()) + "=",
        KEY.sign(claims()) + "\n",
        KEY.sign(claims()).replace(".", " .", 1),
    ],
)
def test_what_is_no_token_is_refused_by_its_form(token: str) -> None:
    assert refusal(token) == "form"


def test_a_token_has_a_bound() -> None:
    long = KEY.sign(claims(more="x" * MAX_TOKEN))

    assert refusal(long) == f"more than {MAX_TOKEN} bytes"
    accept(KEY.sign(claims(more="x" * 3000)))


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(token: bytes) -> None:
    for data in (token, b"e30." + token + b".AA", token + b".e30.AA"):
        with pytest.raises(TokenRefused):
            accept(data)


def test_no_refusal_shows_a_value_of_the_token() -> None:
    for changes in ({"iss": "canary"}, {"aud": "canary"}, {"sub": "canary\n"}, {"exp": "canary"}):
        assert "canary" not in refusal(KEY.sign(claims(**changes)))
    assert "canary" not in refusal(KEY.sign(claims(), {"crit": ["canary"]}))


# Names and roles.


def test_the_caller_is_found_by_the_dots_or_the_whole_name_of_its_claim() -> None:
    said = claims(user={"id": "bob"}, **{"https://x.example/user.name": "carol"})

    assert accept(KEY.sign(said), settings(caller="user.id")).name == "bob"
    assert accept(KEY.sign(said), settings(caller="https://x.example/user.name")).name == "carol"
    assert refusal(KEY.sign(said), settings(caller="user.id.more")) == "caller"
    assert refusal(KEY.sign(said), settings(caller="user.none")) == "caller"


@pytest.mark.parametrize(
    ("roles", "role"),
    [
        (["operator", "staff"], "staff"),
        (["operator"], "operator"),
        ("openid operator", "operator"),
        ("openid", "default"),
        ([], "default"),
        (None, "default"),
        ([5, {}, "staff"], "staff"),
        ({"staff": True}, "default"),
        ("staffing", "default"),
        (5, "default"),
    ],
)
def test_the_first_role_of_the_file_that_the_token_has_counts(roles: object, role: str) -> None:
    assert accept(KEY.sign(claims(roles=roles))).role == role
    nested = accept(KEY.sign(claims(realm={"roles": roles})), settings(roles="realm.roles"))
    assert nested.role == role


def test_without_default_a_token_without_a_listed_role_may_not_come_in() -> None:
    jwt = settings(limits={"staff": Role()})

    assert accept(KEY.sign(claims(roles=["staff"])), jwt).role == "staff"
    with pytest.raises(PermissionDenied) as caught:
        accept(KEY.sign(claims(roles=["canary"])), jwt)
    assert caught.value.status == 403
    assert "canary" not in caught.value.message
