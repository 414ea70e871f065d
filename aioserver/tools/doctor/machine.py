"""This machine, as the place where a server with these settings would run."""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import orjson

from aioserver.client import faults
from aioserver.server import listener, preflight
from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from aioserver.config.settings import Settings
    from aioserver.tools.doctor.findings import Report

# Bytes of a process before its first client, measured.
PROCESS_BYTES = 64 << 20
# Seconds to look up the configured host.
LOOK_UP_TIMEOUT = 10.0
# Seconds in which a server of this machine says that it lives, and the bytes of that.
HEALTH_TIMEOUT, MAX_HEALTH_BYTES = 2.0, 1 << 16
MIB = 1 << 20
# Bytes that should be free for the ledger: two and a half million lines.
LEDGER_ROOM = 1 << 30


class System(NamedTuple):
    """The files in which a system shows its limits: proc(5), cgroups(7)."""

    somaxconn: Path = listener.SOMAXCONN
    port_range: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    memory: Path = Path("/proc/meminfo")
    own_cgroup: Path = Path("/proc/self/cgroup")
    cgroups: Path = Path("/sys/fs/cgroup")


SYSTEM = System()


class Extra(NamedTuple):
    """An optional package, and what it brings."""

    name: str
    package: str
    purpose: str


UVLOOP = Extra("speedups", "uvloop", "a faster event loop")
REDIS = Extra("cluster", "redis", "limits and streams that processes and machines share")


def examine_interpreter(report: Report) -> None:
    """Examine Python, and what is installed in it."""
    try:
        preflight.check_interpreter()
    except preflight.Unfit as unfit:
        report.fail("machine", str(unfit))
    else:
        versions = f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
        report.ok("machine", f"{versions} with its parser in C")
    if util.find_spec(UVLOOP.package) is None:
        report.warn("machine", f"{UVLOOP.package} is not installed", _install(UVLOOP))
    else:
        version = metadata.version(UVLOOP.package)
        report.ok("machine", f"{UVLOOP.package} {version}: {UVLOOP.purpose}")


async def examine(report: Report, settings: Settings, system: System = SYSTEM) -> None:
    """Examine the limits of *system*, and the packages that *settings* ask for."""
    _check_extras(report, settings)
    _check_workers(report, settings)
    _check_files(report, settings)
    _check_backlog(report, settings, system)
    _check_ports(report, settings, system)
    _check_memory(report, settings, system)
    _check_history(report, settings)
    _check_ledger(report, settings)
    await _check_address(report, settings)


def _install(extra: Extra) -> str:
    return f"pip install '.[{extra.name}]' in the clone brings {extra.purpose}"


def _check_extras(report: Report, settings: Settings) -> None:
    workers = settings.chat.websocket.concurrency.uvicorn.workers
    if util.find_spec(REDIS.package) is None:
        if settings.cluster.redis_url is not None:
            report.fail(
                "machine", "cluster.redis_url is set, and redis is not installed", _install(REDIS)
            )
        elif workers > 1:
            text = (
                f"redis is not installed: each of {workers} workers has a fixed "
                "share of each limit"
            )
            report.warn("machine", text, _install(REDIS))


def _check_workers(report: Report, settings: Settings) -> None:
    if settings.chat.websocket.concurrency.uvicorn.workers > 1:
        try:
            preflight.check_workers()
        except preflight.Unfit as unfit:
            report.fail("machine", str(unfit))


def _check_files(report: Report, settings: Settings) -> None:
    try:
        warning = preflight.raise_file_limit(settings)
    except preflight.Unfit as unfit:
        report.fail("machine", str(unfit))
        return
    if warning is not None:
        report.warn("machine", warning)
    else:
        wanted = preflight.wanted_files(settings)
        report.ok("machine", f"open files: all limits together need {wanted}, and may have them")


def _check_backlog(report: Report, settings: Settings, system: System) -> None:
    backlog = settings.chat.websocket.concurrency.uvicorn.backlog
    limit = _number(system.somaxconn)
    if limit is None:
        report.skip("machine", "somaxconn: this system does not show it")
        return
    text = f"the kernel lets {limit} connections wait" if limit < backlog else str(limit)
    report.weigh(
        "machine",
        limit >= backlog,
        f"somaxconn: {text}, and backlog asks for {backlog}",
        f"sysctl -w net.core.somaxconn={backlog}",
    )


def _check_ports(report: Report, settings: Settings, system: System) -> None:
    """Compare the local ports with the connections that need one of them each."""
    concurrency = settings.chat.websocket.concurrency
    pools = [
        provider.http_client.max_connections * concurrency.uvicorn.workers
        for provider in settings.llm.providers.values()
        if provider.usable
    ]
    # A port can serve one connection to each address. A proxy on this machine needs one for each
    # client.
    wanted = max([concurrency.max_connections + concurrency.connection_queue_size, *pools])
    try:
        low, high = map(int, system.port_range.read_text().split())
    except (OSError, ValueError):
        report.skip("machine", "local ports: this system does not show them")
        return
    ports = high - low + 1
    needed = (
        f"and up to {wanted} connections to one address may need one each"
        if ports < wanted
        else f"for at most {wanted} connections to one address"
    )
    report.weigh(
        "machine",
        ports >= wanted,
        f"local ports: {ports}, {needed}",
        'sysctl -w net.ipv4.ip_local_port_range="1024 65535"',
    )


def _check_memory(report: Report, settings: Settings, system: System) -> None:
    concurrency = settings.chat.websocket.concurrency
    kept = settings.chat.streams.max_kept_bytes + concurrency.max_body_bytes + PROCESS_BYTES
    wanted = kept * concurrency.uvicorn.workers
    available = available_memory(system)
    if available is None:
        report.skip("machine", "memory: this system does not show it")
        return
    report.weigh(
        "machine",
        available >= wanted,
        f"memory: {available // MIB} MiB are free, "
        f"and kept answers and bodies may take {wanted // MIB}",
        "lower chat.streams.max_kept_bytes and concurrency.max_body_bytes, or add memory",
    )


def available_memory(system: System) -> int | None:
    """Return the bytes that this process could take: those of the machine, or of its cgroup (v2),
    if they are less.

    None: the system does not show them.
    """
    found = []
    try:
        lines = system.memory.read_text().splitlines()
        (text,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        found.append(int(text) * 1024)
        group = system.own_cgroup.read_text().strip().rpartition(":")[2].lstrip("/")
    except (OSError, ValueError):
        return found[0] if found else None
    folder = system.cgroups / group
    # The limit of a group holds for those in it.
    for level in (folder, *folder.parents):
        if not level.is_relative_to(system.cgroups):
            break
        limit, used = _number(level / "memory.max"), _number(level / "memory.current")
        if limit is not None:
            found.append(max(0, limit - (used or 0)))
    return min(found)


def _check_history(report: Report, settings: Settings) -> None:
    """Find out whether the file of conversations could be written. Nothing is."""
    repository = settings.chat.service.repository
    if not repository.in_file:
        return
    file = Path(repository.path).absolute()
    places = [place for place in (file.parent, file) if place == file.parent or place.exists()]
    if all(os.access(place, os.W_OK) for place in places):
        report.ok("machine", f"conversations: {file} can be written")
    else:
        report.warn(
            "machine",
            f"conversations: {file} cannot be written, "
            "and they are lost at the end of the process",
            "make the folder, and let the user of the server write it "
            "(chat.service.repository.path)",
        )


def _check_ledger(report: Report, settings: Settings) -> None:
    """Find out whether the disk of the ledger has room; that it can be written is a matter of the
    configuration.
    """
    if settings.usage.path is None:
        return
    directory = Path(settings.usage.path).absolute()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        report.warn("machine", f"ledger: the disk of {settings.usage.path}: {error.strerror}")
        return
    report.weigh(
        "machine",
        free >= LEDGER_ROOM,
        f"ledger: {free // MIB} MiB are free on the disk of {settings.usage.path}",
        "make room, or move old files of the ledger away: the server deletes none",
    )


async def _check_address(report: Report, settings: Settings) -> None:
    host, port = settings.chat.websocket.host, settings.chat.websocket.port
    subject = "machine"
    try:
        async with asyncio.timeout(LOOK_UP_TIMEOUT):
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, **listener.LOOK_UP)
        for sock in listener.bind(host, port, infos):
            sock.close()
    except TimeoutError:
        report.fail(subject, f"{host} is not found in time", "see chat.websocket.host")
    except OSError as error:
        text = preflight.cannot_listen(host, port, error)
        if error.errno == errno.EADDRINUSE:
            scheme = settings.chat.websocket.scheme
            host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compared
            url = listener.url_of(host, port, scheme)
            if (version := await _serving(url)) is not None:
                report.ok(
                    subject,
                    f"aioserver{version and f' {version}'} already serves {url}: "
                    f"`aioserver doctor {url}` examines it",
                )
            else:
                report.warn(subject, text)
        else:
            report.fail(subject, text)
    else:
        report.ok(subject, f"{host}:{port} is free to listen on")


async def _serving(url: str) -> str | None:
    """Return the version of the aioserver at *url*, empty if it is not told; None if what answers
    is none.
    """
    timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            # Its certificate may have other names than this address, and is examined by itself.
            session.get(f"{url}/health", allow_redirects=False, ssl=False) as response,
        ):
            content = orjson.loads(await faults.read_body(response, MAX_HEALTH_BYTES))
    except (aiohttp.ClientError, OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("status") != "healthy":
        return None
    return printable(str(content.get("version") or ""))


def _number(path: Path) -> int | None:
    """Return the number in a file of the kernel; None if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
