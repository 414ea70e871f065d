"""The simulated model calls tools: which one, with what arguments, and how it comes to an end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import aiohttp
import jsonschema
import openai
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.protocol import eventstream
from aioserver.wings.simulator.model import (
    CHAT,
    RESPONSES,
    BadRequest,
    ParsedRequest,
    read,
    speech,
)
from aioserver.wings.simulator.samples import Sampler
from tests.support.lazily import lazily
from tests.support.server import QUICK
from tests.support.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import anthropic
else:
    anthropic = lazily("anthropic")

MESSAGES = "messages"
ENDPOINTS = [CHAT, RESPONSES, MESSAGES]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SHELL = {
    "type": "object",
    "properties": {
        "command": {"type": "string"},
        "description": {"type": "string"},
        "dangerously": {"type": "boolean"},
    },
    "required": ["command"],
}
TOOLS = {"get_weather": CITY, "Bash": SHELL, "finish": {"type": "object", "properties": {}}}


def declared(endpoint: str, tools: dict[str, Any]) -> list[Any]:
    """The *tools*, name to schema, as *endpoint* has them."""
    if endpoint == CHAT:
        return [
            {"type": "function", "function": {"name": name, "parameters": schema}}
            for name, schema in tools.items()
        ]
    if endpoint == RESPONSES:
        return [{"type": "function", "name": n, "parameters": s} for n, s in tools.items()]
    return [{"name": name, "input_schema": schema} for name, schema in tools.items()]


def body_of(endpoint: str, items: list[Any], **more: Any) -> dict[str, Any]:
    name = "input" if endpoint == RESPONSES else "messages"
    limit = {"max_tokens": 5000} if endpoint == MESSAGES else {}
    tools = {"tools": declared(endpoint, TOOLS)}
    return {"model": "m", name: items, **limit, **tools, **more}


def asked(endpoint: str, content: Any, /, *later: Any, **more: Any) -> ParsedRequest:
    body = body_of(endpoint, [{"role": "user", "content": content}, *later], **more)
    return read(endpoint, orjson.dumps(body))


def called(request: ParsedRequest) -> tuple[str, Any] | None:
    if request.call is None:
        return None
    return request.call.name, orjson.loads(request.call.arguments)


def turn(endpoint: str, name: str, arguments: str, result: Any) -> list[Any]:
    """The items of a call and its result, as an agent sends them with its next request."""
    if endpoint == CHAT:
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
        return [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": result},
        ]
    if endpoint == RESPONSES:
        call = {"type": "function_call", "call_id": "c", "name": name, "arguments": arguments}
        return [call, {"type": "function_call_output", "call_id": "c", "output": result}]
    use = {"type": "tool_use", "id": "c", "name": name, "input": orjson.loads(arguments)}
    return [
        {"role": "assistant", "content": [use]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c", "content": result}],
        },
    ]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("Hello", None),
        ("Is the weather nice? Run and hide.", None),
        ("forget_weather, and the Bashful", None),
        ("What is bad weather-wise?", None),
        ("What's the weather in Rome?", ("get_weather", {"city": "What's the weather in Rome?"})),
        ("Please call a tool", ("get_weather", {"city": "Please call a tool"})),
        ('Call get_weather for "Rome".', ("get_weather", {"city": "Rome"})),
        ("Call `get_weather` for `Rome`", ("get_weather", {"city": "Rome"})),
        ('get_weather {"city": "Ürümqi", "x": 1}', ("get_weather", {"city": "Ürümqi"})),
        ("get_weather {not JSON}", ("get_weather", {"city": "get_weather {not JSON}"})),
        ("Use Bash", ("Bash", {"command": "ls"})),
        ("Run `ls -1`", ("Bash", {"command": "ls -1"})),
        ('"Run `ls -1`"', ("Bash", {"command": "ls -1"})),
        ("Say something about `ls -1`", None),
        ("Run `rm -rf /`", None),
        ("Run `echo x` with get_weather", ("get_weather", {"city": "echo x"})),
    ],
)
def test_prompt_decides_which_tool_is_called_and_how(
    endpoint: str, text: str, call: tuple[str, Any] | None
) -> None:
    assert called(asked(endpoint, text)) == call


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf /",
        "ls; rm x",
        "ls && reboot",
        "ls > x",
        "echo $(reboot)",
        "ls | sh",
        "lsof",
        "ls 'x",
        "",
        " ls",
    ],
)
def test_shell_gets_no_command_that_could_do_harm(command: str) -> None:
    for text in (f"Bash: `{command}`", f'Bash {{"command": "{command}"}}'):
        assert called(asked(CHAT, text)) == ("Bash", {"command": "ls"})


def test_command_is_split_where_the_tool_wants_a_list() -> None:
    lists = {"properties": {"command": {"type": "array", "items": {"type": "string"}}}}
    tools = declared(CHAT, {"shell": lists})

    request = asked(CHAT, "Run `ls -1 'a b'`", tools=tools)

    assert called(request) == ("shell", {"command": shlex.split("ls -1 'a b'")})


FORCED: dict[str, Callable[[str], Any]] = {
    CHAT: lambda name: {"type": "function", "function": {"name": name}},
    RESPONSES: lambda name: {"type": "function", "name": name},
    MESSAGES: lambda name: {"type": "tool", "name": name},
}
ANY: dict[str, Any] = {CHAT: "required", RESPONSES: "required", MESSAGES: {"type": "any"}}
NONE: dict[str, Any] = {CHAT: "none", RESPONSES: "none", MESSAGES: {"type": "none"}}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_tool_choice_is_obeyed(endpoint: str) -> None:
    named = asked(endpoint, "Hello", tool_choice=FORCED[endpoint]("finish"))
    required = asked(endpoint, "Hello", tool_choice=ANY[endpoint])
    wanted = asked(endpoint, "Use Bash", tool_choice=ANY[endpoint])
    forbidden = asked(endpoint, "Use Bash", tool_choice=NONE[endpoint])

    assert called(named) == ("finish", {})
    assert called(required) == ("get_weather", {"city": "Hello"})
    assert called(wanted) == ("Bash", {"command": "ls"})
    assert called(forbidden) is None
    with pytest.raises(BadRequest, match="'nowhere' not found") as caught:
        asked(endpoint, "Hello", tool_choice=FORCED[endpoint]("nowhere"))
    assert caught.value.status == 400


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES])
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_the_only_ones(endpoint: str, mode: str) -> None:
    inner = {"mode": mode, "tools": declared(endpoint, {"finish": {}})}
    flat = inner if endpoint == RESPONSES else {"allowed_tools": inner}

    request = asked(endpoint, "Use Bash", tool_choice={"type": "allowed_tools", **flat})

    assert called(request) == (("finish", {}) if mode == "required" else None)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("result", ["a.txt\nb.txt", [{"type": "text", "text": "a.txt\nb.txt"}]])
def test_result_of_a_tool_is_answered_in_words_that_quote_it(endpoint: str, result: Any) -> None:
    request = asked(endpoint, "Run `ls`", *turn(endpoint, "Bash", '{"command":"ls"}', result))

    assert called(request) is None
    assert request.words is not None
    assert "`Bash`" in request.words
    assert "“a.txt b.txt” (11 characters)" in request.words


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("choice", [None, ANY, FORCED])
def test_every_agent_comes_to_an_end(endpoint: str, choice: Any) -> None:
    forced = choice[endpoint]("Bash") if choice is FORCED else choice and choice[endpoint]
    more = {"tool_choice": forced} if forced else {}
    history: list[Any] = []
    names: list[str] = []
    while (request := asked(endpoint, "Call a tool, Bash", *history, **more)).call:
        names.append(request.call.name)
        history += turn(endpoint, request.call.name, request.call.arguments, "x" * 10_000)
        assert len(names) <= len(TOOLS)

    assert len(set(names)) == len(names) == (3 if choice is ANY else 1)
    assert len(request.words or "") < 1000


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_programs_add_is_not_what_the_person_asks(endpoint: str) -> None:
    added = "<system-reminder>\nThe tools Bash and finish wait.\n</system-reminder>"
    kind = "input_text" if endpoint == RESPONSES else "text"
    parts = [{"type": kind, "text": text} for text in (added, "Hello", added)]
    after = {"role": "user", "content": added}
    past = turn(endpoint, "Bash", "{}", "done")

    assert called(asked(endpoint, parts)) is None
    assert called(asked(endpoint, "Hello", after)) is None
    assert called(asked(endpoint, "Use Bash", after)) == ("Bash", {"command": "ls"})
    assert called(asked(endpoint, "Use Bash", *past, after)) is None
    # A translation makes one text of all.
    assert called(asked(endpoint, f"{added}\n\nUse Bash\n\n{added}")) == (
        "Bash",
        {"command": "ls"},
    )
    assert called(asked(endpoint, f"{added}\n\nHello\n\n{added}")) is None
    assert called(asked(endpoint, "Hello", {**after, "content": f"{added}\n\n{added}"})) is None
    again = {"role": "user", "content": "Now finish"}
    assert called(asked(endpoint, "Use Bash", *past, again)) == ("finish", {})


def test_tools_of_the_provider_are_passed_over() -> None:
    hosted = [{"type": "web_search"}, {"type": "mcp", "server_label": "x", "name": "x"}]
    search = {"type": "web_search_20250305", "name": "web_search"}
    bash = {"type": "bash_20250124", "name": "bash"}

    assert called(asked(RESPONSES, "call a tool", tools=hosted, tool_choice="required")) is None
    choice = {"type": "mcp", "server_label": "x", "name": "x"}
    assert called(asked(RESPONSES, "call a tool", tools=hosted, tool_choice=choice)) is None
    request = asked(MESSAGES, "call a tool", tools=[search, bash])
    assert called(request) == ("bash", {"command": "ls"})


@pytest.mark.parametrize(
    "tools", ["x", [1], [{}], [{"type": "function"}], [{"name": 1}], [{"name": ""}], {"a": 1}]
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_strange_tools_are_no_tools(endpoint: str, tools: Any) -> None:
    assert asked(endpoint, "call a tool", tools=tools).call is None


# Values by a schema.

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "string", "minLength": 5, "maxLength": 7},
    {"type": "string", "maxLength": 0},
    {"type": ["null", "integer"], "minimum": 5},
    {"type": "integer", "exclusiveMinimum": 7, "multipleOf": 5},
    {"type": "integer", "maximum": -3},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.3},
    {"type": "number", "minimum": 2, "maximum": 2},
    {"type": "number", "maximum": -1},
    {"type": "number", "exclusiveMinimum": 5},
    {"type": "number", "multipleOf": 0.25, "maximum": 0.6},
    {"enum": ["b", "a"]},
    {"const": {"x": [1]}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "minItems": 2},
    {"type": "string", "pattern": "^a+$", "default": "aaa"},
    {"type": "string", "pattern": "^b+$", "examples": ["bb"]},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"type": "integer"}}}]},
    {"oneOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "string"}]},
    {
        "allOf": [CITY, {"properties": {"days": {"type": "integer"}}, "required": ["days"]}],
    },
    {
        "$defs": {"a/b": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}},
        "properties": {"x": {"$ref": "#/$defs/a~1b"}, "y": {"$ref": "#/$defs/nowhere"}},
        "required": ["x"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                },
                "required": ["name", "children"],
            }
        },
        "$ref": "#/$defs/tree",
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_value_is_valid_by_its_schema(schema: dict[str, Any]) -> None:
    value = Sampler(schema, ["first", "second"], "otherwise").value()

    jsonschema.Draft202012Validator(
        {key: part for key, part in schema.items() if key != "y"}
    ).validate(value)
    assert value == Sampler(schema, ["first", "second"], "otherwise").value()


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
        {"$ref": "#"},
        {"$ref": "https://example.com/schema"},
        {"allOf": [{"allOf": [{"$ref": "#"}]}]},
        {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}},
        {"type": "array", "minItems": 20, "items": {"$ref": "#"}},
        {"properties": {str(n): {"type": "string"} for n in range(10_000)}},
        {"type": 5, "properties": 5, "required": 5, "items": 5, "enum": 5},
        {"properties": {"a": True, "b": []}, "required": ["a", "b", {}]},
        {"type": "integer", "minimum": 1e300, "maximum": "x", "multipleOf": 0},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_no_schema_makes_a_value_without_bounds(schema: dict[str, Any]) -> None:
    assert len(orjson.dumps(Sampler(schema).value())) < 100_000


@pytest.mark.parametrize(
    ("endpoint", "wish"),
    [
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY}}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": CITY}}}),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}}),
    ],
)
def test_structured_answer_is_valid_by_its_schema(endpoint: str, wish: dict[str, Any]) -> None:
    request = asked(endpoint, 'The capital of "Italy"?', **wish)

    assert orjson.loads(request.words or "") == {"city": "Italy"}
    assert asked(CHAT, "Hello", response_format={"type": "text"}).words is None
    loose = asked(CHAT, "Hello", response_format={"type": "json_object"})
    assert orjson.loads(loose.words or "") == {"answer": "Hello"}


KEYWORDS = [
    *("type", "enum", "const", "properties", "required", "items", "prefixItems", "anyOf", "allOf"),
    *("$ref", "minimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems"),
    *("format", "pattern", "default", "examples", "$defs", "role", "content", "name", "tools"),
    *("function", "output", "mode", "allowed_tools", "schema", "json_schema", "tool_calls"),
]
WORDS = ["object", "array", "string", "integer", "number", "null", "#", "#/$defs/a", "date", "a"]
KINDS = ["function", "custom", "tool", "any", "allowed_tools", "json_schema", "tool_result"]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**53)
    | st.floats()
    | st.sampled_from(WORDS + KINDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYWORDS, "a", "command"]), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(
    endpoint=st.sampled_from(ENDPOINTS),
    values=st.lists(ANYTHING, min_size=6, max_size=6),
    text=st.sampled_from(["t", "call a tool"]),
)
def test_no_request_is_more_than_refused(endpoint: str, values: list[Any], text: str) -> None:
    tools, choice, content, schema, wish, output = values
    declared_tool = declared(endpoint, {"t": schema}) if isinstance(schema, dict) else tools
    later = {"role": "tool", "type": "function_call_output", "output": output, "content": output}
    more = {"tools": declared_tool, "tool_choice": choice, "response_format": wish, "text": wish}
    messages = [{"role": "user", "content": content}, {"role": "user", "content": text}, later]
    body = orjson.dumps(body_of(endpoint, messages, **more))
    try:
        request = read(endpoint, body)
    except BadRequest:
        return
    assert len(request.call.arguments if request.call else request.words or "") < 100_000


# The official SDKs: whole and streamed, until the agent has its answer.


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(QUICK, seed=1) as simulator:
        yield simulator


@pytest.fixture
async def sdk(simulator: Simulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=simulator.base_url, api_key="k", max_retries=0) as sdk:
        yield sdk


async def test_custom_tools_of_responses_take_a_text(sdk: openai.AsyncOpenAI) -> None:
    wish: Any = {
        "model": "m",
        "input": "apply_patch with `*** Begin Patch`",
        "tools": [{"type": "custom", "name": "apply_patch"}],
    }
    whole: Any = await sdk.responses.create(**wish)
    async with sdk.responses.stream(**wish) as stream:
        seen = [event async for event in stream]
    final: Any = await stream.get_final_response()

    kinds = [event.type for event in seen]
    assert "response.custom_tool_call_input.delta" in kinds
    assert "response.custom_tool_call_input.done" in kinds
    for answer in (whole, final):
        (call,) = answer.output
        assert call.type == "custom_tool_call"
        assert (call.name, call.input) == ("apply_patch", "*** Begin Patch")


async def test_custom_tools_of_chat_take_a_text(sdk: openai.AsyncOpenAI) -> None:
    wish: Any = {
        "model": "m",
        "messages": [{"role": "user", "content": "apply_patch with `*** Begin`"}],
        "tools": [{"type": "custom", "custom": {"name": "apply_patch"}}],
    }
    whole: Any = await sdk.chat.completions.create(**wish)
    stream: Any = await sdk.chat.completions.create(**wish, stream=True)
    deltas = [chunk.choices[0].delta.tool_calls async for chunk in stream]

    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "custom"
    assert (call.custom.name, call.custom.input) == ("apply_patch", "*** Begin")
    parts: list[Any] = [call.to_dict() for calls in deltas for call in calls or ()]
    assert parts[0]["type"] == "custom"
    assert "".join(part["custom"]["input"] for part in parts) == "*** Begin"


async def test_answer_without_tools_is_the_speech_as_ever(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model="m", input="Run `ls`, call a tool")

    assert answer.output_text == speech("Run `ls`, call a tool", 1)


async def test_a_message_with_a_call_is_the_same_streamed_and_whole(simulator: Simulator) -> None:
    body = body_of(MESSAGES, [{"role": "user", "content": "Run `echo hi`"}])
    url = f"{simulator.base_url}/messages"
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json=body) as response:
            whole = await response.json()
        async with session.post(url, json={**body, "stream": True}) as response:
            parsed = eventstream.parse(await response.read())

    (use,) = whole["content"]
    assert (whole["stop_reason"], use["type"], use["name"]) == ("tool_use", "tool_use", "Bash")
    assert use["input"] == {"command": "echo hi"}
    events = [orjson.loads(event.data) for event in parsed]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert orjson.loads("".join(delta["partial_json"] for delta in deltas)) == use["input"]
    begun = next(event for event in events if event["type"] == "content_block_start")
    assert begun["content_block"]["name"] == "Bash"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-1]["type"] == "message_stop"
