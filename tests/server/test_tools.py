"""Calls of tools and reasoning, over the wire, with templates of the form that the published checkpoints have."""

import json

import pytest
import torch

from qwen3vl_moe.engine.grammar import after_thinking
from qwen3vl_moe.server.protocol import parse_chat
from qwen3vl_moe.server.tools import Tool, form_of_calls
from tests.server.conftest import HELLO, served

openai = pytest.importorskip("openai")

TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{% for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response>' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}{{- message.reasoning_content }}{% endif %}
        {%- if message.content is string %}{{- message.content }}{% else %}
            {%- for item in message.content %}{{- item.text or '<|image_pad|>' }}{% endfor %}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function.name + call.function.arguments }}
        {%- endfor %}
    {%- endif %}{{- '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
THINKING = TEMPLATE.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")


def tool(name: str, /, **properties) -> dict:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


COLOUR, COUNT = tool("colour", name={"enum": ["red", "blue"]}), tool("count", number={"type": "integer", "maximum": 9})


@pytest.fixture(scope="module")
def calling(make_demo):
    with served(make_demo(TEMPLATE)) as running:
        yield running


@pytest.fixture
def client(calling):
    yield openai.OpenAI(base_url=f"{calling.url}/v1", api_key="any", max_retries=0)
    calling.settles()


def ask(client, **options):
    given = {
        "model": "demo",
        "messages": HELLO,
        "temperature": 1.0,
        "seed": 1,
        "max_tokens": 200,
        "tools": [COLOUR, COUNT],
    }
    return client.chat.completions.create(**given | options)


def checked(call) -> None:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "colour":
        assert arguments["name"] in ("red", "blue")
    else:
        assert call.function.name == "count"
        assert arguments["number"] <= 9


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_has_to_be_made(client, seed):
    done = ask(client, tool_choice="required", seed=seed, parallel_tool_calls=False).choices[0]
    assert done.finish_reason == "tool_calls"
    assert done.message.content is None
    [call] = done.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    checked(call)


def test_a_tool_that_is_named(client):
    choice = {"type": "function", "function": {"name": "count"}}
    done = ask(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in done.message.tool_calls] == ["count"]


def test_calls_in_a_stream_come_whole(client):
    chunks = list(ask(client, tool_choice="required", stream=True, parallel_tool_calls=False))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    [call] = calls
    assert call.index == 0
    checked(call)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_what_the_model_says_of_its_own_accord(client):
    done = ask(client, temperature=0).choices[0]
    assert done.message.tool_calls is None
    assert done.message.content
    assert ask(client, temperature=0, tool_choice="none").choices[0].finish_reason == "stop"


def test_a_call_or_an_answer_of_a_form(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(4):
        message = ask(client, response_format=form, seed=seed, temperature=5.0).choices[0].message
        if message.tool_calls:
            [checked(call) for call in message.tool_calls]
        else:
            assert json.loads(message.content)["a"] in (True, False)
        kinds.add(bool(message.tool_calls))
    assert kinds == {True, False}


def test_results_go_back_in_the_order_of_the_calls(calling, client):
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": "{}"}}
            for i, name in enumerate(["colour", "count"])
        ],
    }
    results = [
        {"role": "tool", "tool_call_id": "call_1", "content": "second", "name": "count"},
        {"role": "tool", "tool_call_id": "call_0", "content": "first"},
    ]
    messages = [*HELLO, message, *results]
    text = calling.llm.processor.chat(parse_chat({"messages": messages}).messages).text
    assert text.index("first") < text.index("second")
    assert ask(client, messages=messages, max_tokens=2).choices[0].message.content
    assert "<tool_call>colour{}" in text
    for wrong, said in (
        ({**results[0], "tool_call_id": "call_9"}, "answers no tool call"),
        ({**results[0], "name": "other"}, "another name than the tool"),
        ({"role": "tool", "content": "x"}, "answers no tool call"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            ask(client, messages=[*HELLO, message, wrong])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\]="),
        ({"tools": [tool("a b")]}, "has the name 'a b'"),
        ({"tools": [COLOUR, COLOUR]}, "twice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "none of the tools"),
        ({"tool_choice": "sometimes"}, "auto, none, required"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "contradict each other"),
        ({"tool_choice": "required", "extra_body": {"structured_outputs": {"regex": "a"}}}, "does not go with"),
        ({"tools": [tool("f", x={"not": {}})], "tool_choice": "required"}, "cannot be used"),
    ],
)
def test_what_cannot_be_is_refused(client, options, said):
    with pytest.raises(openai.BadRequestError, match=said):
        ask(client, **options)


def test_a_template_without_tools_says_so(server):
    assert "does not read 'tools'" in server.chat(tools=[COLOUR]).json()["error"]["message"]


def test_reasoning_comes_apart(make_demo):
    template = TEMPLATE + "{# <think> #}"
    thought = {"structured_outputs": {"regex": "<think>\nhm{3}\n</think>\n\n(yes|no)"}, "temperature": 1, "seed": 1}
    with served(make_demo(template)) as thinking:
        message = thinking.chat(**thought).json()["choices"][0]["message"]
        assert message["reasoning_content"] == "hmmm"
        assert message["content"] in ("yes", "no")
        deltas = [event["choices"][0]["delta"] for event in thinking.events(**thought)]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hmmm"
        history = [*HELLO, message, *HELLO]  # goes back as it came
        assert thinking.chat(history, max_tokens=2).status_code == 200


def test_a_prompt_may_begin_the_reasoning(make_demo):
    with served(make_demo(THINKING)) as thinking:
        message = thinking.chat(max_tokens=5, ignore_eos=True).json()["choices"][0]["message"]
        assert message["content"] == ""
        assert message["reasoning_content"]  # it never came to an end
        assert thinking.chat(response_format={"type": "json_object"}, max_tokens=5).status_code == 200
        assert "thinks first" in thinking.chat(structured_outputs={"regex": "a"}).json()["error"]["message"]


@pytest.mark.parametrize("kind", ["json", "text", "object", "choice", "call"])
def test_a_form_begins_where_the_reasoning_ends(server, kind):
    engine = server.llm.engine
    tools = [Tool.of(COUNT, "x")]
    form, said = {
        "json": ({"json": {"enum": ["yes", "no"]}}, '"yes"'),
        "text": ({"json": '{"enum": ["yes", "no"]}'}, '"yes"'),
        "object": ({"json_object": True}, "{}"),
        "choice": ({"choice": ["yes", "no"]}, "yes"),
        "call": (
            form_of_calls(tools, None, several=False, or_json=None),
            '<tool_call>\n{"name": "count", "arguments": {"number": 3}}\n</tool_call>',
        ),
    }[kind]
    grammar = engine.admission.grammars.of(after_thinking(form))

    def may_end(text: str) -> bool:
        logits_V = torch.zeros(engine.model.config.text.vocab_size)
        grammar.anew().apply(logits_V, engine.tokenizer(text, add_special_tokens=False).input_ids)
        return any(logits_V[token].isfinite() for token in engine.defaults.eos_token_ids)

    assert may_end(f'I think "no" <tool_call>\n</think>\n\n{said}')
    assert not may_end(said)
    assert not may_end(f"so\n</think>\n\n{said[:-1]}")
    assert not may_end(f"so\n</think>\n\nwell, {said}")


def test_the_grammar_names_only_what_was_chosen():
    tools = [Tool.of(spec, "x") for spec in (COLOUR, COUNT)]
    assert "colour" not in form_of_calls(tools, "count", several=True, or_json=None)["grammar"]
