"""The health check of an image: whether the server of this configuration answers on this machine.

`python -m aioserver.tools.health [PATH]` ends with 0 if it does. The scheme and the port are those
of the configuration. If the configuration has a fault, it may differ from the one in effect, so
both schemes are tried.
"""

from __future__ import annotations

import ssl
import sys
import urllib.request
from urllib.error import URLError

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.server.listener import url_of

TIMEOUT = 2.0
EVERYWHERE = {"0.0.0.0", "::"}  # noqa: S104 - compared
# OpenSSL's reasons on a server that wants a client certificate: it lives, and refuses this client.
ALIVE = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE")


def main(path: str = "/health") -> int:
    """Return 0 if the server answers to a request for *path*, otherwise 1."""
    schemes, host, port = ["https", "http"], "127.0.0.1", 8000
    try:
        websocket = Configuration.load().settings.chat.websocket
    except ConfigurationError as error:
        print(f"the configuration has a fault: {error}", file=sys.stderr)
    else:
        schemes, port = [websocket.scheme], websocket.port
        if websocket.host not in EVERYWHERE:
            host = websocket.host
    return 0 if any(_answers(url_of(host, port, scheme) + path) for scheme in schemes) else 1


def _answers(url: str) -> bool:
    context = None
    if url.startswith("https:"):
        # The names of a certificate are for clients from outside.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT, context=context):  # noqa: S310
            return True
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        walled = isinstance(reason, ssl.SSLError) and any(
            word in (reason.reason or "") for word in ALIVE
        )
        if not walled:
            print(f"{url}: {error}", file=sys.stderr)
        return walled


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
