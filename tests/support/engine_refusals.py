"""What engines say where they refuse a request, by engine and version: the format of a body and the
words that count, with numbers of our own.

The sources are the engines' own code and what their users have reported: vLLM's `renderers/params.py`
and `serving_engine.py`, SGLang's `tokenizer_manager.py`, llama.cpp's `server-context.cpp` and
`server-common.cpp`, llama-cpp-python's `server/errors.py`, Ollama's `openai.go`, TGI's `validation.rs`,
and the error pages of hosted APIs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A refusal with *status* and *body*, and what it says: *limit*, *asked*, *most* and *renames*
    are as for `Refusal`, *words* are the optional words that it names, and *too_long* whether the
    request may be longer than the context.
    """

    engine: str
    body: Any
    status: int = 400
    limit: int | None = None
    asked: int | None = None
    most: int | None = None
    words: tuple[str, ...] = ()
    renames: bool = False
    too_long: bool = False

    @property
    def data(self) -> bytes:
        """The bytes of the body."""
        return self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()


def openai(message: str, **more: Any) -> dict[str, Any]:
    """The body of an error of OpenAI's API."""
    return {"error": {"message": message, "type": "invalid_request_error", **more}}


def flat(message: str) -> dict[str, Any]:
    """The body of an error of vLLM and SGLang, as both had it until 2025."""
    return {"object": "error", "message": message, "type": "BadRequestError", "code": 400}


CONTEXTS = [
    Refused(
        engine="vLLM 0.6",
        body=flat(
            "This model's maximum context length is 32768 tokens. However, you requested 65024 "
            "tokens (1024 in the messages, 64000 in the completion). Please reduce the length of "
            "the messages or completion."
        ),
        limit=32_768,
        asked=1024,
        too_long=True,
    ),
    Refused(
        engine="vLLM 0.10",
        body=openai(
            "'max_tokens' or 'max_completion_tokens' is too large: 64000. This model's maximum "
            "context length is 32768 tokens and your request has 1024 input tokens (64000 > 32768 "
            "- 1024).",
            param=None,
            code=400,
        ),
        limit=32_768,
        asked=1024,
        too_long=True,
    ),
    # The prompt was counted no further than it could fit.
    Refused(
        engine="vLLM 0.15",
        body=openai(
            "You passed 769 input tokens and requested 32000 output tokens. However, the model's "
            "context length is only 32768 tokens, resulting in a maximum input length of 768 "
            "tokens. Please reduce the length of the input prompt.",
            param="input_tokens",
            code=400,
        ),
        limit=32_768,
        too_long=True,
    ),
    Refused(
        engine="vLLM 0.15, a text that is much too long",
        body=openai(
            "You passed 500000 input characters and requested 32000 output tokens. However, the "
            "model's context length is only 32768 tokens, resulting in a maximum input length of "
            "768 tokens (at most 98304 characters). Please reduce the length of the input prompt."
        ),
        limit=32_768,
        too_long=True,
    ),
    Refused(
        engine="vLLM 0.15, an answer that is longer than the context",
        body=openai(
            "max_completion_tokens=64000cannot be greater than max_model_len=max_total_tokens="
            "32768. Please request fewer output tokens.",
            param="max_completion_tokens",
        ),
        limit=32_768,
    ),
    Refused(
        engine="vLLM 0.17, Workers AI",
        body=openai(
            "This model's maximum context length is 32768 tokens. However, you requested 32000 "
            "output tokens and your prompt contains at least 769 input tokens, for a total of at "
            "least 32769 tokens. Please reduce the length of the input prompt or the number of "
            "requested output tokens. (parameter=input_tokens, value=769)",
            param="input_tokens",
            code=400,
        ),
        limit=32_768,
        too_long=True,
    ),
    Refused(
        engine="vLLM 0.17, the prompt alone is too long",
        body=openai(
            "This model's maximum context length is 32768 tokens. However, you requested 0 output "
            "tokens and your prompt contains at least 32769 input tokens, for a total of at least "
            "32769 tokens."
        ),
        limit=32_768,
        asked=32_769,
        too_long=True,
    ),
    Refused(
        engine="SGLang 0.4, Together",
        body=flat(
            "The input (9000 tokens) is longer than the model's context length (8192 tokens)."
        ),
        limit=8192,
        asked=9000,
        too_long=True,
    ),
    Refused(
        engine="SGLang 0.5",
        body=flat(
            "Requested token count exceeds the model's maximum context length of 8192 tokens. You "
            "requested a total of 65000 tokens: 1000 tokens from the input messages and 64000 "
            "tokens for the completion. Please reduce the number of tokens in the input messages "
            "or the completion to fit within the limit."
        ),
        limit=8192,
        asked=1000,
        too_long=True,
    ),
    Refused(
        engine="SGLang 0.5, on the input alone",
        body=flat("Input length (9001) exceeds model's maximum context length (8192)."),
        limit=8192,
        asked=9001,
        too_long=True,
    ),
    Refused(
        engine="llama.cpp b6400",
        body={
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size. try increasing the "
                "context size or enable context shift",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 9000,
                "n_ctx": 8192,
            }
        },
        limit=8192,
        asked=9000,
        too_long=True,
    ),
    Refused(
        engine="llama.cpp b7000",
        body={
            "error": {
                "code": 400,
                "message": "request (9000 tokens) exceeds the available context size (8192 "
                "tokens), try increasing it",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 9000,
                "n_ctx": 8192,
            }
        },
        limit=8192,
        asked=9000,
        too_long=True,
    ),
    Refused(
        engine="llama-cpp-python 0.3",
        body=openai(
            "This model's maximum context length is 2048 tokens. However, you requested 66048 "
            "tokens (2048 in the messages, 64000 in the completion). Please reduce the length of "
            "the messages or completion.",
            param="messages",
            code="context_length_exceeded",
        ),
        limit=2048,
        asked=2048,
        too_long=True,
    ),
    Refused(
        engine="Ollama 0.12",
        body=openai("prompt too long; exceeded max context length by 1000 tokens"),
        too_long=True,
    ),
    Refused(
        engine="LM Studio 0.3",
        body={
            "error": "Trying to keep the first 9000 tokens when context the overflows. However, "
            "the model is loaded with context length of only 8192 tokens, which is not enough. "
            "Try to load the model with a larger context length, or provide a shorter input"
        },
        limit=8192,
        too_long=True,
    ),
    Refused(
        engine="TGI 3",
        body={
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 32768. "
            "Given: 1000 `inputs` tokens and 64000 `max_new_tokens`",
            "error_type": "validation",
        },
        status=422,
        limit=32_768,
        asked=1000,
        too_long=True,
    ),
    Refused(
        engine="OpenAI, of 2024",
        body=openai(
            "This model's maximum context length is 8192 tokens. However, your messages resulted "
            "in 9000 tokens. Please reduce the length of the messages.",
            param="messages",
            code="context_length_exceeded",
        ),
        limit=8192,
        asked=9000,
        too_long=True,
    ),
    Refused(
        engine="OpenAI and Azure, of 2025",
        body=openai(
            "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in "
            "300000 tokens. Please reduce the length of the messages.",
            param="messages",
            code="context_length_exceeded",
        ),
        limit=272_000,
        asked=300_000,
        too_long=True,
    ),
    Refused(
        engine="Mistral, of 2025",
        body={
            "object": "error",
            "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with "
            "32768 maximum context length",
            "type": "invalid_request_invalid_args",
            "param": None,
            "code": "3051",
        },
        limit=32_768,
        asked=40_000,
        too_long=True,
    ),
    Refused(
        engine="xAI, of 2025",
        body={
            "code": "Client specified an invalid argument",
            "error": "This model's maximum prompt length is 131072 but the request contains "
            "140000 tokens.",
        },
        limit=131_072,
        asked=140_000,
        too_long=True,
    ),
    # It does not say whether the answer counts.
    Refused(
        engine="Kimi, of 2025",
        body=openai(
            "Invalid request: Your request exceeded model token limit: 262144 (requested: 290000)"
        ),
        limit=262_144,
        too_long=True,
    ),
    Refused(
        engine="Qwen at DashScope, of 2025",
        body=openai(
            "<400> InternalError.Algo.InvalidParameter: Range of input length should be "
            "[1, 129024]",
            param=None,
            code="invalid_parameter_error",
        ),
        limit=129_024,
        too_long=True,
    ),
    Refused(
        engine="GLM at z.ai, of 2025",
        body={"error": {"code": "1261", "message": "Prompt exceeds max length"}},
        too_long=True,
    ),
    Refused(
        engine="Groq, of 2025",
        body=openai(
            "Please reduce the length of the messages or completion.",
            param="messages",
            code="context_length_exceeded",
        ),
        too_long=True,
    ),
    Refused(
        engine="Cerebras, of 2025",
        body={
            "message": "Please reduce the length of the messages or completion. Current length is "
            "9000 while limit is 8192",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        },
        limit=8192,
        asked=9000,
        too_long=True,
    ),
    Refused(
        engine="OpenRouter, of 2025",
        body={
            "error": {
                "message": "This endpoint's maximum context length is 131072 tokens. However, you "
                "requested about 194000 tokens (130000 of text input, 64000 in the output). "
                "Please reduce the length of either one.",
                "code": 400,
                "metadata": {"provider_name": None},
            }
        },
        limit=131_072,
        asked=130_000,
        too_long=True,
    ),
    Refused(
        engine="OpenRouter, in the words of a provider",
        body={
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {
                    "provider_name": "Together",
                    "raw": json.dumps(
                        openai(
                            "The input (9000 tokens) is longer than the model's context length "
                            "(8192 tokens)."
                        )
                    ),
                },
            }
        },
        limit=8192,
        asked=9000,
        too_long=True,
    ),
    Refused(
        engine="Fireworks, of 2025",
        body=openai("The prompt is too long: 140000, model maximum context length: 131071"),
        limit=131_071,
        asked=140_000,
        too_long=True,
    ),
    Refused(
        engine="Gemini's compatible API, of 2025",
        body=[
            {
                "error": {
                    "code": 400,
                    "message": "The input token count (1200000) exceeds the maximum number of "
                    "tokens allowed (1048576).",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        limit=1_048_576,
        asked=1_200_000,
        too_long=True,
    ),
    Refused(
        engine="Copilot, of 2025",
        body=openai(
            "prompt token count of 140000 exceeds the limit of 128000",
            code="model_max_prompt_tokens_exceeded",
        ),
        limit=128_000,
        asked=140_000,
        too_long=True,
    ),
]
BOUNDS = [
    Refused(
        engine="OpenAI and Azure",
        body=openai(
            "max_tokens is too large: 64000. This model supports at most 16384 completion tokens, "
            "whereas you provided 64000.",
            param="max_tokens",
            code="invalid_value",
        ),
        most=16_384,
    ),
    Refused(
        engine="OpenAI and Azure, models that reason",
        body=openai(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            param="max_tokens",
            code="unsupported_parameter",
        ),
        renames=True,
    ),
    Refused(
        engine="Groq",
        body=openai(
            "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` "
            "is less than the `context_window` for this model",
            param="max_tokens",
        ),
        most=8192,
    ),
    Refused(
        engine="DeepSeek",
        body=openai(
            "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
            param=None,
            code="invalid_request_error",
        ),
        most=8192,
    ),
    Refused(
        engine="Qwen at DashScope",
        body=openai(
            "<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 8192]",
            code="invalid_parameter_error",
        ),
        most=8192,
    ),
    Refused(
        engine="Bedrock's compatible API",
        body=openai(
            "The maximum tokens you requested exceeds the model limit of 8192. Try again with a "
            "maximum tokens value that is lower than 8192."
        ),
        most=8192,
    ),
    Refused(
        engine="Anthropic's compatible API",
        body=openai(
            "max_tokens: 64000 > 8192, which is the maximum allowed number of output tokens for "
            "claude-x"
        ),
        most=8192,
    ),
]
WORDS = [
    Refused(
        engine="OpenAI, a word that it does not know",
        body=openai("Unrecognized request argument supplied: top_k", param=None, code=None),
        words=("top_k",),
    ),
    Refused(
        engine="OpenAI, models that reason",
        body=openai(
            "Unsupported parameter: 'parallel_tool_calls' is not supported with this model.",
            param="parallel_tool_calls",
            code="unsupported_parameter",
        ),
        words=("parallel_tool_calls",),
    ),
    Refused(
        engine="OpenAI, models that do not",
        body=openai(
            "Unrecognized request argument supplied: reasoning_effort", param=None, code=None
        ),
        words=("reasoning_effort",),
    ),
    Refused(
        engine="Azure, before 2024-09-01",
        body=openai("Unrecognized request argument supplied: stream_options"),
        words=("stream_options",),
    ),
    Refused(
        engine="Groq, a word that it does not know",
        body=openai("property 'top_k' is unsupported, did you mean 'top_p'?", code=None),
        words=("top_k",),
    ),
    Refused(
        engine="Groq, a model that does not reason",
        body=openai("`reasoning_effort` is not supported with this model", param=None),
        words=("reasoning_effort",),
    ),
    Refused(
        engine="Ollama 0.9, a model that does not reason",
        body=openai('"llama3.2" does not support thinking', param=None, code=None),
        words=("reasoning_effort",),
    ),
    Refused(
        engine="Ollama 0.12, a value that it does not know",
        body=openai(
            'invalid reasoning value: \'minimal\' (must be "high", "medium", "low", or "none")'
        ),
        words=("reasoning_effort",),
    ),
    Refused(
        engine="xAI, a model that does not say how much it reasons",
        body={
            "code": "Client specified an invalid argument",
            "error": "Model grok-4 does not support parameter reasoningEffort.",
        },
        words=("reasoning_effort",),
    ),
    Refused(
        engine="Mistral",
        body={
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "stream_options"],
                        "msg": "Extra inputs are not permitted",
                        "input": {"include_usage": True},
                    }
                ]
            },
            "type": "invalid_request_error",
        },
        status=422,
        words=("stream_options",),
    ),
    Refused(
        engine="FastAPI with a strict model",
        body={
            "detail": [
                {
                    "type": "extra_forbidden",
                    "loc": ["body", "parallel_tool_calls"],
                    "msg": "Extra inputs are not permitted",
                    "input": False,
                }
            ]
        },
        status=422,
        words=("parallel_tool_calls",),
    ),
    Refused(
        engine="vLLM 0.10, a value that it does not know",
        body=openai(
            "[{'type': 'literal_error', 'loc': ('body', 'reasoning_effort'), 'msg': \"Input should "
            "be 'low', 'medium' or 'high'\", 'input': 'minimal'}]",
            code=400,
        ),
        words=("reasoning_effort",),
    ),
    Refused(
        engine="Gemini's compatible API",
        body=[
            {
                "error": {
                    "code": 400,
                    "message": 'Invalid JSON payload received. Unknown name "top_k": Cannot find '
                    "field.",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        words=("top_k",),
    ),
]
# What says nothing that could be learned.
OTHERS = [
    Refused(
        engine="llama.cpp b7000, a strict template",
        body={
            "error": {
                "code": 400,
                "message": "Unable to generate parser for this template. Automatic parser "
                "generation failed: Jinja Exception: System message must be at the beginning.",
                "type": "invalid_request_error",
            }
        },
    ),
    Refused(
        engine="vLLM, a strict template",
        body=flat("Conversation roles must alternate user/assistant/user/assistant/..."),
    ),
    Refused(
        engine="Ollama, a model without tools",
        body=openai('"gemma3" does not support tools'),
    ),
    Refused(
        engine="FastAPI, another number",
        body={
            "detail": [
                {
                    "type": "less_than_equal",
                    "loc": ["body", "temperature"],
                    "msg": "Input should be less than or equal to 2",
                    "input": 3,
                }
            ]
        },
        status=422,
    ),
]
EVERY = [*CONTEXTS, *BOUNDS, *WORDS, *OTHERS]
