"""What an engine says where it refuses a request: a word that it does not know, or the context that
its model has.

The limit, and the tokens of the prompt, stand in the words of each engine:

    vLLM        This model's maximum context length is 4096 tokens. However, you requested 5000
                tokens (4000 in the messages, 1000 in the completion). And, of later versions:
                'max_tokens' is too large: 64000. This model's maximum context length is 32768
                tokens and your request has 1024 input tokens (64000 > 32768 - 1024).
    SGLang      The input (9000 tokens) is longer than the model's context length (8192 tokens).
                Requested token count exceeds the model's maximum context length of 8192 tokens.
                You requested a total of 9000 tokens: 8000 tokens from the input messages and 1000
                tokens for the completion.
    llama.cpp   `n_prompt_tokens` and `n_ctx` beside a code of its own
    OpenAI      This model's maximum context length is 8192 tokens. However, your messages resulted
                in 9000 tokens.
    Groq        `max_tokens` must be less than or equal to `8192`
"""

from __future__ import annotations

import re
from typing import NamedTuple

import orjson

from aioserver.protocol.bridging.words import MAX_COMPLETION_TOKENS, MAX_TOKENS

# Bytes of a refusal that is read, and of its text.
MAX_READ_BYTES, MAX_TEXT = 1 << 16, 4096
# The statuses of a refusal that is about the words of a request.
STATUSES = frozenset({400, 422})
_LIMIT = re.compile(
    r"context length(?: is| of)?(?: only)?:? *\(?(\d{1,9}) tokens"
    r"|available context size \((\d{1,9}) tokens",
    re.IGNORECASE,
)
_INPUT = re.compile(
    r"(\d{1,9}) (?:in the messages|tokens from the input|input tokens|tokens in the prompt)"
    r"|messages resulted in (\d{1,9}) tokens|(?:the input|request) \((\d{1,9}) tokens\)"
    r"|input length \((\d{1,9})",
    re.IGNORECASE,
)
_MOST = re.compile(
    r"less than or equal to [`'\"]?(\d{1,9})|supports at most (\d{1,9}) completion tokens",
    re.IGNORECASE,
)


class Refusal(NamedTuple):
    """What the *text* of a refusal says of its model: *limit* is that of a prompt and its answer
    together, *asked* the tokens of the prompt, and *most* the limit of an answer. *code* is the
    engine's own, empty if it has none.
    """

    text: str
    limit: int | None = None
    asked: int | None = None
    most: int | None = None
    code: str | int = ""

    def names(self, word: str) -> bool:
        """Return whether it is about *word*."""
        return re.search(rf"\b{word}\b", self.text) is not None

    @property
    def renames(self) -> bool:
        """Whether it wants the bound of an answer by its newer name."""
        return (
            self.names(MAX_TOKENS)
            and self.names(MAX_COMPLETION_TOKENS)
            and not (self.limit or self.most)
        )


def refusal(body: bytes) -> Refusal:
    """Return what *body*, that of a refusal, says."""
    if len(body) > MAX_READ_BYTES:
        return Refusal("")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _read(body.decode("utf-8", "replace"))
    if isinstance(content, list) and content:
        content = content[0]
    error = content.get("error", content) if isinstance(content, dict) else content
    if isinstance(error, dict):
        parts = (error.get(name) for name in ("message", "msg", "detail", "param"))
        said = _read(" ".join(part if isinstance(part, str) else _written(part) for part in parts))
        # llama.cpp's own words.
        limit, asked = _count(error.get("n_ctx")), _count(error.get("n_prompt_tokens"))
        code = error.get("code")
        code = code if isinstance(code, str | int) else ""
        return said._replace(limit=limit or said.limit, asked=asked or said.asked, code=code)
    return _read(error if isinstance(error, str) else _written(error))


def _written(part: object) -> str:
    return "" if part is None else orjson.dumps(part).decode()


def _read(text: str) -> Refusal:
    text = text[:MAX_TEXT]
    return Refusal(text, _found(_LIMIT, text), _found(_INPUT, text), _found(_MOST, text))


def _found(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return None if match is None else int(next(group for group in match.groups() if group))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
