"""The TLS of the listener: its certificate, which may be renewed while it serves, its handshakes,
and the state that operators see.

A renewed certificate is loaded into a new context, which is used for connections accepted from
then on. A context in use could only be extended, so it would still trust a certificate authority
that was removed from the file.
"""

from __future__ import annotations

import logging
import ssl
import time
from typing import TYPE_CHECKING, Annotated, TypedDict

import msgspec

from aioserver.config.faults import ConfigurationError
from aioserver.files.certificates import (
    CertificateFault,
    day,
    ends_soon,
    first_end,
    load_authorities,
    load_pair,
)
from aioserver.files.x509 import Certificate
from aioserver.monitoring.section import Gauge, Section, SectionTrouble
from aioserver.monitoring.state import COUNTS, EARLIEST, SUM
from aioserver.server.tls import Handshakes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Tls
    from aioserver.faces.context import CurrentSettings
    from aioserver.files.watched_files import WatchedFiles
    from aioserver.telemetry.counters import Counter
    from aioserver.telemetry.metrics import Metrics

logger = logging.getLogger("aioserver.tls")

# The kind of incidents.
KIND = "certificate"


class Loaded(msgspec.Struct, frozen=True):
    """The content of the certificate files: *context*, made of the certificate of *chain*, with
    its intermediates, and of *authorities*. *at* is the time of loading, in seconds since 1970.
    """

    context: ssl.SSLContext
    chain: list[Certificate]
    authorities: list[Certificate]
    at: float

    @property
    def expires(self) -> int:
        """The earliest end of all certificates' validity."""
        return first_end(self.chain)

    def same(self, other: Loaded) -> bool:
        """Return whether *other* has the same certificates."""
        return self.chain == other.chain and self.authorities == other.authorities


def load(settings: Tls) -> Loaded:
    """Load the files of *settings*, and return their content. It blocks.

    Raises:
        CertificateFault: a file cannot be used.
    """
    # TLS 1.2 is the oldest; no compression.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    authorities = []
    chain = load_pair(context, settings.cert_file, settings.key_file)
    if settings.client_ca_file is not None:
        authorities = load_authorities(settings.client_ca_file, context)
        context.verify_mode = ssl.CERT_REQUIRED
        # An authority in the file is trusted, whether or not it is self-signed.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        # A resumed session does not present its certificate.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return Loaded(context, chain, authorities, time.time())


class ListenerTls:
    """The TLS of the listener.

    Always: the certificate and the key of `loaded` match. *current* returns the settings in
    effect; if they turn TLS off, it stays on until a restart.

    Raises:
        CertificateFault: a file cannot be used, when it is made.
    """

    def __init__(
        self, settings: Tls, current: Callable[[], Tls | None], outcomes: Mapping[str, Counter]
    ) -> None:
        self._settings, self._current = settings, current
        self.loaded = load(settings)
        self.handshakes = Handshakes(self.loaded.context, outcomes)

    def close(self) -> None:
        """End the handshakes that are not finished."""
        self.handshakes.close()

    def watch(self, watched: WatchedFiles) -> None:
        """Let *watched* put changes of the files in effect."""
        watched.add(KIND, lambda: self._in_effect().files, self._prepare)

    def _in_effect(self) -> Tls:
        return self._current() or self._settings

    def _prepare(self) -> Callable[[], None] | None:
        settings = self._in_effect()
        loaded = load(settings)
        # They stay in effect when TLS is turned off, until the restart.
        self._settings = settings
        return None if loaded.same(self.loaded) else lambda: self._use(loaded)

    def _use(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.handshakes.context = loaded.context
        logger.info("tls: a certificate in effect until %s", day(loaded.expires))


def open_tls(
    current: CurrentSettings, metrics: Metrics, watched: WatchedFiles, stack: AsyncExitStack
) -> ListenerTls | None:
    """Return the TLS of the listener; None if the settings in effect have none. *watched* reads its
    files again, and *stack* closes it.

    Raises:
        ConfigurationError: a file has changed since the configuration was read, and cannot be
            used.
    """
    settings = current.chat.websocket.tls
    if settings is None:
        return None
    try:
        tls = ListenerTls(settings, lambda: current.chat.websocket.tls, metrics.handshakes)
    except CertificateFault as fault:
        raise ConfigurationError([f"chat.websocket.tls.{fault.setting}: {fault}"]) from None
    stack.callback(tls.close)
    tls.watch(watched)
    return tls


class TlsState(TypedDict):
    """The TLS of the listener: when its certificate expires and was loaded, in seconds since 1970,
    the number of unfinished handshakes, and the outcomes of the others.
    """

    expires: Annotated[float | None, EARLIEST]
    loaded: Annotated[float | None, EARLIEST]
    unfinished: Annotated[int, SUM]
    outcomes: Annotated[dict[str, int], COUNTS]


class TlsSection(Section[TlsState]):
    """The state of *tls* for operators; *tls* is None if the listener is plain. *outcomes* counts
    handshakes.
    """

    key = "tls"
    shape = TlsState
    gauges = (
        Gauge(
            "tls_certificate_expires_seconds",
            lambda state: state["expires"],
            "End of the listener's certificate, in seconds since 1970",
        ),
    )

    def __init__(self, tls: ListenerTls | None, outcomes: Mapping[str, Counter]) -> None:
        self._tls, self._outcomes = tls, outcomes

    def state(self) -> TlsState:
        """Return the state of the listener's TLS."""
        tls = self._tls
        return {
            "expires": None if tls is None else tls.loaded.expires,
            "loaded": None if tls is None else round(tls.loaded.at, 3),
            "unfinished": 0 if tls is None else len(tls.handshakes),
            "outcomes": {name: int(counter.value) for name, counter in self._outcomes.items()},
        }

    def trouble(self, state: TlsState) -> SectionTrouble | None:
        """Return a trouble if the certificate expires soon, or has expired."""
        expires = state["expires"]
        if expires is None or (text := ends_soon(expires)) is None:
            return None
        over = expires <= time.time()
        return SectionTrouble(
            f"certificate_{'expired' if over else 'expires'}",
            "Certificate expired" if over else "Certificate expires soon",
            text,
            "New clients refuse to connect" if over else "Clients connect until then",
            "Renew it: the files of chat.websocket.tls are read again within seconds.",
        )

    def recovery(self, state: TlsState) -> str:
        """Return until when the certificate is valid now."""
        until = "" if state["expires"] is None else f" until {day(state['expires'])}"
        return f"the certificate is valid again{until}"
