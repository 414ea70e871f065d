"""Callers of tokens at several instances: their limits are those of all together."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from aioserver.auth.access import Access
from aioserver.config.settings import Auth, Jwt, Role
from aioserver.errors import ConcurrencyExceeded
from aioserver.wings.cluster.limits.limits import SharedLimits
from aioserver.wings.jwt.issuer import Issuer
from aioserver.wings.jwt.signatures import read_keys
from aioserver.wings.jwt.token_callers import IDLE, TokenCallers
from tests.support.issuer import AUDIENCE, ISSUER, SigningKey, claims, jwks
from tests.support.turns import Turn

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.limits.quota import Quota
    from tests.support.reference_server import ReferenceServer

pytestmark = pytest.mark.virtual_time
KEY = SigningKey("EdDSA")
JWT = Jwt(
    issuer=ISSUER,
    audience=AUDIENCE,
    jwks_url="x",
    limits={"default": Role(max_concurrent=2, requests_per_minute=600)},
)


async def never() -> bytes:
    raise AssertionError("nothing is fetched")


async def instances(reference: ReferenceServer, max_callers: int) -> list[Access]:
    """Two instances that know each other."""
    made = []
    for number in (0, 1):
        leases = reference.join(f"i{number}", fixed=(number, 2))
        issuer = Issuer(never, lambda _text, _severity: None)
        issuer.use(read_keys(jwks(KEY)))
        callers = TokenCallers(max_callers=max_callers)
        callers.use_issuer(issuer)
        limits = SharedLimits(leases)
        made.append(Access(Auth(jwt=JWT), None, limits.make_quota, callers))
    # Longer than the grace period of a new epoch.
    await asyncio.sleep(6)
    return made


def caller(access: Access, name: str) -> Caller:
    return access.caller(KEY.sign(claims(sub=name, exp=time.time() + 1e6)).encode())


def quota(access: Access, name: str) -> Quota:
    quota = caller(access, name).quota
    assert quota is not None
    return quota


async def take(quota: Quota) -> Turn | None:
    """The turn of an answer that may begin."""
    try:
        turn = Turn(quota)
        await turn.begun()
    except ConcurrencyExceeded:
        return None
    return turn


async def test_the_answers_of_one_name_are_bounded_over_all_instances(
    reference: ReferenceServer,
) -> None:
    first, second = await instances(reference, 100)

    assert await take(quota(first, "alice"))
    assert await take(quota(second, "alice"))
    assert not await take(quota(first, "alice"))
    assert not await take(quota(second, "alice"))
    assert await take(quota(second, "bob"))


@pytest.mark.timeout(600)
async def test_a_caller_that_is_forgotten_gives_back_what_it_was_granted(
    reference: ReferenceServer,
) -> None:
    first, second = await instances(reference, 1)
    turns = [await take(quota(first, "alice")) for _ in range(2)]
    for turn in turns:
        assert turn is not None
        turn.end()
    await asyncio.sleep(IDLE + 1)

    quota(first, "bob")
    await asyncio.sleep(5)

    assert set(first.quotas()) == {"jwt:bob"}
    assert await take(quota(second, "alice"))
    assert await take(quota(second, "alice"))
    assert not await take(quota(second, "alice"))
