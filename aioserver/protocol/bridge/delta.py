"""The texts in the delta of a chunk, or in the message of a whole answer, under all the names that engines give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.protocol.bridge.output import REASONING, REFUSAL, TEXT

if TYPE_CHECKING:
    from collections.abc import Mapping

REASONING_FIELDS = ("reasoning_content", "reasoning")


class DeltaText(NamedTuple):
    """A text that is not empty. *kind* is TEXT, REFUSAL or REASONING, *field* the one of the delta in which it came."""

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
