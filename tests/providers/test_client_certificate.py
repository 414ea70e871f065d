"""The certificate that is presented to a provider, and its renewal while the server serves."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.config.faults import ConfigurationError
from aioserver.files.x509 import certificates
from tests.support.scripted_provider import Peer, ScriptedProvider
from tests.support.server import provider_entry
from tests.support.tls import authority, pair, put

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

pytestmark = pytest.mark.both_loops

BODY = (
    b'{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"yes"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)


@pytest.fixture
def strict(tmp_path: Path) -> ssl.SSLContext:
    """The context of a provider that asks for a certificate of our authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority("theirs").issue_cert("127.0.0.1").configure_cert(context)
    put(tmp_path / "theirs.pem", authority("theirs").cert_pem.bytes())
    authority("ours").configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class Provider(ScriptedProvider):
    """Answers, and keeps what it was shown on each connection."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.shown: list[bytes] = []
        super().__init__(self._answer, ssl=context)

    async def _answer(self, peer: Peer) -> None:
        certificate = peer.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        while await peer.request():
            self.shown.append(certificate)
            await peer.send(ANSWER)


def entry(provider: Provider, folder: Path, **more: Any) -> dict[str, Any]:
    return provider_entry(provider.url) | {"ca_file": str(folder / "theirs.pem"), **more}


async def ask(server: RunningServer) -> int:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with server.session.post(server.v1 + "/chat/completions", json=body) as response:
        return response.status


def der_of(file: Path) -> bytes:
    return certificates(file.read_bytes())[0].der


async def test_provider_is_shown_our_certificate_and_the_renewed_one(
    make_server: MakeServer, strict: ssl.SSLContext, tmp_path: Path
) -> None:
    file = tmp_path / "client.pem"
    pair(tmp_path, file.name, hosts=("us",))
    async with Provider(strict) as provider:
        secure = entry(provider, tmp_path, client_cert_file=str(file))
        server = await make_server(**{"llm.providers.secure": secure, "llm.active": "secure"})
        first = der_of(file)
        await server.owners.watched.look()
        assert [await ask(server), await ask(server)] == [200, 200]

        pair(tmp_path, file.name, hosts=("us",))
        await server.owners.watched.look()
        assert await ask(server) == 200

        # Half of a pair: the former content stays in use.
        put(file, file.read_bytes()[:-300])
        await server.owners.watched.look()
        assert await ask(server) == 200

    assert provider.shown[:2] == [first, first]
    assert provider.shown[2] == provider.shown[3] != first
    assert provider.accepted == 2


async def test_provider_that_is_shown_nothing_is_out_of_reach(
    make_server: MakeServer, strict: ssl.SSLContext, tmp_path: Path
) -> None:
    async with Provider(strict) as provider:
        server = await make_server(
            **{"llm.providers.secure": entry(provider, tmp_path), "llm.active": "secure"}
        )
        assert await ask(server) in {502, 503}
    assert provider.shown == []


async def test_pair_that_broke_since_the_configuration_was_read_is_no_start(
    make_server: MakeServer, strict: ssl.SSLContext, tmp_path: Path
) -> None:
    file = tmp_path / "client.pem"
    pair(tmp_path, file.name)
    async with Provider(strict) as provider:
        secure = entry(provider, tmp_path, client_cert_file=str(file))
        server = await make_server(**{"llm.providers.secure": secure, "llm.active": "secure"})
        file.write_text("")

        assert not await server.change(**{"llm.providers.secure": secure})
        with pytest.raises(ConfigurationError, match=r"secure\.client_cert_file"):
            server.provider_of("secure").pools.renew()
