"""A chunk of a chat completion: the texts in its delta, or in the message of a whole answer, and
its logprobs.

The texts have all the names that engines give them; the logprobs are written as a response has
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from aioserver.wings.responses.bridge.output import REASONING, REFUSAL, TEXT

if TYPE_CHECKING:
    from collections.abc import Mapping

REASONING_FIELDS = ("reasoning_content", "reasoning")


class DeltaText(NamedTuple):
    """A text that is not empty.

    *kind* is TEXT, REFUSAL or REASONING, *field* the one of the delta in which it came.
    """

    kind: bytes
    text: str
    field: str


def texts_of(delta: Mapping[str, Any]) -> list[DeltaText]:
    """Return the texts in *delta*: first its reasoning, then its content, then a refusal."""
    texts = []
    for field in REASONING_FIELDS:
        text = delta.get(field)
        if isinstance(text, str) and text:
            # Some engines send it under both names.
            texts.append(DeltaText(REASONING, text, field))
            break
    content = delta.get("content")
    if isinstance(content, str):
        if content:
            texts.append(DeltaText(TEXT, content, "content"))
    elif isinstance(content, list):
        for part in content:
            texts += _texts_of_part(part)
    refusal = delta.get("refusal")
    if isinstance(refusal, str) and refusal:
        texts.append(DeltaText(REFUSAL, refusal, "refusal"))
    return texts


def _texts_of_part(part: object) -> list[DeltaText]:
    """Return the texts in a *part* of a content: Mistral's models send text and thoughts so."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "thinking" and isinstance(thoughts := part.get("thinking"), list):
        texts = [thought.get("text") for thought in thoughts if isinstance(thought, dict)]
        return [DeltaText(REASONING, text, "") for text in texts if isinstance(text, str) and text]
    text = part.get("text")
    if part.get("type") == "text" and isinstance(text, str) and text:
        return [DeltaText(TEXT, text, "content")]
    return []


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
