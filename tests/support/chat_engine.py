"""Engines with chat completions alone, of three habits, each as strict as the real one can be: about
the order of messages, about roles, and about members that it does not know.

    vllm        calls in pieces, `tool_calls` at the end, errors as one flat object
    llamacpp    reasoning first, a refusal of its template is a 500, no `reasoning_effort`
    ollama      each call whole, `stop` at the end, no `parallel_tool_calls`

Whoever asks with a shell among its tools gets two calls of it at once, twice, and then a text that
says whether the results of all four have come; who asks without one gets a short text. So an agent
that is asked anything does a task of three turns.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

from tests.support.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROUNDS = 2
# The blocks of its prefix cache, and the seconds that it keeps one.
CACHE_BLOCKS, CACHE_LIFE = 16_384, 300.0
# The file of the agent's folder to which each command appends what it prints.
RAN = "ran"
DONE, LOST = "DONE: all four results have come.", "LOST:"
# The names of the tool that runs a command, in Claude Code, Codex and opencode.
SHELLS = ("Bash", "bash", "exec_command", "shell_command", "shell", "local_shell")
# Of a chat completion, what all engines know.
KNOWN = frozenset(
    {
        *("model", "messages", "stream", "tools", "tool_choice", "temperature", "top_p", "stop"),
        *("max_tokens", "max_completion_tokens", "response_format", "seed", "user", "n"),
        *("frequency_penalty", "presence_penalty", "stream_options", "parallel_tool_calls"),
        *("reasoning_effort", "top_k", "store", "metadata"),
    }
)


class Habit(NamedTuple):
    """What is peculiar to an engine: the members that it *refuses*, and its ways to answer."""

    refuses: frozenset[str]
    reasons: bool
    whole_calls: bool
    finish: str
    flat_errors: bool
    template_status: int


HABITS: Mapping[str, Habit] = {
    "vllm": Habit(frozenset(), False, False, "tool_calls", True, 400),
    "llamacpp": Habit(frozenset({"reasoning_effort"}), True, False, "tool_calls", False, 500),
    "ollama": Habit(
        frozenset({"parallel_tool_calls", "reasoning_effort"}), False, True, "stop", False, 400
    ),
}


class BadConversationError(Exception):
    """A conversation that the template of a model refuses."""


class ChatEngine:
    """An engine of this *habit*. *turns* counts the answers to those who had a shell, and *faults*
    has what it has refused to them. It breaks off this *share* of its streamed calls, anywhere, as
    *seed* says; *cuts* counts these.
    """

    def __init__(self, habit: str, share: float = 0.0, seed: str = "") -> None:
        self.habit = HABITS[habit]
        self.cuts = 0
        self._share, self._dice = share, random.Random(seed)
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.turns = 0
        self._cache = PrefixCache(CACHE_BLOCKS, CACHE_LIFE)
        self.app = web.Application(client_max_size=1 << 26)
        self.app.router.add_post("/v1/chat/completions", self._complete)
        self.app.router.add_get("/v1/models", self._models)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def _refusal(self, body: dict[str, Any], status: int, message: str) -> web.Response:
        if shell_of(body.get("tools") or []) is not None:
            self.faults.append(message)
        if self.habit.flat_errors:
            flat = {"object": "error", "message": message, "type": "BadRequestError"}
            return web.json_response({**flat, "param": None, "code": status}, status=status)
        kind = "server_error" if status == 500 else "invalid_request_error"
        error = {"code": status, "message": message, "type": kind}
        return web.json_response({"error": error}, status=status)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        for name in body:
            if name not in KNOWN or name in self.habit.refuses:
                return self._refusal(body, 400, f"unknown field: {name}")
        try:
            check(body["messages"])
        except BadConversationError as exc:
            return self._refusal(body, self.habit.template_status, str(exc))
        self.bodies.append(body)
        shell = shell_of(body.get("tools") or [])
        self.turns += shell is not None
        used = self._usage(body)
        message, finish = self._answer(body["messages"], shell)
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return web.json_response(self._object("chat.completion", [choice], used))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        asked = (body.get("stream_options") or {}).get("include_usage")
        deltas = list(self._deltas(message))
        cut = len(deltas)
        if "tool_calls" in message and self._dice.random() < self._share:
            self.cuts += 1
            cut = self._dice.randrange(len(deltas))
        for number, delta in enumerate(deltas):
            if number == cut:
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(
                self._event([{"index": 0, "delta": delta, "finish_reason": None}])
            )
        await response.write(self._event([{"index": 0, "delta": {}, "finish_reason": finish}]))
        if asked:
            await response.write(self._event([], used))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        """Read the prompt of *body*, and return the tokens of an answer to it."""
        asked, cached = self._cache.read(body, time.monotonic())
        used = {"prompt_tokens": asked, "completion_tokens": 12, "total_tokens": asked + 12}
        return {**used, "prompt_tokens_details": {"cached_tokens": cached}}

    def _answer(
        self, messages: list[dict[str, Any]], shell: dict[str, Any] | None
    ) -> tuple[dict[str, Any], str]:
        """Return the message of the assistant to *messages*, and how it has finished."""
        if shell is None:
            return {"role": "assistant", "content": "A short title"}, "stop"
        rounds = sum(bool(message.get("tool_calls")) for message in messages)
        results = " ".join(
            text_of(message) for message in messages if message.get("role") == "tool"
        )
        missing = [
            word
            for number in range(min(rounds, ROUNDS))
            for word in words(number)
            if word not in results
        ]
        if missing:
            content = f"{LOST} {' '.join(missing)}"
            return {"role": "assistant", "content": content}, "stop"
        if rounds >= ROUNDS:
            return {"role": "assistant", "content": DONE}, "stop"
        calls = [
            {
                "id": f"call_{uuid.uuid4().hex[:12]}",
                "type": "function",
                "function": {"name": shell["name"], "arguments": arguments_for(shell, word)},
            }
            for word in words(rounds)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
        if self.habit.reasons:
            message["reasoning_content"] = "Two commands are needed."
        return message, self.habit.finish

    def _deltas(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield *message* in pieces."""
        yield {"role": "assistant", "content": None if self.habit.reasons else ""}
        for word in (message.get("reasoning_content") or "").split():
            yield {"reasoning_content": f"{word} "}
        for word in (message["content"] or "").split():
            yield {"content": f"{word} "}
        for index, call in enumerate(message.get("tool_calls") or []):
            function = call["function"]
            if self.habit.whole_calls:
                yield {"tool_calls": [{**call, "index": index}]}
                continue
            head = {"name": function["name"], "arguments": ""}
            yield {"tool_calls": [{**call, "index": index, "function": head}]}
            text = function["arguments"]
            for start in range(0, len(text), 7):
                piece = {"arguments": text[start : start + 7]}
                yield {"tool_calls": [{"index": index, "function": piece}]}

    def _object(
        self, kind: str, choices: list[dict[str, Any]], used: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        fields = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "m"}
        return {**fields, "choices": choices, **({"usage": used} if used else {})}

    def _event(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> bytes:
        chunk = self._object("chat.completion.chunk", choices, used)
        return b"data: %b\n\n" % json.dumps(chunk).encode()


def words(number: int) -> tuple[str, str]:
    """What the two commands of a round print."""
    return f"round-{number}-a", f"round-{number}-b"


def shell_of(tools: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The tool among *tools* that runs a command."""
    by_name = {tool["function"]["name"]: tool["function"] for tool in tools}
    return next((by_name[name] for name in SHELLS if name in by_name), None)


def arguments_for(shell: dict[str, Any], word: str) -> str:
    """The arguments by which *shell* prints *word*, by the schema of its parameters."""
    properties = shell["parameters"]["properties"]
    arguments: dict[str, Any] = {}
    for name in ("command", "cmd"):
        if name in properties:
            listed = properties[name].get("type") == "array"
            command = f"echo {word} | tee -a {RAN}"
            arguments[name] = ["sh", "-c", command] if listed else command
    if "description" in properties:
        arguments["description"] = f"Print {word}"
    return json.dumps(arguments)


def text_of(message: dict[str, Any]) -> str:
    """The text of *message*."""
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content)
    return content or ""


def check(messages: list[dict[str, Any]]) -> None:
    """Check the order and the roles of *messages*.

    Raises:
        BadConversationError: a template would refuse them.
    """
    if messages and messages[0]["role"] == "system":
        messages = messages[1:]
    previous = ""
    open_calls: list[Any] = []
    for message in messages:
        role = message["role"]
        if role not in {"user", "assistant", "tool"}:
            raise BadConversationError(f"a {role} message that is not the first")
        if open_calls and (role != "tool" or message.get("tool_call_id") != open_calls[0]):
            raise BadConversationError("calls are not followed by their results in their order")
        if role == "tool":
            if not open_calls:
                raise BadConversationError("a result without its call")
            open_calls.pop(0)
        elif role == previous or (not previous and role != "user"):
            raise BadConversationError("Conversation roles must alternate user/assistant")
        if role == "assistant":
            open_calls = [call["id"] for call in message.get("tool_calls") or []]
            if any(
                not isinstance(call["function"]["arguments"], str)
                or not isinstance(json.loads(call["function"]["arguments"]), dict)
                for call in message.get("tool_calls") or []
            ):
                raise BadConversationError("arguments that are no object in a text")
        if role == "user" and not text_of(message) and isinstance(message.get("content"), str):
            raise BadConversationError("an empty message")
        previous = role
    if open_calls:
        raise BadConversationError("calls without results at the end")
