"""OpenAI's own client, in front of a server."""

from __future__ import annotations

from tests.support.sdk import sdk

__all__ = ["sdk"]
