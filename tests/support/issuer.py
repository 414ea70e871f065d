"""An issuer of tokens: its keys, what it publishes of them, and the tokens that it signs."""

from __future__ import annotations

import functools
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ISSUER, AUDIENCE = "https://login.example", "aioserver"


@functools.cache
def rsa_key(bits: int = 2048, number: int = 0) -> rsa.RSAPrivateKey:
    """A key, made once in a run for each *number*, since that takes long."""
    return rsa.generate_private_key(65537, bits)


class SigningKey:
    """One key of an issuer, *alg* being RS256, ES256 or EdDSA."""

    def __init__(self, alg: str, kid: str | None = "k1", number: int = 0) -> None:
        self.alg, self.kid = alg, kid
        self.private: Any
        match alg:
            case "RS256":
                self.private = rsa_key(number=number)
            case "ES256":
                self.private = ec.generate_private_key(ec.SECP256R1())
            case _:
                self.private = ed25519.Ed25519PrivateKey.generate()

    def jwk(self, **more: Any) -> dict[str, Any]:
        """What is published of it."""
        kind: Any = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[self.alg]
        published = json.loads(kind.to_jwk(self.private.public_key()))
        named = {} if self.kid is None else {"kid": self.kid}
        return {**published, **named, **more}

    def sign(self, claims: dict[str, Any], head: dict[str, Any] | None = None) -> str:
        named = {} if self.kid is None else {"kid": self.kid}
        # Not `jwt.encode`, which checks the claims.
        payload = json.dumps(claims).encode()
        headers = {**named, **(head or {})}
        return jwt.PyJWS().encode(payload, self.private, algorithm=self.alg, headers=headers)


def claims(**changes: Any) -> dict[str, Any]:
    """Claims that are in order; None takes one out."""
    now = time.time()
    all_of_them = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": now + 3600,
        "iat": now,
        **changes,
    }
    return {name: value for name, value in all_of_them.items() if value is not None}


def jwks(*keys: SigningKey | dict[str, Any]) -> bytes:
    """The set of *keys* as an issuer publishes it."""
    published = [key.jwk() if isinstance(key, SigningKey) else key for key in keys]
    return json.dumps({"keys": published}).encode()


class IssuerServer:
    """Publishes its *keys* by HTTP; `status` is that of its answers, and `asked` their number."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys = list(keys)
        self.status, self.asked = 200, 0
        self.url = ""

    async def answer(self, _request: web.Request) -> web.Response:
        self.asked += 1
        return web.Response(status=self.status, body=jwks(*self.keys))

    def token(self, **changes: Any) -> str:
        """A token of the first key."""
        return self.keys[0].sign(claims(**changes))


@asynccontextmanager
async def issuer_server(*keys: SigningKey) -> AsyncIterator[IssuerServer]:
    """Run an issuer with *keys*."""
    issuer = IssuerServer(*keys)
    app = web.Application()
    app.router.add_get("/jwks", issuer.answer)
    async with served(app) as base:
        issuer.url = f"{base}/jwks"
        yield issuer


def jwt_settings(url: str, **changes: Any) -> dict[str, Any]:
    """The section `auth.jwt` for the issuer at *url*."""
    return {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": url, **changes}
