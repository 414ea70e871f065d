"""The CPU time of a request with a token that is known, beside one with a key, and with a token
that has to be verified.

    python benchmarks/tokens.py [--requests 4000] [--turns 5]

One server, one connection, `GET /v1/models`: the kinds take turns, and of each the least CPU time
of the server is taken, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from process import free_port, usage

if TYPE_CHECKING:
    from collections.abc import Callable

ISSUER, AUDIENCE, KEY = "https://login.example", "aioserver", "aio-benchmark-key-of-some-length"
# Seconds for the start of the server.
PATIENCE = 30.0


def configuration(folder: Path, private: rsa.RSAPrivateKey) -> Path:
    """Write a configuration with a key and an issuer, and return its path."""
    jwk = {**json.loads(RSAAlgorithm.to_jwk(private.public_key())), "kid": "k"}
    (folder / "jwks.json").write_text(json.dumps({"keys": [jwk]}))
    auth = {
        "keys": [{"name": "web", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}],
        "jwt": {
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "jwks_file": str(folder / "jwks.json"),
            "limits": {"default": {"max_concurrent": 20}},
        },
    }
    file = folder / "config.yaml"
    provider = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    llm = {"active": "mine", "providers": {"mine": {**provider, "api_key": "x"}}}
    file.write_text(yaml.safe_dump({"llm": llm, "auth": auth}))
    return file


def token(private: rsa.RSAPrivateKey, number: int) -> str:
    """Return a token of the caller `alice`; each *number* is another one."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 3600}
    claims |= {"jti": str(number), "scope": "openid profile email", "azp": "chat"}
    return jwt.encode(claims, private, algorithm="RS256", headers={"kid": "k"})


def measure(
    pid: int, connection: HTTPConnection, credential: Callable[[int], str], requests: int
) -> float:
    """Return the microseconds of CPU time of the process *pid* for a request."""
    before, _ = usage(pid)
    for number in range(requests):
        headers = {"Authorization": f"Bearer {credential(number)}"}
        connection.request("GET", "/v1/models", headers=headers)
        response = connection.getresponse()
        if response.status != 200 or not response.read():
            raise SystemExit(f"no answer: {response.status}")
    return (usage(pid)[0] - before) / requests * 1e6


def main() -> None:
    """Run the benchmark, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    private = rsa.generate_private_key(65537, 2048)
    known = token(private, 0)
    numbers = iter(range(1, 1 << 30))
    kinds: dict[str, tuple[Callable[[int], str], int]] = {
        "a key": (lambda _: KEY, chosen.requests),
        "a known token": (lambda _: known, chosen.requests),
        "a new token each time": (lambda _: token(private, next(numbers)), chosen.requests // 8),
    }
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        file = configuration(Path(name), private)
        command = (sys.executable, "-m", "aioserver", "serve", "--config", str(file))
        server = subprocess.Popen(
            (*command, "--port", str(port)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "AIOSERVER__LOGGING__LEVEL": "ERROR"},
        )
        try:
            connection = ready(port)
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(chosen.turns):
                for kind, (credential, requests) in kinds.items():
                    times[kind].append(measure(server.pid, connection, credential, requests))
        finally:
            server.terminate()
            server.wait()
    least = {kind: min(values) for kind, values in times.items()}
    print(
        "| a request with | CPU of the server, µs | more than with a key, µs |\n| --- | --- | --- |"
    )
    for kind, value in least.items():
        print(f"| {kind} | {value:.0f} | {value - least['a key']:.0f} |")


def ready(port: int) -> HTTPConnection:
    """Return a connection to the server, once it serves."""
    deadline = time.monotonic() + PATIENCE
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return connection


if __name__ == "__main__":
    main()
