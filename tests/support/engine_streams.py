"""The chunks that engines write, by engine and version: the format with its habits, and texts of our
own.

The sources are the engines' own code (vLLM's `chat_completion/serving.py`, SGLang's
`serving_chat.py`, llama.cpp's `server-task.cpp` and `server-chat.cpp`, Ollama's `openai.go`), what
their users have reported (ollama#7881, ollama#15457, sglang#6310), the examples in the documentation
of hosted APIs, and an answer of llama-cpp-python 0.3.36 itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome é\U0001f600"}'
THOUGHT, TEXT = "Hm, two cities.", 'I look "both" up. \U0001f600'


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStream:
    """The *events* of an answer, and what they mean: *thought*, *text*, the *calls* as their ids
    and arguments, and the *usage* as the tokens of the prompt, of them from a cache, and those of
    the answer; None: it has none. *fault*: it ends with an error.
    """

    engine: str
    events: tuple[Any, ...]
    thought: str = ""
    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    finish: str = "stop"
    usage: tuple[int, int, int] | None = (20, 0, 9)
    fault: bool = False
    separator: str = "\n\n"

    @property
    def data(self) -> bytes:
        """The bytes of the body."""
        return b"".join(map(self.written, self.events))

    def written(self, event: Any) -> bytes:
        """The bytes of one event."""
        shown = event if isinstance(event, str) else f"data: {json.dumps(event)}"
        return f"{shown}{self.separator}".encode()


def chunk(delta: Any, finish: str | None = None, *, choice: Any = None, **top: Any) -> Any:
    """A chunk with one choice, which has *choice* beside its delta."""
    one = {"index": 0, "delta": delta, "finish_reason": finish, **(choice or {})}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**head, "choices": [one], **top}


def counted(prompt: int = 20, answer: int = 9, **more: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        **more,
    }


def alone(usage: Any, **more: Any) -> Any:
    """A chunk that has nothing but a usage."""
    return {**chunk({}), "choices": [], "usage": usage, **more}


def pieces(text: str, size: int = 6) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def calling(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    """A piece of a call."""
    function: dict[str, Any] = {"arguments": arguments}
    if "name" in more:
        function = {"name": more.pop("name"), **function}
    return {"index": index, **more, "function": function}


DONE = "data: [DONE]"
CACHED: dict[str, Any] = {"prompt_tokens_details": {"cached_tokens": 16}}


def _vllm(field_name: str) -> tuple[Any, ...]:
    plain = {"logprobs": None}
    return (
        chunk({"role": "assistant", "content": ""}, choice=plain),
        *[chunk({field_name: part}, choice=plain) for part in pieces(THOUGHT)],
        *[chunk({"content": part}, choice=plain) for part in pieces(TEXT)],
        chunk(
            {
                "tool_calls": [
                    {
                        "id": "chatcmpl-tool-0a",
                        "type": "function",
                        "index": 0,
                        "function": {"name": "look_up"},
                    }
                ]
            },
            choice=plain,
        ),
        *[chunk({"tool_calls": [calling(0, part)]}, choice=plain) for part in pieces(PARIS)],
        chunk(
            {
                "tool_calls": [
                    calling(1, "", id="chatcmpl-tool-0b", type="function", name="look_up")
                ]
            }
        ),
        *[chunk({"tool_calls": [calling(1, part)]}, choice=plain) for part in pieces(ROME)],
        chunk({"content": ""}, "tool_calls", choice={**plain, "stop_reason": None}),
        alone(counted()),
        DONE,
    )


def _sglang(**more: Any) -> dict[str, Any]:
    return {"role": None, "content": None, "reasoning_content": None, "tool_calls": None, **more}


def _sglang_chunk(finish: str | None = None, **more: Any) -> Any:
    return chunk(
        _sglang(**more), finish, choice={"logprobs": None, "matched_stop": None}, usage=None
    )


def _ollama(**more: Any) -> Any:
    return chunk({"role": "assistant", "content": "", **more}, system_fingerprint="fp_ollama")


def _dashscope(delta: Any, finish: str | None = None) -> Any:
    return chunk(delta, finish, choice={"logprobs": None}, usage=None, system_fingerprint=None)


STREAMS = [
    *[
        EngineStream(
            engine=f"vLLM {version}",
            events=_vllm(name),
            thought=THOUGHT,
            text=TEXT,
            calls=(("chatcmpl-tool-0a", PARIS), ("chatcmpl-tool-0b", ROME)),
            finish="tool_calls",
        )
        for version, name in (("0.10", "reasoning_content"), ("0.15", "reasoning"))
    ],
    EngineStream(
        engine="vLLM 0.15, usage in each chunk, a stop sequence",
        events=(
            chunk({"role": "assistant", "content": ""}, usage=counted(answer=0)),
            *[chunk({"content": part}, usage=counted(answer=1)) for part in pieces(TEXT)],
            chunk({}, "stop", choice={"stop_reason": "END"}, usage=counted()),
            alone(counted(**CACHED)),
            DONE,
        ),
        text=TEXT,
        usage=(20, 16, 9),
    ),
    EngineStream(
        engine="vLLM 0.15, an error in its midst",
        events=(
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": TEXT}),
            {
                "error": {
                    "message": "EngineCore encountered an issue.",
                    "type": "InternalServerError",
                    "param": None,
                    "code": 500,
                }
            },
            DONE,
        ),
        text=TEXT,
        usage=None,
        fault=True,
    ),
    EngineStream(
        engine="SGLang 0.5",
        events=(
            _sglang_chunk(role="assistant", content=""),
            *[_sglang_chunk(reasoning_content=part) for part in pieces(THOUGHT)],
            *[_sglang_chunk(content=part) for part in pieces(TEXT)],
            _sglang_chunk(
                tool_calls=[calling(0, "", id="call_a", type="function", name="look_up")]
            ),
            *[
                _sglang_chunk(
                    tool_calls=[
                        {
                            "id": None,
                            "index": 0,
                            "type": "function",
                            "function": {"name": None, "arguments": part},
                        }
                    ]
                )
                for part in pieces(PARIS)
            ],
            chunk(_sglang(), "tool_calls", choice={"matched_stop": 151_645}),
            alone(counted(reasoning_tokens=3, prompt_tokens_details=None)),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        calls=(("call_a", PARIS),),
        finish="tool_calls",
    ),
    EngineStream(
        engine="SGLang 0.5, the ids of Kimi K2",
        events=(
            _sglang_chunk(role="assistant", content=""),
            _sglang_chunk(
                tool_calls=[
                    calling(0, PARIS, id="functions.look_up:0", type="function", name="look_up")
                ]
            ),
            _sglang_chunk(
                tool_calls=[
                    calling(1, ROME, id="functions.look_up:1", type="function", name="look_up")
                ]
            ),
            _sglang_chunk("tool_calls"),
            DONE,
        ),
        calls=(("functions.look_up:0", PARIS), ("functions.look_up:1", ROME)),
        finish="tool_calls",
        usage=None,
    ),
    EngineStream(
        engine="llama.cpp b7000",
        events=(
            chunk({"role": "assistant", "content": None}),
            *[chunk({"reasoning_content": part}) for part in pieces(THOUGHT)],
            *[chunk({"content": part}) for part in pieces(TEXT)],
            chunk(
                {
                    "tool_calls": [
                        {
                            "index": 0,
                            "id": "Xk9vQ2mZr7Lp0sTaWcYbNd3HfJgKeUiO",
                            "type": "function",
                            "function": {"name": "look_up", "arguments": "{"},
                        }
                    ]
                }
            ),
            *[chunk({"tool_calls": [calling(0, part)]}) for part in pieces(PARIS[1:])],
            chunk({}, "tool_calls"),
            alone(counted(**CACHED), timings={"cache_n": 16, "prompt_n": 4, "prompt_ms": 9.5}),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        calls=(("Xk9vQ2mZr7Lp0sTaWcYbNd3HfJgKeUiO", PARIS),),
        finish="tool_calls",
        usage=(20, 16, 9),
    ),
    EngineStream(
        engine="llama.cpp b7000, an error in its midst",
        events=(
            chunk({"role": "assistant", "content": None}),
            chunk({"content": TEXT}),
            {
                "error": {
                    "code": 500,
                    "message": "context shift is disabled",
                    "type": "server_error",
                }
            },
        ),
        text=TEXT,
        usage=None,
        fault=True,
    ),
    # The field of an event that the standard does not know, and no end.
    EngineStream(
        engine="llama.cpp b4000, an error in its midst",
        events=(
            chunk({"role": "assistant", "content": None}),
            chunk({"content": TEXT}),
            'error: {"code":500,"message":"slot unavailable","type":"server_error"}',
        ),
        text=TEXT,
        usage=None,
        fault=True,
    ),
    EngineStream(
        engine="llama-cpp-python 0.3, each piece in two forms",
        events=(
            chunk(
                {"role": "assistant", "content": None, "function_call": None, "tool_calls": None},
                choice={"logprobs": None},
            ),
            *[
                chunk(
                    {
                        "role": None,
                        "content": None,
                        "function_call": {"name": "look_up", "arguments": part},
                        "tool_calls": [
                            calling(
                                0,
                                part,
                                id="call__0_look_up_cmpl-c346d699-ea5d-4ade-b104-2ffacbb8a120-long",
                                type="function",
                                name="look_up",
                            )
                        ],
                    },
                    choice={"logprobs": None},
                )
                for part in pieces(PARIS, 1)
            ],
            chunk(
                {"role": None, "content": None, "function_call": None, "tool_calls": None},
                "tool_calls",
            ),
            DONE,
        ),
        calls=(("call__0_look_up_cmpl-c346d699-ea5d-4ade-b104-2ffacbb8a120-long", PARIS),),
        finish="tool_calls",
        usage=None,
    ),
    EngineStream(
        engine="Ollama 0.12",
        events=(
            *[_ollama(reasoning=part) for part in pieces(THOUGHT)],
            *[_ollama(content=part) for part in pieces(TEXT)],
            _ollama(tool_calls=[calling(0, PARIS, id="call_a", type="function", name="look_up")]),
            _ollama(tool_calls=[calling(1, ROME, id="call_b", type="function", name="look_up")]),
            chunk({"role": "assistant", "content": ""}, "tool_calls"),
            alone(counted(), system_fingerprint="fp_ollama"),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        calls=(("call_a", PARIS), ("call_b", ROME)),
        finish="tool_calls",
    ),
    EngineStream(
        engine="Ollama 0.20, each call with the index 0",
        events=(
            _ollama(tool_calls=[calling(0, PARIS, id="call_a", type="function", name="look_up")]),
            _ollama(tool_calls=[calling(0, ROME, id="call_b", type="function", name="look_up")]),
            chunk({"role": "assistant", "content": ""}, "stop"),
            DONE,
        ),
        calls=(("call_a", PARIS), ("call_b", ROME)),
        usage=None,
    ),
    EngineStream(
        engine="Ollama 0.4, calls without an index",
        events=(
            _ollama(
                tool_calls=[
                    {
                        "id": "call_a",
                        "type": "function",
                        "function": {"name": "look_up", "arguments": PARIS},
                    },
                    {
                        "id": "call_b",
                        "type": "function",
                        "function": {"name": "look_up", "arguments": ROME},
                    },
                ]
            ),
            chunk({"role": "assistant", "content": ""}, "stop"),
            DONE,
        ),
        calls=(("call_a", PARIS), ("call_b", ROME)),
        usage=None,
    ),
    EngineStream(
        engine="Kimi K2 at Moonshot, of 2025",
        events=(
            chunk({"role": "assistant", "content": ""}),
            *[chunk({"reasoning_content": part}) for part in pieces(THOUGHT)],
            *[chunk({"content": part}) for part in pieces(TEXT)],
            chunk(
                {
                    "tool_calls": [
                        calling(0, "", id="functions.look_up:0", type="function", name="look_up")
                    ]
                }
            ),
            *[chunk({"tool_calls": [calling(0, part)]}) for part in pieces(PARIS)],
            chunk(
                {
                    "tool_calls": [
                        calling(1, "", id="functions.look_up:1", type="function", name="look_up")
                    ]
                }
            ),
            *[chunk({"tool_calls": [calling(1, part)]}) for part in pieces(ROME)],
            # The usage stands in the choice.
            chunk({}, "tool_calls", choice={"usage": counted(cached_tokens=16)}),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        calls=(("functions.look_up:0", PARIS), ("functions.look_up:1", ROME)),
        finish="tool_calls",
        usage=(20, 16, 9),
    ),
    EngineStream(
        engine="GLM 4.6 at z.ai, of 2025",
        events=(
            *[chunk({"role": "assistant", "reasoning_content": p}) for p in pieces(THOUGHT)],
            *[chunk({"role": "assistant", "content": p}) for p in pieces(TEXT)],
            chunk(
                {
                    "role": "assistant",
                    "tool_calls": [
                        calling(
                            0,
                            PARIS,
                            id="call_-8231168139794583938",
                            type="function",
                            name="look_up",
                        )
                    ],
                }
            ),
            chunk({"role": "assistant", "content": ""}, "tool_calls", usage=counted(**CACHED)),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        calls=(("call_-8231168139794583938", PARIS),),
        finish="tool_calls",
        usage=(20, 16, 9),
    ),
    EngineStream(
        engine="Qwen at DashScope, of 2025",
        events=(
            _dashscope({"role": "assistant", "content": None, "reasoning_content": ""}),
            *[
                _dashscope({"content": None, "reasoning_content": part})
                for part in pieces(THOUGHT)
            ],
            *[_dashscope({"content": part, "reasoning_content": None}) for part in pieces(TEXT)],
            _dashscope(
                {
                    "content": None,
                    "tool_calls": [
                        calling(0, PARIS[:4], id="call_a", type="function", name="look_up")
                    ],
                }
            ),
            *[
                {
                    **_dashscope({}),
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"tool_calls": [calling(0, part, id="", type="function")]},
                        }
                    ],
                }
                for part in pieces(PARIS[4:])
            ],
            _dashscope(
                {
                    "content": None,
                    "tool_calls": [{"index": 0, "id": "", "type": "function", "function": {}}],
                }
            ),
            _dashscope({}, "tool_calls"),
            alone(counted()),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        calls=(("call_a", PARIS),),
        finish="tool_calls",
    ),
    EngineStream(
        engine="Groq, of 2025",
        events=(
            chunk({"role": "assistant", "content": ""}, x_groq={"id": "req_1"}),
            *[chunk({"reasoning": part}) for part in pieces(THOUGHT)],
            *[chunk({"content": part}) for part in pieces(TEXT)],
            chunk({}, "stop", x_groq={"id": "req_1", "usage": counted()}),
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
    ),
    EngineStream(
        engine="Azure, of 2025",
        events=(
            {
                "id": "",
                "object": "",
                "created": 0,
                "model": "",
                "choices": [],
                "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}],
            },
            chunk({"role": "assistant", "content": "", "refusal": None}),
            *[
                chunk({"content": part}, choice={"content_filter_results": {}})
                for part in pieces(TEXT)
            ],
            chunk({}, "stop", choice={"content_filter_results": {}}),
            alone(counted()),
            DONE,
        ),
        text=TEXT,
    ),
    EngineStream(
        engine="OpenRouter, of 2025, and lines that end as on Windows",
        events=(
            ": OPENROUTER PROCESSING",
            *[
                chunk({"role": "assistant", "content": "", "reasoning": part})
                for part in pieces(THOUGHT)
            ],
            *[chunk({"role": "assistant", "content": part}) for part in pieces(TEXT)],
            chunk(
                {"role": "assistant", "content": ""},
                "stop",
                choice={"native_finish_reason": "stop"},
            ),
            {**chunk({"role": "assistant", "content": ""}), "usage": counted()},
            DONE,
        ),
        thought=THOUGHT,
        text=TEXT,
        separator="\r\n\r\n",
    ),
]
