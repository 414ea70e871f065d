"""The logprobs of a chunk, written as a response has them."""

from __future__ import annotations

from typing import Any

import orjson


def written_logprobs(tokens: object) -> tuple[bytes, bytes]:
    """Return the *tokens* of a chunk's logprobs as JSON, joined: with the bytes of each, and
    without.
    """
    own: list[bytes] = []
    plain: list[bytes] = []
    for token in tokens if isinstance(tokens, list) else ():
        if not isinstance(token, dict):
            continue
        others = token.get("top_logprobs")
        top = (
            [each for each in others if isinstance(each, dict)] if isinstance(others, list) else []
        )
        own.append(
            orjson.dumps(
                {**_with_bytes(token), "top_logprobs": [_with_bytes(each) for each in top]}
            )
        )
        plain.append(
            orjson.dumps({**_plain(token), "top_logprobs": [_plain(each) for each in top]})
        )
    return b",".join(own), b",".join(plain)


def _plain(token: dict[str, Any]) -> dict[str, Any]:
    text, logprob = token.get("token"), token.get("logprob")
    number = isinstance(logprob, (int, float)) and not isinstance(logprob, bool)
    return {"token": text if isinstance(text, str) else "", "logprob": logprob if number else 0.0}


def _with_bytes(token: dict[str, Any]) -> dict[str, Any]:
    plain = _plain(token)
    known = token.get("bytes")
    return {**plain, "bytes": known if isinstance(known, list) else list(plain["token"].encode())}
