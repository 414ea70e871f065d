"""Checks of this machine: whether a server with these settings could run on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import platform
import ssl
import time
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from aioserver.files import x509
from aioserver.files.certificates import day, ends_soon, first_end
from aioserver.server import listener, preflight
from aioserver.tools.doctor.results import Result, fail, ok, skip, warn
from aioserver.tools.remote import get, printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.tools.doctor.facts import Facts

# Seconds to look up the configured host, and for `/health` of a server that runs here already.
LOOK_UP_TIMEOUT, HEALTH_TIMEOUT = 10.0, 2.0
MIB = 1 << 20
# MiB of a process before its first client, measured.
PROCESS_MIB = 64
# Names of a certificate that are shown.
MAX_NAMES = 5
# The files in which Linux shows its limits: proc(5), cgroups(7).
BACKLOG, PORTS = "proc/sys/net/core/somaxconn", "proc/sys/net/ipv4/ip_local_port_range"
MEMORY, OWN_CGROUP, CGROUPS = "proc/meminfo", "proc/self/cgroup", "sys/fs/cgroup"


async def interpreter(_facts: Facts) -> AsyncIterator[Result]:
    """Check the version of Python and the installed packages."""
    try:
        preflight.check_interpreter()
    except preflight.Unfit as unfit:
        yield fail(str(unfit))
    else:
        versions = f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
        yield ok(f"{versions} with its parser in C")
    if util.find_spec("uvloop") is None:
        yield warn("uvloop is not installed")


async def files(facts: Facts) -> AsyncIterator[Result]:
    """Check the limit of open files, and whether several processes can share the port."""
    try:
        if facts.here.chat.websocket.concurrency.uvicorn.workers > 1:
            preflight.check_workers()
        warning = preflight.raise_file_limit(facts.here)
    except preflight.Unfit as unfit:
        yield fail(str(unfit))
    else:
        wanted = preflight.wanted_files(facts.here)
        text = f"open files: all limits together need {wanted}, and may have them"
        yield ok(text) if warning is None else warn(warning)


def limit(
    text: str, remedy: str, measured: Callable[[Facts], tuple[int, int]]
) -> Callable[[Facts], AsyncIterator[Result]]:
    """Return a check that compares the two numbers that *measured* returns, available and wanted.

    *text* has both, and begins with the name of the limit.
    """

    async def look(facts: Facts) -> AsyncIterator[Result]:
        try:
            have, want = measured(facts)
        except (OSError, ValueError):
            yield skip(f"{text.partition(':')[0]}: this system does not show it")
        else:
            line = text.format(have=have, want=want)
            yield ok(line) if have >= want else warn(line, remedy.format(want=want))

    return look


def backlog(facts: Facts) -> tuple[int, int]:
    """Return the kernel's limit of connections that wait to be accepted, and the backlog."""
    wanted = facts.here.chat.websocket.concurrency.uvicorn.backlog
    return int((facts.root / BACKLOG).read_text()), wanted


def ports(facts: Facts) -> tuple[int, int]:
    """Return the number of local ports, and the most connections to one address, which need a port
    each: connections to a provider, or of a proxy on this machine to the server.
    """
    concurrency = facts.here.chat.websocket.concurrency
    clients = concurrency.max_connections + concurrency.connection_queue_size
    pools = (
        provider.http_client.max_connections * concurrency.uvicorn.workers
        for provider in facts.here.llm.providers.values()
        if provider.usable
    )
    low, high = map(int, (facts.root / PORTS).read_text().split())
    return high - low + 1, max(clients, *pools)


def memory(facts: Facts) -> tuple[int, int]:
    """Return the free MiB, and the MiB that answers, bodies and processes may take together."""
    concurrency = facts.here.chat.websocket.concurrency
    kept = (facts.here.chat.streams.max_kept_bytes + concurrency.max_body_bytes) // MIB
    wanted = (kept + PROCESS_MIB) * concurrency.uvicorn.workers
    return available_memory(facts.root) // MIB, wanted


def available_memory(root: Path) -> int:
    """Return the bytes that this process could take: the free memory of the machine, or of its
    cgroup (v2) if that has less.

    Raises:
        OSError, ValueError: the system does not show them.
    """
    lines = (root / MEMORY).read_text().splitlines()
    (text,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    available = int(text) * 1024
    with contextlib.suppress(OSError):
        group = (root / OWN_CGROUP).read_text().strip().rpartition(":")[2].lstrip("/")
        folder = root / CGROUPS / group
        # The limit of a group holds for all groups in it.
        for level in (folder, *folder.parents):
            # A group without a limit has the word `max`, or no such file.
            with contextlib.suppress(OSError, ValueError):
                bound = int((level / "memory.max").read_text())
                used = int((level / "memory.current").read_text())
                available = min(available, max(0, bound - used))
    return available


async def address(facts: Facts) -> AsyncIterator[Result]:
    """Check whether the configured address is free, or has a server that runs already."""
    websocket = facts.here.chat.websocket
    host, port = websocket.host, websocket.port
    try:
        async with asyncio.timeout(LOOK_UP_TIMEOUT):
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, **listener.LOOK_UP)
        for sock in listener.bind(host, port, infos):
            sock.close()
    except TimeoutError:
        yield fail(f"{host} is not found in time", "see chat.websocket.host")
    except OSError as error:
        text = preflight.cannot_listen(host, port, error)
        if error.errno != errno.EADDRINUSE:
            yield fail(text)
            return
        host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compared
        url = listener.url_of(host, port, websocket.scheme)
        async with aiohttp.ClientSession() as session:
            # Its certificate may lack this address, and another check examines it.
            answer = await get(session, f"{url}/health", HEALTH_TIMEOUT, ssl=False)
        version = f"aioserver {printable(answer.content.get('version') or '')}".rstrip()
        serves = f"{version} already serves {url}: `aioserver doctor {url}` examines it"
        yield ok(serves) if answer.healthy else warn(text)
    else:
        yield ok(f"{host}:{port} is free to listen on")


async def certificate(facts: Facts) -> AsyncIterator[Result]:
    """Check the certificate of the listener, whose files can be read: dates, names, and chain."""
    tls = facts.here.chat.websocket.tls
    assert tls is not None
    chain = x509.certificates(await asyncio.to_thread(Path(tls.cert_file).read_bytes))
    expires = first_end(chain)
    if (text := ends_soon(expires)) is None:
        yield ok(f"the certificate is valid until {day(expires)}")
    else:
        hint = "renew it: the files are read again within seconds"
        yield fail(text, hint) if expires <= time.time() else warn(text, hint)
    if names := chain[0].names:
        yield ok(f"clients may connect to {', '.join(names[:MAX_NAMES])}")
    else:
        yield fail("the certificate has no name", "clients look for the host in it")
    known = set()
    for der in ssl.create_default_context().get_ca_certs(binary_form=True):
        with contextlib.suppress(x509.Malformed):
            known.add(x509.certificate(der).subject)
    last = chain[-1]
    if last.issuer in known:
        yield ok("its issuer is an authority that this system knows")
    else:
        what = "it is signed by itself" if last.self_signed else "this system knows no such issuer"
        text = "clients have to trust it by a file, unless an intermediate is missing"
        yield warn(f"{what}: {text}")
