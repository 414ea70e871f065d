"""A front proxy as its sample in `deploy/` sets it up, with ports and a folder of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import aiohttp
import trustme

from tests.support.tools import edited, free_port, installed
from tests.support.waiting import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

# The file, in the folder of a proxy, with the certificate of the authority to trust.
AUTHORITY = "authority.pem"
NO_CHANGES: Mapping[str, str] = MappingProxyType({})
KINDS = ("nginx", "haproxy", "caddy")
NGINX = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    gzip on;  # what a distribution may have switched on for all
    gzip_types *;
    include {folder}/aioserver.conf;
}}
"""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy at *base*. Requests to *plain*, without TLS, are redirected to it."""

    base: str
    plain: str
    session: aiohttp.ClientSession
    tls: ssl.SSLContext

    @contextlib.asynccontextmanager
    async def leaving(self, path: str, body: object) -> AsyncIterator[asyncio.StreamReader]:
        """POST *body* and yield the answer; at the end of the block the client leaves without a
        goodbye.

        aiohttp's client would send a TLS alert and keep the connection open until it is answered.
        """
        data = json.dumps(body).encode()
        port = int(self.base.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=self.tls)
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        try:
            yield reader
        finally:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def running(
    kind: str, folder: Path, port: int, changes: Mapping[str, str] = NO_CHANGES
) -> AsyncIterator[Proxy]:
    """Run the proxy *kind* in front of whatever listens on *port* of this machine.

    *changes* are made to its sample, each in exactly one place.
    """
    program = installed(kind)
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    leaf.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    leaf.private_key_and_cert_chain_pem.write_to_path(folder / "chain.pem")
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    authority.cert_pem.write_to_path(folder / AUTHORITY)
    async with contextlib.AsyncExitStack() as stack:
        secure, plain = await _started(kind, program, folder, port, changes, tls, stack)
        connector = aiohttp.TCPConnector(ssl=tls)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Proxy(
            f"https://127.0.0.1:{secure}",
            f"http://127.0.0.1:{plain}",  # Caddy listens on it where it gets its own certificate
            session,
            tls,
        )


async def _started(
    kind: str,
    program: str,
    folder: Path,
    port: int,
    changes: Mapping[str, str],
    tls: ssl.SSLContext,
    stack: contextlib.AsyncExitStack,
) -> tuple[int, int]:
    """Start *program* on two free ports, and on others if one of them was taken meanwhile."""
    for _ in range(5):
        secure, plain = free_port(), free_port()
        arguments = _configured(kind, folder, port, secure, plain, changes)
        with (folder / "stderr").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                program,
                *arguments,
                env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)},
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
            )
        # pytest shows its log where the test has failed.
        stack.callback(lambda: print((folder / "stderr").read_text()))
        stack.push_async_callback(_end, process)
        if await _listens(process, secure, tls):
            return secure, plain
    raise AssertionError((folder / "stderr").read_text())


def _configured(
    kind: str, folder: Path, port: int, secure: int, plain: int, changes: Mapping[str, str]
) -> list[str]:
    """Write the sample with its edits; returns the program's arguments."""
    if kind == "nginx":
        text = edited(
            "nginx.conf",
            {
                "server 127.0.0.1:8000;": f"server 127.0.0.1:{port};",
                "listen 80;": f"listen 127.0.0.1:{plain};",
                "listen 443 ssl;": f"listen 127.0.0.1:{secure} ssl;",
                "/etc/nginx/chat.example.com.pem": f"{folder}/chain.pem",
                "/etc/nginx/chat.example.com.key": f"{folder}/key.pem",
                **changes,
            },
        )
        (folder / "aioserver.conf").write_text(text)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
        return ["-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    if kind == "haproxy":
        text = edited(
            "haproxy.cfg",
            {
                "    user haproxy\n    group haproxy\n    chroot /var/lib/haproxy\n": "",
                "server one 127.0.0.1:8000": f"server one 127.0.0.1:{port}",
                "bind :80": f"bind 127.0.0.1:{plain}",
                "bind :443 ssl crt /etc/haproxy/chat.example.com.pem": (
                    f"bind 127.0.0.1:{secure} ssl crt {folder}/both.pem"
                ),
                **changes,
            },
        )
        (folder / "haproxy.cfg").write_text(text)
        return ["-db", "-f", str(folder / "haproxy.cfg")]
    text = edited(
        "Caddyfile",
        {
            "{\n\tservers {": "{\n\tadmin off\n\tauto_https off\n\tservers {",
            "chat.example.com {": (
                f"https://127.0.0.1:{secure} {{\n\ttls {folder}/chain.pem {folder}/key.pem"
            ),
            "reverse_proxy 127.0.0.1:8000": f"reverse_proxy 127.0.0.1:{port}",
            **changes,
        },
    )
    (folder / "Caddyfile").write_text(text)
    return ["run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


async def _listens(process: asyncio.subprocess.Process, port: int, tls: ssl.SSLContext) -> bool:
    """Wait until *process* listens, or has ended: then False.

    Its certificate says that it is this one: another program may have taken the port meanwhile.
    """
    ended = asyncio.ensure_future(process.wait())
    async with asyncio.timeout(patience(30)):
        while not ended.done():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
                writer.transport.abort()
                ended.cancel()
                return True
            await asyncio.wait([ended], timeout=0.01)
    return False


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
