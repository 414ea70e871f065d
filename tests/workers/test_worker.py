"""What a worker gets from its parent, and its share of each limit."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.config import Configuration
from aioserver.config.settings import Auth, Jwt, Limits, Role
from aioserver.config.shipped import SHIPPED
from aioserver.limits.fixed_share import Scope
from aioserver.server.preflight import Unfit
from aioserver.workers.loads import Loads
from aioserver.workers.worker import NAMES, SESSIONS, Worker, as_file, read, share_out
from tests.support.server import CONCURRENCY, NOWHERE, configured

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Each number of a key has a value that can be shared out; a new one that is no limit belongs here.
NO_LIMITS = {"priority"}
KEYS: list[dict[str, Any]] = [
    {
        "name": "web",
        "sha256": "ab" * 32,
        **{
            field.name: 100 + number
            for number, field in enumerate(fields(Limits))
            if field.type in (int, "int") and field.name not in NO_LIMITS
        },
    }
]
# Of numbers that differ between the shares, those that are no limits but follow from them.
SHARED = {
    "max_connections",
    "connection_queue_size",
    "max_body_bytes",
    "max_kept_bytes",
    "max_detached",
    "max_keepalive",
    "concurrent_requests",
    "requests_per_minute",
    "queue_size",
    "tokens_per_minute",
    "tokens_per_day",
    "tokens_per_week",
    "tokens_per_month",
    "max_concurrent",
    "workers",
}


def numbers(settings: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in *settings*, by its path."""
    if is_dataclass(settings):
        for field in fields(settings):
            yield from numbers(getattr(settings, field.name), f"{path}.{field.name}")
    elif isinstance(settings, dict):
        for name, value in settings.items():
            yield from numbers(value, f"{path}.{name}")
    elif isinstance(settings, tuple):
        for index, value in enumerate(settings):
            yield from numbers(value, f"{path}[{index}]")
    elif isinstance(settings, int | float) and not isinstance(settings, bool):
        yield path, settings


KEY_ALONE = {"name", "sha256"}
# What is shared out later, and what a cluster shares by leases.
MOVED = {"max_connections", "connection_queue_size"}
IN_HAND = {
    *("concurrent_requests", "requests_per_minute", "max_concurrent"),
    *("tokens_per_minute", "tokens_per_day", "tokens_per_week", "tokens_per_month"),
}


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("limit", [0, 1, 2, 63, 64, 65, 1000, 2**28])
def test_shares_sum_up_to_the_limit_and_differ_by_one(limit: int, workers: int) -> None:
    shares = [Scope("", rank, workers).share(limit) for rank in range(workers)]

    assert max(shares) - min(shares) <= 1
    if limit == 0 or limit >= workers:
        assert sum(shares) == limit
    else:
        assert shares == [1] * workers, "a share of 0 would be no worker at all"


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_no_limit_of_the_configuration_is_multiplied(
    tmp_path: Path, workers: int, *, clustered: bool
) -> None:
    changes = {
        "chat.websocket.concurrency.uvicorn.workers": workers,
        "auth.keys": KEYS,
        "auth.allowed_hosts": [],
    }
    whole = configured(NOWHERE, changes, tmp_path / "c.yaml").settings
    shares = [
        share_out(whole, Scope("", rank, workers), clustered=clustered) for rank in range(workers)
    ]

    assert whole.auth is not None
    assert whole.auth.keys is not None
    assert set(dict(numbers(whole.auth.keys[0]))) == {
        f".{name}" for name in {*NO_LIMITS, *KEYS[0]} - KEY_ALONE
    }
    for (path, limit), *parts in zip(
        numbers(whole), *(numbers(part) for part in shares), strict=True
    ):
        values = [value for name, value in parts if name == path]
        assert len(values) == workers
        name = path.rpartition(".")[2]
        if values == [limit] * workers:
            # A pool may be as large as all places, which bound its use.
            known_to_all = name in MOVED or (clustered and name in IN_HAND)
            assert name not in SHARED or not limit or known_to_all, path
        else:
            assert name in SHARED, path
            assert sum(values) == limit or name == "workers", path


@pytest.mark.parametrize("clustered", [False, True])
def test_no_limit_of_any_caller_is_multiplied(tmp_path: Path, *, clustered: bool) -> None:
    """Those of keys in the configuration, of keys in a file of their own, and of roles of tokens."""
    whole = configured(
        NOWHERE, {"auth.keys": KEYS, "auth.allowed_hosts": []}, tmp_path / "c.yaml"
    ).settings
    assert whole.auth is not None
    assert whole.auth.keys is not None
    role = Role(**{name: value for name, value in KEYS[0].items() if name not in KEY_ALONE})
    jwt = Jwt(issuer="i", audience="a", jwks_file="keys.json", limits={"member": role})
    whole = replace(whole, auth=replace(whole.auth, file_keys=whole.auth.keys, jwt=jwt))

    shares = [share_out(whole, Scope("", rank, 3), clustered=clustered).auth for rank in range(3)]

    for name, limit in KEYS[0].items():
        if name in KEY_ALONE:
            continue
        in_hand = clustered and name in {*IN_HAND, *MOVED}
        for kind in ("keys", "file_keys", "jwt"):
            parts = [getattr(caller_of(auth, kind), name) for auth in shares]
            assert parts == [limit] * 3 if in_hand else sum(parts) == limit, (kind, name)


def caller_of(auth: Auth | None, kind: str) -> Limits:
    """The only caller of this *kind*."""
    assert auth is not None
    if kind == "jwt":
        assert auth.jwt is not None
        return auth.jwt.limits["member"]
    keys: tuple[Limits, ...] = getattr(auth, kind)
    return keys[0]


def test_the_shipped_configuration_can_be_shared_out() -> None:
    whole = Configuration.load(SHIPPED, environ={}).settings

    for rank in range(25):
        share_out(whole, Scope("", rank, 25))


def test_a_worker_is_what_its_parent_has_written() -> None:
    names = sorted({*NAMES, SESSIONS, "later"})
    descriptors = {name: as_file("test", name.encode()) for name in names}
    descriptors["loads"] = Loads.create(3).fd
    try:
        for number in descriptors.values():
            os.set_inheritable(number, True)
        environ = {**Worker(5, 3, 20.0, descriptors, host="host").variables(), "HOME": "/"}

        worker = Worker.take(environ)

        assert worker is not None
        assert (worker.slot, worker.workers, worker.slots, worker.rank) == (5, 3, 12, 2)
        assert worker.period == 20.0
        assert worker.scope == ("host", 2, 3, False)
        assert worker.descriptors == descriptors, "also what a newer parent gives"
        assert worker.content() == b"configuration"
        assert worker.session_secret() == worker.session_secret() == b"session_secret"
        assert environ == {"HOME": "/"}
        assert not any(map(os.get_inheritable, descriptors.values()))
    finally:
        for number in descriptors.values():
            os.close(number)


@pytest.mark.parametrize("page", [b"", b"\1\0\0\0\0\0\0\0", bytes(4096)])
def test_a_worker_of_another_version_than_its_parent_does_not_start(page: bytes) -> None:
    descriptors = {name: as_file("test", page) for name in NAMES}
    try:
        with pytest.raises(Unfit, match="restart the service") as refusal:
            Worker.take(Worker(0, 2, 20.0, descriptors).variables())
        assert refusal.value.code == 1
        assert os.pread(descriptors["loads"], 4096, 0) == page, "it has touched nothing"
    finally:
        for number in descriptors.values():
            os.close(number)


def test_a_worker_takes_no_secret_that_a_parent_has_derived() -> None:
    loads = Loads.create(2)
    descriptors = {name: as_file("test", b"") for name in {*NAMES, "pepper"} - {"loads"}}
    descriptors["loads"] = loads.fd
    try:
        with pytest.raises(Unfit, match="sessions in another way: restart the service"):
            Worker.take(Worker(0, 2, 20.0, descriptors).variables())
    finally:
        for number in descriptors.values():
            os.close(number)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AIOSERVER_WORKER": "0/2"},
        {"AIOSERVER_WORKER": "0/2", "AIOSERVER_FDS": "lifeline=0,loads=0"},
        {"AIOSERVER_WORKER": "x", "AIOSERVER_FDS": "lifeline=0,loads=0,configuration=0"},
        {"AIOSERVER_FDS": "lifeline=0,loads=0,configuration=0"},
        {"AIOSERVER_WORKER": "0/2", "AIOSERVER_FDS": "lifeline=x,loads=-1,session_secret=,=3,,"},
    ],
)
def test_other_variables_make_no_worker(variables: dict[str, str]) -> None:
    environ = dict(variables)

    assert Worker.take(environ) is None
    assert environ == {}


def test_a_large_file_is_whole() -> None:
    content = os.urandom(1 << 20)
    number = as_file("test", content)
    try:
        assert read(number) == content
    finally:
        os.close(number)


def test_each_worker_can_keep_one_whole_body_answer_and_log(tmp_path: Path) -> None:
    changes = {
        f"{CONCURRENCY}.max_body_bytes": 1000,
        "chat.websocket.max_message_size": 400,
        "chat.streams.max_kept_bytes": 900,
        "chat.streams.max_stream_bytes": 100,
        "chat.streams.max_response_bytes": 50,
        "chat.streams.max_detached": 2,
    }
    settings = configured(NOWHERE, changes, tmp_path / "config.yaml").settings

    chat = share_out(settings, Scope("", 3, 4)).chat

    assert chat.websocket.concurrency.max_body_bytes == 400
    assert chat.streams.max_kept_bytes == 225
    assert chat.streams.max_detached == 1
    assert chat.websocket.concurrency.max_connections == 50
    assert share_out(settings, Scope("", 0, 1)) == settings
