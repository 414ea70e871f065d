"""A file that the settings name, read as a whole; and the reason if it cannot be read."""

from __future__ import annotations

from pathlib import Path

# The most bytes of a file: the shipped configuration has 12 KiB, a bundle of all authorities of
# the world 230, and a file of keys some thousand of them.
MAX_FILE_BYTES = 2**20


class UnreadableFile(ValueError):
    """A file cannot be read; the text gives the reason, without its name and its content."""


def read_file(
    path: str | Path, missing: str = "cannot be read: No such file or directory"
) -> bytes:
    """Return the content of the file *path*; *missing* is the reason if there is no such file.

    Raises:
        UnreadableFile: it cannot be read, or is too large.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableFile(missing) from None
    except (OSError, ValueError) as exc:
        raise UnreadableFile(f"cannot be read: {reason(exc)}") from None
    if len(content) > MAX_FILE_BYTES:
        raise UnreadableFile(f"larger than {MAX_FILE_BYTES} bytes")
    return content


def reason(exc: Exception) -> str:
    """Return the reason for which a file cannot be read, without any part of its content."""
    if isinstance(exc, UnicodeError):
        return "it is not UTF-8"
    if isinstance(exc, OSError):
        return exc.strerror or "unknown reason"
    return "this cannot be the name of a file"
