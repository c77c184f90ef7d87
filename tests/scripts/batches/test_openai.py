"""OpenAI's batch format: what a body may say, what is refused by name, and the lines that answer."""

from __future__ import annotations

import base64
import re

import pytest

from qwen3vl_moe.engine import SamplingParams
from tests.inputs.clips import make_clip
from tests.scripts.batches.conftest import PARAMS, picture, records, write_lines

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def line(name="a", **body):
    body = {"model": "m", "messages": MESSAGES} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.fixture
def read(opened, tmp_path):
    """``read(lines)``: the requests that these lines are."""

    def call(*lines, names=("m",)):
        source = opened(write_lines(tmp_path / "batch.jsonl", list(lines)), model_names=names)
        assert source.kind == "openai"
        return source.requests(0, len(source))

    return call


def test_what_a_body_may_say(read):
    idle = {"stream": False, "logprobs": False, "response_format": {"type": "text"}, "tools": [], "user": "me"}
    plain, rich, given = read(
        line("a"),
        line("b", max_completion_tokens=9, temperature=0.5, top_p=0.9, n=2, stop=["x"], seed=3, top_k=5, **idle),
        line("c", max_tokens=8, logit_bias={"5": -1}, metadata={"a": "b"}, temperature=None),
    )
    assert [request.error for request in (plain, rich, given)] == [None] * 3
    assert (plain.id, plain.conversation, plain.params) == ("a", MESSAGES, PARAMS)
    assert rich.params == SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9, n=2, stop=["x"], seed=3, top_k=5)
    assert given.params == SamplingParams(max_tokens=8, temperature=0, logit_bias={5: -1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body": {"tools": [{"type": "function"}]}}, "body: tools\\[0\\]"),
        ({"body": {"logprobs": True}}, "body.logprobs is not supported in a file"),
        ({"body": {"tools": [TOOL]}}, "body.tools is not supported in a file"),
        ({"body": {"add_generation_prompt": False}}, "body.add_generation_prompt is not supported in a file"),
        ({"body": {"chat_template_kwargs": {"a": 1}}}, "body.chat_template_kwargs is not supported in a file"),
        ({"body": {"stream": 0}}, "body: stream=0: true or false is needed"),
        ({"body": {"response_format": {"type": "xml"}}}, "body: response_format=.* is needed"),
        ({"body": {"temprature": 1}}, "body: the field 'temprature' is unknown here"),
        ({"body": {"model": "n"}}, "body.model is 'n', and the model that answers is 'm'; --served-model-name n"),
        ({"body": {"model": None}}, "body.model is missing"),
        ({"body": {"messages": "Hi"}}, "body: messages is missing: a list"),
        ({"body": {"messages": [{"content": "Hi"}]}}, r"body: messages\[0\] is no object with role and content"),
        ({"body": {"max_tokens": 1, "max_completion_tokens": 2}}, "two names of one limit"),
        ({"body": {"temperature": -1}}, "temperature=-1"),
        ({"body": {"messages": [{"role": "user", "content": "\ud800"}]}}, "half of a surrogate pair"),
        ({"url": "/v1/embeddings"}, "the url is '/v1/embeddings'; only /v1/chat/completions"),
        ({"method": "GET"}, "the method is 'GET'"),
        ({"custom_id": 5}, "custom_id is missing"),
        ({"extra": 5}, "the key 'extra' is unknown; a line has custom_id, method, url and body"),
        ({"custom_id": "first"}, "the id 'first' is that of line 1 too"),
    ],
)
def test_what_is_refused_is_named(read, change, message):
    bad = line("b", **change["body"]) if "body" in change else line("b") | change
    good, refused = read(line("first"), bad)
    assert good.error is None
    assert refused.conversation is None
    assert refused.error.startswith("line 2: ")
    assert re.search(message, refused.error)


def test_a_form_of_the_answer(read):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    form, tools = read(line("a", response_format=wanted), line("b", tools=[TOOL], tool_choice="none"))
    assert form.params.structured_outputs == {"json": schema}
    assert (tools.error, tools.params) == (None, PARAMS)


def test_the_developer_is_the_system(read):
    (request,) = read(line("a", messages=[{"role": "developer", "content": "Be brief."}, *MESSAGES]))
    assert request.conversation == [{"role": "system", "content": "Be brief."}, *MESSAGES]


def test_a_line_of_another_format_among_them(read):
    _, other = read(line("a"), {"id": "b", "prompt": "Hi"})
    assert "the key 'id' is unknown" in other.error


def test_any_model_may_be_named(read):
    (request,) = read(line("a", model="gpt-4o"), names=())
    assert request.error is None


def test_the_lines_that_answer(generated, plain, tmp_path):
    image = "data:image/png;base64," + base64.b64encode(picture(1)).decode()
    clip = "data:video/mp4;base64," + base64.b64encode(make_clip(frames=10)).decode()
    shown = [{"type": "image_url", "image_url": {"url": image}}, {"type": "video_url", "video_url": {"url": clip}}]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": "What?"}]}]
    lines = [line("a"), line("b", stream=True), line("c", messages=messages, n=2, temperature=0.9), "{"]
    source, output = write_lines(tmp_path / "batch.jsonl", lines), tmp_path / "answers.jsonl"
    command = plain.path, source, output, "--served-model-name", "m"
    status, stderr = generated(*command)
    assert (status, "2 answers, 2 errors" in stderr) == (1, True)
    first, second, third, last = answers = records(output)
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c", None]
    assert all(answer.keys() == {"id", "custom_id", "response", "error"} for answer in answers)
    body = first["response"]["body"]
    assert (first["error"], first["response"]["status_code"], body["model"]) == (None, 200, "m")
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 4
    assert [choice["index"] for choice in third["response"]["body"]["choices"]] == [0, 1]
    for bad, message in ((second, "line 2: body.stream is not supported"), (last, "line 4: no JSON")):
        assert bad["response"]["status_code"] == 400
        assert message in bad["error"]["message"]
        assert bad["response"]["body"]["error"]["message"] == bad["error"]["message"]

    # It is taken up again like any other job: by what is there.
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([whole[3], whole[1]]) + whole[0][:40])
    assert "going on with the other 2" in generated(*command)[1]
    again = records(output)
    assert [answer["id"] for answer in again] == [answer["id"] for answer in answers]
    assert again[0]["response"]["body"]["choices"] == body["choices"]
    status, stderr = generated(plain.path, source, tmp_path / "a.parquet")
    assert (status, "OpenAI's batch format is answered in JSON lines" in stderr) == (2, True)
