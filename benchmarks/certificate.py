"""A certificate of our own for the mock provider, where a step reaches it over TLS."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from process import free_port

try:
    import trustme
except ImportError:
    # It is one of the test extras, which the environment of a server lacks.
    sys.exit(f"trustme is not installed: {sys.executable} -m pip install trustme")

HARNESS = Path(__file__).resolve().parent / "harness"


@dataclass(frozen=True, slots=True)
class Encrypted:
    """The TLS side of the mock provider: its *port*, its *certificate* with the key, and the
    *authority* that signed it.
    """

    port: int
    certificate: Path
    authority: Path

    @classmethod
    def made_in(cls, folder: Path) -> Self:
        """Write the two files into *folder*."""
        authority = trustme.CA()
        encrypted = cls(free_port(), folder / "provider.pem", folder / "authority.pem")
        authority.issue_cert(
            "127.0.0.1", "localhost"
        ).private_key_and_cert_chain_pem.write_to_path(encrypted.certificate)
        authority.cert_pem.write_to_path(encrypted.authority)
        return encrypted

    @staticmethod
    def supported() -> bool:
        """Whether the mock provider was built with OpenSSL."""
        return b"SSL_CTX_new" in (HARNESS / "mockllm").read_bytes()
