"""Chat templates: what transformers renders, with vLLM's flags, and one line for whatever else a template does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.errors import CheckpointError, ConfigError, OptionError, PromptError
from qwen3vl_moe.inputs.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, load_chat_template
from qwen3vl_moe.inputs.messages import split_media
from qwen3vl_moe.inputs.processor import Processor
from tests.inputs.parts import CONVERSATIONS, picture, user

# Everything that the published templates of this family use.
FULL = """
{%- set image_count = namespace(value=0) %}
{%- macro render(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if 'image' in item or item.type == 'image' %}
                {%- set image_count.value = image_count.value + 1 %}
                {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in item %}{{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for document in documents or [] %}{{- loop.index ~ ': ' ~ document.title|trim|upper ~ '\\n' }}{%- endfor %}
{%- for message in messages[::1] %}
    {%- set content = render(message.content)|trim if message.role == 'user' else render(message.content) %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content.strip('\\n') }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{%- set call = call.function %}{%- endif %}
        {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments|tojson(indent=2) }}
        {{- '}\\n</tool_call>' }}
        {%- if loop.last %}{%- break %}{%- endif %}
    {%- endfor %}
    {%- generation %}{{- '<|im_end|>\\n' }}{%- endgeneration %}
{%- endfor %}
{%- if messages|selectattr('role', 'equalto', 'tool')|list|length > 3 %}{{- raise_exception('too many') }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- endif %}{{- strftime_now('') ~ (eos_token or '') ~ 'a,b'.split(',')[-1] ~ [3, 1]|sort|join('-') }}"""

# What templates of Thinking checkpoints do beside: the answer begins within its reasoning; that of earlier turns is cut
# off what is said, and shown again only in the turn that is still going on.
THINKING = """
{%- set ns = namespace(going_on=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.going_on and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.going_on = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content, reasoning = message.content, '' %}
    {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}{{- content }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""

CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "ü": ["<", None]}}}]
AGENT = [
    {"role": "user", "content": " What is 1 + 2? "},
    {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning": "\nI add.\n"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is  3. "},
]


def add(a: int, b: str = "x") -> int:
    """Adds.

    Args:
        a: one of them
        b: the other
    """
    return a


def ours(tokenizer: PreTrainedTokenizerFast, template: str, messages: list, **options) -> str:
    options = {
        "tools": None,
        "variables": None,
        "add_generation_prompt": True,
        "continue_final_message": False,
    } | options
    parsed = ChatTemplate(template, tokenizer.special_tokens_map)
    return parsed.render(split_media(messages, (), parsed.names)[0], ("<|image_pad|>",), **options)


def theirs(tokenizer: PreTrainedTokenizerFast, template: str, messages: list, variables=None, **options) -> str:
    options = {"add_generation_prompt": True, **options, **(variables or {})}
    # Older versions of transformers know neither of these two.
    plain = [{{"reasoning": "reasoning_content"}.get(k, k): v for k, v in m.items() if v is not None} for m in messages]
    plain = [{"content": "", **m} for m in plain]
    return tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False, **options)


class TestEqualToTransformers:
    @pytest.mark.parametrize("name", CONVERSATIONS)
    @pytest.mark.parametrize("template", ["own", "full"])
    def test_conversations(self, processor, name, template):
        template = FULL if template == "full" else processor.chat_template
        messages = CONVERSATIONS[name][0]
        assert ours(processor.tokenizer, template, messages) == theirs(processor.tokenizer, template, messages)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"add_generation_prompt": False},
            {"tools": [add, {"type": "function", "function": {"name": "g", "parameters": {}}}]},
            {"variables": {"add_vision_id": True, "enable_thinking": False}},
            {"variables": {"enable_thinking": True, "documents": [{"title": " a ", "text": "b"}]}},
            {"add_generation_prompt": False, "continue_final_message": True},
        ],
    )
    def test_options(self, processor, options):
        for messages in (AGENT, [*user("Look", picture(8, 8)), {"role": "assistant", "content": " A cat \n"}]):
            assert ours(processor.tokenizer, FULL, messages, **options) == theirs(
                processor.tokenizer, FULL, messages, **options
            )

    def test_a_template_of_a_thinking_checkpoint(self, processor):
        messages = [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": "<think>\nI add.\n</think>\n\nIt is 3."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "\nYes.", "reasoning_content": "I look again."},
        ]
        for end, add_generation_prompt in ((3, True), (4, False), (4, True)):
            options = {"add_generation_prompt": add_generation_prompt}
            text = ours(processor.tokenizer, THINKING, messages[:end], **options)
            assert text == theirs(processor.tokenizer, THINKING, messages[:end], **options)
            assert text.endswith("<think>\n") == add_generation_prompt
            assert "I add." not in text
            assert ("I look again." in text) == (end == 4)

    def test_published_template(self, published):
        for messages, _ in CONVERSATIONS.values():
            for variables in (None, {"add_vision_id": True}):
                assert ours(published.tokenizer, published.chat_template, messages, variables=variables) == theirs(
                    published.tokenizer, published.chat_template, messages, variables
                )


class TestFlags:
    @pytest.mark.parametrize(
        ("content", "end"),
        [
            ("It is  3. ", "It is  3. "),
            ([{"type": "text", "text": "It"}, {"type": "text", "text": " is"}], "It is"),
            ("", ""),
        ],
    )
    def test_the_final_message_stays_open(self, processor, content, end):
        messages = [*user("1 + 2?"), {"role": "assistant", "content": content}]
        prompt = processor.chat(messages, add_generation_prompt=False, continue_final_message=True)
        assert prompt.text == f"<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n{end}"
        assert prompt.token_ids == processor.tokenizer(prompt.text).input_ids

    def test_a_template_that_strips_messages(self, processor):
        template = "{% for m in messages %}[{{ m.content|trim }}]{% endfor %}"
        messages = [{"role": "assistant", "content": " It is "}]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert ours(processor.tokenizer, template, messages, **options) == "[It is"

    @pytest.mark.parametrize(
        ("last", "options", "message"),
        [
            ("assistant", {"continue_final_message": True}, "set add_generation_prompt=False"),
            ("user", {"continue_final_message": True, "add_generation_prompt": False}, "this one has the role 'user'"),
            ("assistant", {"chat_template_kwargs": {"enable_thinking": False}}, "does not read 'enable_thinking'; it"),
            ("assistant", {"chat_template_kwargs": {"documents": [{"title": "a"}]}}, "does not read 'documents'"),
            (
                "assistant",
                {"chat_template_kwargs": {"messages": []}},
                "has 'messages', which is an argument of its own",
            ),
            ("assistant", {"chat_template_kwargs": {"tools": []}}, "has 'tools', which is an argument of its own"),
            ("assistant", {"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs is a list"),
            ("assistant", {"tools": [add]}, "does not read 'tools'; it reads nothing but messages"),
            ("assistant", {"tools": {"name": "f"}}, "tools is a dict; a list of"),
            ("assistant", {"tools": "add"}, "tools is a str; a list of"),
            ("assistant", {"tools": [3]}, "tools[0] is a int; a JSON schema"),
            ("assistant", {"tools": [lambda x: x]}, "tools[0] does not become a JSON schema: "),
        ],
    )
    def test_refused(self, processor, last, options, message):
        with pytest.raises(OptionError) as caught:
            processor.chat([*user("a"), {"role": last, "content": "b"}], **options)
        assert message in str(caught.value)

    def test_what_is_not_given(self, processor):
        plain = processor.chat(user("a"))
        for options in ({"tools": []}, {"tools": None}, {"chat_template_kwargs": {"enable_thinking": None}}):
            assert processor.chat(user("a"), **options).token_ids == plain.token_ids

    def test_vision_tokens_in_what_goes_beside(self, processor):
        full = Processor(processor.tokenizer, FULL, processor.image_settings, processor.config)
        tool = {"type": "function", "function": {"name": "f", "description": "<|vision_start|><|image_pad|>"}}
        for options in ({"tools": [tool]}, {"chat_template_kwargs": {"documents": [{"title": "<|image_pad|>"}]}}):
            with pytest.raises(PromptError, match="the text holds the token"):
                full.chat(user(picture(8, 8)), **options)


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with no call": "{% set l = range(99999)|list %}" + "{% for a in l %}" * 4 + "x" + "{% endfor %}" * 4,
    "a loop that skips": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "times": "{{ 'x' * 10 ** 12 }}",
    "power": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "squares": "{% set s = namespace(n=3) %}{% for i in range(60) %}{% set s.n = s.n * s.n %}{% endfor %}",
    "plus": "{% set s = namespace(x='xx') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
    "tilde": "{% set s = namespace(x='xx') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "lists": "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x }}",
    "dicts": "{% set s = namespace(x=1) %}{% for i in range(60) %}{% set s.x = dict(a=s.x, b=s.x) %}{% endfor %}",
    "blocks": (
        "{% set s = namespace(x='xx') %}{% for i in range(60) %}{% set b %}{{ s.x }}{{ s.x }}{% endset %}"
        "{% set s.x = b %}{% endfor %}"
    ),
    "text in a loop": "{% for i in range(99999) %}" + "y" * 9999 + "{% endfor %}",
    "a macro in a loop": "{% macro f() %}"
    + "y" * 9999
    + "{% endmacro %}{% for i in range(99999) %}{% set x = f() %}{% endfor %}",
    "a macro for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros in a tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "sort": "{% for i in range(99999) %}{% set x = range(99999)|sort %}{% endfor %}",
    "comparisons": "{% set l = range(99999)|list %}" + "{% set x = 0.5 in l %}" * 1000,
    "slices": "{% set s = 'x' * 9999999 %}" + "{% set t = s[::-1] %}" * 1000,
    "replace": "{% set s = 'x' * 999999 %}{{ s.replace('x', s) }}",
    "a filter's replace": "{% set s = 'x' * 999999 %}{{ [s]|map('replace', 'x', s)|list }}",
    "join": "{% set s = 'x' * 999999 %}{{ s.join(range(99999)|map('string')) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "center": "{{ 'x'|center(9999999999) }}",
    "bytes": "{{ (5).to_bytes(9999999999, 'big') }}",
    "tojson": "{{ [1, 2]|tojson(indent=9999999999) }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "division": "{{ 1 / 0 }}",
    "undefined": "{{ a.b.c }}",
    "no such item": "{{ messages[7].content }}",
    "types": "{{ messages[0].content + 1 }}",
    "include": "{% include 'x' %}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "a change": "{{ messages.append(1) }}",
    "syntax": "{% if %}",
    "a filter": "{{ 1|nosuch }}",
    "much of it": "{{ a }}" * 99999,
    "raise": "{{ raise_exception('roles must\nalternate') }}",
}
RUN = """
import json, resource, sys, time
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.inputs import template_sandbox
from qwen3vl_moe.inputs.chat_template import ChatTemplate
template_sandbox.MOST_SECONDS /= 5
options = dict(tools=None, variables=None, add_generation_prompt=True, continue_final_message=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, template in json.load(sys.stdin).items():
    started = time.process_time()
    try:
        line = "rendered " + ChatTemplate(template, {}).render([{"role": "user", "content": "hi"}], (), **options)[:99]
    except UserError as error:
        line = f"{type(error).__name__} {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([name, line, time.process_time() - started, grown]))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, float, int]]:
    """Of each hostile template: its line, and the seconds and kilobytes that it took."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(HOSTILE), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(outcome) for name, *outcome in map(json.loads, done.stdout.splitlines())}


class TestHostileTemplates:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_one_line_in_time_and_memory(self, outcomes, name):
        line, seconds, kilobytes = outcomes[name]
        known = (
            "PromptError the chat template refuses the conversation: ",
            "CheckpointError the checkpoint's chat temp",
        )
        assert line.startswith(known), line
        assert "\n" not in line
        assert seconds < 2  # of this process on a core, with a fifth of the limit
        assert kilobytes < 500 * 2**10

    def test_a_long_conversation_is_within_the_budget(self, processor):
        messages = [{"role": role, "content": "word " * 200} for role in ("user", "assistant")] * 1000
        assert ours(processor.tokenizer, FULL, messages) == theirs(processor.tokenizer, FULL, messages)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "chat_template.jinja",
                b"\xff\xfe{{",
                "chat_template.jinja is not UTF-8 text: invalid start byte at byte 0",
            ),
            ("chat_template.jinja", b"x" * (MAX_TEMPLATE_BYTES + 1), "has 65537 bytes; a template has at most 65536"),
            ("chat_template.json", b'{"chat_template": [1]}', "chat_template is a list; only a single template"),
            ("tokenizer_config.json", b'{"chat_template": {"a": "b"}}', "chat_template is a dict; only a single"),
        ],
    )
    def test_refused(self, tmp_path: Path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_chat_template(tmp_path)
        assert message in str(caught.value)

    def test_the_first_of_three(self, tmp_path: Path):
        assert load_chat_template(tmp_path) is None
        for name in ("tokenizer_config.json", "chat_template.json"):
            (tmp_path / name).write_text(json.dumps({"chat_template": name}))
            assert load_chat_template(tmp_path) == name
        (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
        assert load_chat_template(tmp_path) == "{{ 1 }}"

    def test_a_damaged_template_stops_only_chat(self, processor):
        broken = Processor(processor.tokenizer, "{% if %}", processor.image_settings, processor.config)
        assert broken.prompt("a").token_ids
        with pytest.raises(CheckpointError, match="the checkpoint's chat template is damaged, line 1"):
            broken.chat(user("a"))
