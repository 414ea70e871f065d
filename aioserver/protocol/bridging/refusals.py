"""Refusals of engines: a parameter that they do not know, or a context that is too small.

Each engine has its own texts; tests/support/engine_refusals.py has them, by engine and version.
The tokens of a prompt may be a lower bound: vLLM counts only as many as would fit beside the
requested answer, and one more. From such a number we know only that the prompt is longer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from aioserver.protocol.bridging.accepted_parameters import MAX_COMPLETION_TOKENS, MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping

# The most bytes of a refusal that is read, and of its text.
MAX_READ_BYTES, MAX_TEXT = 1 << 16, 4096
# The statuses of a refusal that may be about the parameters of a request.
STATUSES = frozenset({400, 422})
_N = r"(\d{1,9})"
# Patterns, compiled when a provider refuses for the first time.
_LIMIT = (
    rf"context length(?: is| of)?(?: only)?:? *\(?{_N}(?: tokens|\))"
    rf"|context size \({_N} tokens|cannot be greater than max_model_len=(?:\w+=)?{_N}"
    rf"|too large for model with {_N}|maximum prompt length is {_N}|token limit: {_N}"
    rf"|input length should be \[\d+, ?{_N}\]|must be <= {_N}\. Given|while limit is {_N}"
    rf"|configured limit of {_N} tokens|number of tokens allowed \(?{_N}"
    rf"|maximum context length: {_N}|exceeds the limit of {_N}"
)
_INPUT = (
    rf"{_N} (?:in the messages|tokens from the input|input tokens|tokens in the prompt"
    r"|of text input|`inputs` tokens)"
    rf"|messages resulted in {_N} tokens|(?:the input|input|request) \({_N} tokens\)"
    rf"|input length \({_N}|prompt contains {_N} tokens|request contains {_N} tokens"
    rf"|current length is {_N}|input token count \({_N}|prompt is too long: {_N}"
    rf"|token count of {_N}"
)
_MOST = (
    rf"less than or equal to [`'\"]?{_N}|supports at most {_N} completion tokens"
    rf"|range of max_tokens (?:is|should be) \[\d+, ?{_N}\]|exceeds the model limit of {_N}"
    rf"|> {_N}, which is the maximum allowed number of output tokens"
)
# Words about the tokens of an answer, and not about another number.
_OF_ANSWERS = "max_tokens|max_completion_tokens|completion tokens|maximum tokens"
# The requested tokens of an answer; and a prompt's count that says itself that it is a lower
# bound.
_WANTED = rf"requested {_N} output tokens"
_AT_LEAST = r"at least \d{1,9} input tokens"
# How engines describe a parameter that they do not name.
_OTHER_WORDS = {
    "reasoning_effort": "does not support thinking|invalid reasoning value|reasoningEffort",
}

# How engines list the values of a parameter, which they know.
_OF_VALUE = (
    r"must be (?:one of|\W?(?:low|high))|should be (?:one of|'\w+')|expected one of"
    r"|supported values|invalid reasoning value|value_error|literal_error"
)


class Refusal(NamedTuple):
    """The facts about a model in the *text* of a refusal: *limit* is the context length, *asked*
    the tokens of the prompt, and *most* the bound of an answer; None stands for an unknown number.
    *code* is the engine's own, empty if it has none.
    """

    text: str
    limit: int | None = None
    asked: int | None = None
    most: int | None = None
    code: str | int = ""

    def names(self, word: str) -> bool:
        """Return whether it is about *word*."""
        if re.search(rf"\b{word}\b", self.text) is not None:
            return True
        other = _OTHER_WORDS.get(word)
        return other is not None and re.search(other, self.text) is not None

    @property
    def of_value(self) -> bool:
        """Whether it is about the value of a parameter, and not about the parameter itself."""
        return re.search(_OF_VALUE, self.text, re.IGNORECASE) is not None

    @property
    def renames(self) -> bool:
        """Whether it wants the bound of an answer by its newer name."""
        return (
            self.names(MAX_TOKENS)
            and self.names(MAX_COMPLETION_TOKENS)
            and not (self.limit or self.most)
        )


def refusal(body: bytes) -> Refusal:
    """Return the content of *body*, that of a refusal."""
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
        parts = [error.get(name) for name in ("message", "msg", "detail", "param")]
        parts.append(upstream(error))
        said = _read(" ".join(part if isinstance(part, str) else _written(part) for part in parts))
        # These are llama.cpp's own members.
        limit, asked = _count(error.get("n_ctx")), _count(error.get("n_prompt_tokens"))
        code = error.get("code")
        code = code if isinstance(code, str | int) else ""
        return said._replace(limit=limit or said.limit, asked=asked or said.asked, code=code)
    return _read(error if isinstance(error, str) else _written(error))


def _written(part: object) -> str:
    return "" if part is None else orjson.dumps(part).decode()


def upstream(error: Mapping[str, Any]) -> str:
    """Return the words of the provider whose *error* a router, such as OpenRouter, passes on;
    empty if there are none.
    """
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return raw if isinstance(raw, str) else ""


def _read(text: str) -> Refusal:
    text = text[:MAX_TEXT]
    limit, asked = _found(_LIMIT, text), _found(_INPUT, text)
    most = _found(_MOST, text) if re.search(_OF_ANSWERS, text) else None
    if limit and asked and asked < limit:
        wanted = _found(_WANTED, text) or 0
        if re.search(_AT_LEAST, text) or asked + wanted == limit + 1:
            asked = None
    return Refusal(text, limit, asked, most)


def _found(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text, re.IGNORECASE)
    return None if match is None else int(next(group for group in match.groups() if group))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
