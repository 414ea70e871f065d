"""The metrics of attempts that OpenTelemetry's conventions for generative AI name.

They are those of v0.1.0 (https://github.com/open-telemetry/semantic-conventions-genai, in
development), in Prometheus's form: dots become underscores, and units suffixes. Each attempt is
counted at its end, from the same notes as its span. Labels are the conventions' attributes. A model
that is not configured is `other`, since clients may invent names; the number of models that a
provider says have answered is bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from aioserver.telemetry.counters import Counter, Histogram
from aioserver.telemetry.metrics import Family
from aioserver.usage.sums import MAX_CHILDREN, OTHER, configured_models
from aioserver.wings.tracing.chunk_times import SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.config.settings import Llm
    from aioserver.protocol.tokens import Tokens
    from aioserver.wings.tracing.trace import AttemptTrace

# gen_ai.operation.name, by the path below the provider's base URL.
OPERATIONS = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "messages": "chat",
    "responses": "chat",
}
EMBEDDINGS = OPERATIONS["embeddings"]
# The models of one provider that are named as those that have answered; beyond, they are OTHER.
MAX_ANSWERED = 32
# Upper bounds of histograms of tokens, as the conventions ask for.
TOKENS = tuple(4.0**n for n in range(14))
# gen_ai.token.modality: providers do not say which tokens are of images.
AUDIO, UNKNOWN = "audio", "unknown"
OF_ALL = (
    *("gen_ai_operation_name", "gen_ai_provider_name"),
    *("gen_ai_request_model", "gen_ai_response_model"),
)

Child = TypeVar("Child", Counter, Histogram)
_INFERENCE, _EMBEDDINGS = "gen_ai_client_inference_", "gen_ai_client_embeddings_"


class GenAiMeter:
    """Counts attempts.

    Always: each metric has at most MAX_CHILDREN children, besides those of models that are OTHER.
    """

    def __init__(self, llm: Llm) -> None:
        self._families: list[Family] = []
        # By provider: the models that have answered there.
        self._answered: dict[str, set[str]] = {}
        self.apply(llm)
        seconds, tokens = _histogram_of(SECONDS), _histogram_of(TOKENS)
        add, error, modality = (
            self._add,
            (*OF_ALL, "error_type"),
            (*OF_ALL, "gen_ai_token_modality"),
        )
        self._duration = add(
            f"{_INFERENCE}duration_seconds", "Duration of an attempt", error, seconds
        )
        self._first = add(
            f"{_INFERENCE}time_to_first_chunk_seconds",
            "Time from sending a streamed request to the first content of its answer",
            OF_ALL,
            seconds,
        )
        self._between = add(
            f"{_INFERENCE}time_per_output_chunk_seconds",
            "Time between two events of a streamed answer, from its first content on",
            OF_ALL,
            seconds,
        )
        self._used = {
            kind: add(f"{_INFERENCE}usage_{kind}_tokens", about, modality, Counter)
            for kind, about in (
                ("input", "Tokens of prompts, those from a cache included"),
                ("output", "Tokens of answers, those of reasoning included"),
                ("cache_read_input", "Tokens of prompts that came from the provider's cache"),
                (
                    "cache_write_input",
                    "Tokens of prompts that were written to the provider's cache",
                ),
                ("reasoning_output", "Tokens of answers that are reasoning"),
            )
        }
        self._prompt = add(
            f"{_INFERENCE}operation_input_tokens", "Tokens of a prompt", OF_ALL, tokens
        )
        self._answer = add(
            f"{_INFERENCE}operation_output_tokens", "Tokens of an answer", OF_ALL, tokens
        )
        self._embedding = add(
            f"{_EMBEDDINGS}duration_seconds", "Duration of an attempt", error, seconds
        )
        self._embedded = add(
            f"{_EMBEDDINGS}operation_input_tokens", "Tokens of the inputs", OF_ALL, tokens
        )

    def apply(self, llm: Llm) -> None:
        """Take the configured models of *llm*."""
        self._configured = configured_models(llm.providers, llm.models)

    def families(self) -> Iterator[Family]:
        """Yield every metric, with its present value."""
        yield from self._families

    def count(self, path: str, attempt: AttemptTrace) -> None:
        """Count *attempt*, which has ended, at the *path* below its provider's base URL."""
        operation = OPERATIONS.get(path)
        if operation is None:
            return
        provider, tokens = attempt.provider, attempt.tokens
        model = attempt.model if (provider, attempt.model) in self._configured else OTHER
        labels = operation, provider, model, self._answering(attempt, model)
        seconds = attempt.ended - attempt.began
        if operation == EMBEDDINGS:
            _child(self._embedding, *labels, attempt.error).observe(seconds)
            if tokens.prompt is not None:
                _child(self._embedded, *labels).observe(tokens.prompt)
            return
        _child(self._duration, *labels, attempt.error).observe(seconds)
        if attempt.first_chunk:
            _child(self._first, *labels).observe(attempt.first_chunk)
        if attempt.chunks is not None and any(attempt.chunks.counts):
            _child(self._between, *labels).include(attempt.chunks)
        if tokens.prompt is not None:
            _child(self._prompt, *labels).observe(tokens.prompt)
        if tokens.answer is not None:
            _child(self._answer, *labels).observe(tokens.answer)
        self._count_usage(labels, tokens)

    def _count_usage(self, labels: tuple[str, ...], tokens: Tokens) -> None:
        for kind, audio, number in (
            ("input", tokens.audio_in, tokens.prompt),
            ("output", tokens.audio_out, tokens.answer),
            ("cache_read_input", 0, tokens.cached),
            ("cache_write_input", 0, tokens.cache_write),
            ("reasoning_output", 0, tokens.reasoning),
        ):
            if audio:
                _child(self._used[kind], *labels, AUDIO).value += audio
            if number:
                _child(self._used[kind], *labels, UNKNOWN).value += number - audio

    def _answering(self, attempt: AttemptTrace, model: str) -> str:
        """Return the label of the model that has answered, "" if it is not known; *model* is that
        of the one that was asked.
        """
        name = attempt.response_model
        if name in ("", model):
            return name
        if name == attempt.model:
            # It repeats a name that is not configured.
            return OTHER
        answered = self._answered.setdefault(attempt.provider, set())
        if name not in answered:
            if len(answered) >= MAX_ANSWERED:
                return OTHER
            answered.add(name)
        return name

    def _add(
        self, name: str, about: str, labels: tuple[str, ...], make: Callable[[], Child]
    ) -> _Table[Child]:
        """Return the children of a new metric, of which *make* makes one."""
        children: dict[tuple[str, ...], Child] = {}
        self._families.append(Family(name, about, labels, children, make, prefix=""))
        return children, make


_Table = tuple[dict[tuple[str, ...], Child], "Callable[[], Child]"]


def _child(table: _Table[Child], *labels: str) -> Child:
    """Return the child of *labels*, made now if needed, unless there are too many."""
    children, make = table
    child = children.get(labels)
    if child is None:
        if len(children) >= MAX_CHILDREN:
            labels = *labels[:2], OTHER, OTHER, *labels[4:]
            if (child := children.get(labels)) is not None:
                return child
        child = children[labels] = make()
    return child


def _histogram_of(bounds: tuple[float, ...]) -> Callable[[], Histogram]:
    return lambda: Histogram(bounds)
