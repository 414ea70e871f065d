"""The callers of tokens: verified once, by name, bounded; and what a change of the settings does
to them.
"""

from __future__ import annotations

import hashlib
import random
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from aioserver.auth.access import Access
from aioserver.auth.callers import SKEW
from aioserver.auth.sessions import SESSION_SECONDS, Sessions
from aioserver.config.settings import Auth, ClientKey, Jwt, Role
from aioserver.errors import (
    AuthUnavailable,
    ConcurrencyExceeded,
    InvalidApiKey,
    PermissionDenied,
    RateLimitExceeded,
    ServerAtCapacity,
    SessionEnded,
    TokenRefused,
)
from aioserver.limits.budget import Budget
from aioserver.limits.quota import Quota
from aioserver.wings.jwt.issuer import Issuer
from aioserver.wings.jwt.signatures import Key, KeySet, read_keys
from aioserver.wings.jwt.token_callers import IDLE, TokenCallers
from tests.support.clock import FakeClock
from tests.support.issuer import AUDIENCE, ISSUER, SigningKey, claims, jwks
from tests.support.turns import Turn

KEY = SigningKey("EdDSA")


async def never() -> bytes:
    raise AssertionError("nothing is fetched")


def settings(**changes: Any) -> Jwt:
    limits = {"staff": Role(max_concurrent=7), "operator": Role(admin=True), "default": Role()}
    return Jwt(
        **{"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": "x", "limits": limits} | changes
    )


class Server:
    """What the callers of tokens and the access to a server are together, at a time that the test says."""

    def __init__(self, max_callers: int = 10_000, **changes: Any) -> None:
        self.now = time.time()
        # What the other clock shows.
        self.clock = FakeClock()
        self.clock.now = time.monotonic()
        # How many signatures were looked at.
        self.verified = 0
        issuer = Issuer(never, lambda _text, _severity: None)
        (key,) = read_keys(jwks(KEY)).nameless.values()

        def verify(message: bytes, signature: bytes) -> bool:
            self.verified += 1
            return key.verify(message, signature)

        counting = {key.alg: Key(key.alg, verify, key.thumbprint)}
        issuer.use(KeySet({"k1": counting}, counting))
        self.tokens = TokenCallers(lambda: self.now, self.clock, max_callers)
        self.tokens.use_issuer(issuer)
        self.jwt = settings(**changes)
        self.access = Access(
            Auth(jwt=self.jwt),
            Sessions(clock=lambda: self.now),
            self.make_quota,
            tokens=self.tokens,
        )

    def make_quota(self, key: ClientKey) -> Quota:
        budget = Budget(key.tokens_per_minute, key.tokens_per_day, clock=self.clock)
        return Quota(key.max_concurrent, key.requests_per_minute, self.clock, budget=budget)

    def caller(self, token: str) -> Any:
        return self.access.caller(token.encode())


def token(sub: str = "alice", **changes: Any) -> str:
    return KEY.sign(claims(sub=sub, **changes))


def test_a_token_is_a_caller_that_no_key_can_be() -> None:
    server = Server()
    key = hashlib.sha256(b"key").hexdigest()
    server.access.apply(Auth(jwt=server.jwt, keys=(ClientKey(name="alice", sha256=key),)))

    caller = server.caller(token(roles=["staff"]))

    assert (caller.name, caller.label, caller.role) == ("jwt:alice", "jwt:staff", "staff")
    assert not caller.admin
    assert caller.quota.limit == 7
    named = server.caller("key")
    assert (named.name, named.label, named.role) == ("alice", "alice", "")
    assert caller != named
    assert server.access.keyed


def test_a_role_has_models_and_ends_at_its_time() -> None:
    expires = datetime.fromtimestamp(int(time.time()) + 100, UTC).isoformat()
    server = Server(limits={"default": Role(models=("fast",), expires=expires), "staff": Role()})
    long, staff = token(), token("bob", roles=["staff"])
    caller = server.caller(long)
    session, seconds = server.access.session(caller)

    assert caller.may_ask("fast")
    assert not caller.may_ask("slow")
    assert caller.expires - server.clock() + SKEW <= 100
    assert seconds <= 100
    server.now += 101
    server.clock.now += 101
    for known in (long, token("eve")):
        with pytest.raises(TokenRefused, match="the role default has expired"):
            server.caller(known)
    with pytest.raises(SessionEnded):
        server.access.resume(session)
    assert server.access.current(caller) is None
    assert server.caller(staff).may_ask("slow")


def test_without_the_section_a_token_is_an_unknown_key() -> None:
    access = Access(Auth(keys=()), tokens=TokenCallers())

    with pytest.raises(InvalidApiKey):
        access.caller(token().encode())
    for text in ("a.b", "a.b.c.d", "aio-key"):
        with pytest.raises(InvalidApiKey, match="not known"):
            Server().caller(text)


def test_a_token_is_verified_once_until_it_expires() -> None:
    server = Server()
    first = token(exp=server.now + 60)

    assert server.caller(first) is server.caller(first)
    assert server.verified == 1
    server.now += 60 + SKEW - 0.1
    server.caller(first)
    server.now += 0.2
    with pytest.raises(TokenRefused, match="expired 30 s ago"):
        server.caller(first)
    # What is refused is not remembered.
    bad = SigningKey("EdDSA").sign(claims(exp=server.now + 60))
    for _ in range(2):
        with pytest.raises(TokenRefused, match="signature"):
            server.caller(bad)
    assert server.verified == 3


def test_as_many_tokens_are_remembered_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioserver.wings.jwt.token_callers.MAX_TOKENS", 200)
    server = Server()
    tokens = [token(more=number) for number in range(200 + 5)]
    for each in tokens:
        server.caller(each)
        server.caller(tokens[0])

    assert server.verified == len(tokens)
    for each in (tokens[0], tokens[-1], tokens[-100]):
        server.caller(each)
    assert server.verified == len(tokens)
    server.caller(tokens[1])
    assert server.verified == len(tokens) + 1
    assert len(server.tokens.quotas()) == 1


def test_all_tokens_of_one_name_share_a_quota_and_the_newest_says_its_limits() -> None:
    server = Server()
    one, two = server.caller(token()), server.caller(token(roles=["staff"]))

    assert one == two
    assert one.quota is two.quota
    assert one.quota.limit == 7
    assert server.caller(token(roles=["operator"])).admin
    assert not one.admin
    assert one.quota.limit == 20


def test_a_key_that_is_not_there_is_no_refusal() -> None:
    server = Server()
    server.tokens.use_issuer(None)

    with pytest.raises(AuthUnavailable) as caught:
        server.caller(token())
    assert caught.value.status == 503


# Bounds.


def test_callers_are_bounded_and_the_one_that_rests_longest_is_forgotten() -> None:
    server = Server(max_callers=3)
    people = [server.caller(token(f"p{number}")) for number in range(3)]
    people[0].quota.take()
    with pytest.raises(ServerAtCapacity):
        server.caller(token("new"))

    server.clock.now += IDLE + 1
    server.caller(token("p1"))
    server.caller(token("new"))

    # p0 has an answer, p1 came just now.
    assert set(server.tokens.quotas()) == {"jwt:p0", "jwt:p1", "jwt:new"}
    assert server.tokens.current(people[2]) is None
    assert server.tokens.current(people[0]) == people[0]
    with pytest.raises(ServerAtCapacity):
        server.caller(token("newer"))


@pytest.mark.parametrize("what", ["running", "connected", "rate", "minute", "day"])
def test_what_has_something_to_lose_is_not_forgotten(what: str) -> None:
    limits = {"default": Role(requests_per_minute=2, tokens_per_minute=100, tokens_per_day=500)}
    server = Server(max_callers=1, limits=limits)
    caller = server.caller(token("a"))
    match what:
        case "running":
            caller.quota.take()
        case "connected":
            caller.quota.connect()
        case "rate":
            server.clock.now += IDLE + 1
            Turn(caller.quota).end()
        case "minute":
            server.clock.now += IDLE + 1
            caller.quota.budget.reserve(50).settle(50)
        case _:
            caller.quota.budget.begin({"tokens_per_day": 400})
    if what in {"running", "connected", "day"}:
        server.clock.now += IDLE + 1

    with pytest.raises(ServerAtCapacity):
        server.caller(token("b"))
    assert set(server.tokens.quotas()) == {"jwt:a"}


def test_a_flood_of_names_looks_at_few_callers_and_lets_those_who_are_known_in() -> None:
    server = Server(max_callers=100)
    tokens = [token(f"p{number}") for number in range(100)]
    for each in tokens:
        server.caller(each).quota.take()

    for number in range(110):
        with pytest.raises(ServerAtCapacity):
            server.caller(token(f"new{number}"))

    assert len(server.tokens.quotas()) == 100
    assert all(server.caller(each) for each in tokens)


def test_the_day_of_a_caller_begins_at_what_the_ledger_knows() -> None:
    server = Server(limits={"default": Role(tokens_per_day=500)})
    now = time.time()
    assert [period.setting for period in server.tokens.periods] == ["tokens_per_day"]

    server.tokens.begin(now, {"jwt:a": {"tokens_per_day": 400}, "web": {"tokens_per_day": 5}})
    old = server.caller(token("a")).quota.budgets()["tokens_per_day"]
    assert old.used == 400
    server.tokens.begin(now - 86_400, {"jwt:b": {"tokens_per_day": 400}})
    assert server.caller(token("b")).quota.budgets()["tokens_per_day"].used == 0


# Changes of the settings.


@pytest.mark.parametrize(
    "change", [{"issuer": "other"}, {"audience": "other"}, {"jwks_url": "y"}, {"caller": "x"}]
)
def test_another_issuer_ends_every_caller(change: dict[str, str]) -> None:
    server = Server()
    caller = server.caller(token())

    assert server.access.apply(Auth(jwt=settings(**change))) == {"jwt:alice"}

    assert caller.quota.revoked
    assert server.access.current(caller) is None


def test_other_limits_hold_in_place_and_a_role_that_is_gone_ends_its_callers() -> None:
    server = Server()
    alice = server.caller(token())
    bob = server.caller(token("bob", roles=["staff"]))
    limits = {"default": Role(max_concurrent=3, priority=5)}

    assert server.access.apply(Auth(jwt=settings(limits=limits))) == {"jwt:bob"}

    now = server.access.current(alice)
    assert now is not None
    assert (now.priority, now.quota, now.quota.limit if now.quota else 0) == (5, alice.quota, 3)
    assert bob.quota.revoked
    assert server.access.apply(Auth(jwt=settings(limits=limits))) == frozenset()
    assert server.access.apply(None) == {"jwt:alice"}
    with pytest.raises(InvalidApiKey):
        server.caller(token())


def test_without_a_default_role_others_are_refused() -> None:
    server = Server(limits={"staff": Role()})

    with pytest.raises(PermissionDenied):
        server.caller(token())


# Sessions.


def test_a_session_of_a_token_lasts_until_its_end_and_twelve_hours_at_most() -> None:
    server = Server()
    caller = server.caller(token(exp=server.now + 600, roles=["operator"]))

    session, seconds = server.access.session(caller)

    assert 598 <= seconds <= 600
    again = server.access.resume(session)
    assert (again, again.role, again.admin) == (caller, "operator", True)
    assert again.quota is caller.quota
    assert again.expires == pytest.approx(caller.expires, abs=3)
    server.now += 601
    with pytest.raises(SessionEnded):
        server.access.resume(session)
    long = server.caller(token(exp=server.now + 10 * SESSION_SECONDS))
    assert server.access.session(long)[1] == SESSION_SECONDS


def test_a_session_ends_with_the_verified_end_of_its_token_whatever_the_clocks_do() -> None:
    server = Server()
    token_ = token(exp=server.now + 600)
    server.caller(token_)
    # The wall clock is set forward: the other one does not know of it.
    server.now += 590

    session, seconds = server.access.session(server.caller(token_))

    assert 8 <= seconds <= 10
    server.now += 11
    with pytest.raises(SessionEnded):
        server.access.resume(session)
    with pytest.raises(TokenRefused):
        # Its time of grace is no time for another session.
        server.access.session(server.caller(token_))


def test_a_session_of_a_token_dies_with_the_settings() -> None:
    for change in ({"audience": "other"}, {"limits": {"default": Role()}}):
        server = Server()
        session, _ = server.access.session(server.caller(token(roles=["staff"])))
        server.access.apply(Auth(jwt=settings(**change)))
        with pytest.raises(SessionEnded):
            server.access.resume(session)


def test_a_session_of_a_token_cannot_be_changed() -> None:
    server = Server()
    session, _ = server.access.session(server.caller(token("a.b ü:c")))
    assert server.access.resume(session).name == "jwt:a.b ü:c"

    for at in range(len(session)):
        changed = session[:at] + ("A" if session[at] != "A" else "B") + session[at + 1 :]
        with pytest.raises(SessionEnded):
            server.access.resume(changed)
    for forged in ("jwt:", "jwt:a.b.1.x", "jwt:YQ.ZGVmYXVsdA.9999999999.00", "jwt:.."):
        with pytest.raises(SessionEnded):
            server.access.resume(forged)


# All of it, in virtual time.


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_no_token_outlives_its_end_and_no_limit_comes_back_early(seed: int) -> None:
    """People come with tokens of all ages, and do anything; a model knows what each has used."""
    dice = random.Random(seed)
    limits = {"default": Role(max_concurrent=3, requests_per_minute=4, tokens_per_day=1000)}
    server = Server(max_callers=5, limits=limits)
    names = [f"p{number}" for number in range(12)]
    tokens: list[tuple[str, str, float]] = []
    # Of each name: the answers that run, and the starts of the last minute.
    running: dict[str, list[Turn]] = {name: [] for name in names}
    starts: dict[str, list[float]] = {name: [] for name in names}
    admitted = refused = 0
    for _ in range(1500):
        seconds = dice.expovariate(0.25)
        server.now += seconds
        server.clock.now += seconds
        name = dice.choice(names)
        roll = dice.random()
        if roll < 0.15 and running[name]:
            running[name].pop().end()
            continue
        if roll < 0.3 or not tokens:
            expiry = server.now + dice.choice((5, 60, 600))
            tokens = [*tokens[-30:], (token(name, exp=expiry, iat=None), name, expiry)]
        text, name, expiry = dice.choice(tokens)
        try:
            caller = server.caller(text)
        except TokenRefused:
            assert server.now >= expiry + SKEW
            continue
        except ServerAtCapacity:
            refused += 1
            # Nobody who has something running was forgotten, and nobody who is known is refused.
            assert len(server.tokens.quotas()) == 5
            assert f"jwt:{name}" not in server.tokens.quotas()
            continue
        assert server.now < expiry + SKEW
        assert len(server.tokens.quotas()) <= 5
        assert not caller.quota.revoked
        assert all(turn.quota is caller.quota for turn in running[name])
        now = server.clock.now
        starts[name] = [start for start in starts[name] if start > now - 60]
        try:
            turn = Turn(caller.quota)
        except (ConcurrencyExceeded, RateLimitExceeded):
            continue
        admitted += 1
        running[name].append(turn)
        starts[name].append(now)
        assert len(running[name]) <= 3
        # A burst of a minute, and what has come back since.
        assert len(starts[name]) <= 2 * 4
        assert caller.quota.running == len(running[name])
    assert admitted > 50
    assert refused > 5
