"""The client that everybody has: what it sends is understood, and what it gets is what it expects."""

import json
import math
import re

import pytest

from qwen3vl_moe import SamplingParams
from tests.server.conftest import HELLO, Served, asking, data_url

openai = pytest.importorskip("openai")

SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}, "ink": {"enum": ["orange", "blue"]}},
    "required": ["number", "ink"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server: Served):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_a_picture_is_answered_as_in_process(client, server, question):
    picture, text, answer = question
    done = client.chat.completions.create(
        model="demo", messages=asking(text, data_url(picture)), max_completion_tokens=40, temperature=0
    )
    assert done.choices[0].message.content == answer
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "stop"
    assert (done.object, done.model) == ("chat.completion", "demo")
    [expected] = server.llm.processor.tokenizer([answer]).input_ids
    assert done.usage.completion_tokens == len(expected) + 1  # the end of text
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    again = client.chat.completions.create(model="demo", messages=asking(text, data_url(picture)), temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def test_a_stream_is_the_answer_in_pieces(client):
    whole = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=HELLO,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    *middle, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    pieces = [chunk.choices[0].delta.content for chunk in middle[1:]]
    assert "".join(piece for piece in pieces if piece) == whole.choices[0].message.content
    assert sum(piece is not None for piece in pieces) > 3
    assert middle[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_with_a_seed(client, server):
    options = {"temperature": 4.0, "n": 3, "seed": 7, "max_tokens": 12}
    done = client.chat.completions.create(model="demo", messages=HELLO, **options)
    texts = [choice.message.content for choice in done.choices]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    alone = client.chat.completions.create(model="demo", messages=HELLO, **options | {"n": 1, "seed": 8})
    assert alone.choices[0].message.content == texts[1]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="demo", messages=HELLO, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stops_limits_and_penalties_reach_the_engine(client):
    def ask(**options):
        given = {"temperature": 0, "max_tokens": 12} | options
        return client.chat.completions.create(model="demo", messages=HELLO, **given).choices[0]

    whole = ask().message.content
    assert ask(max_tokens=3).finish_reason == "length"
    assert ask(stop=whole[6:8]).message.content == whole[:6]
    assert ask(stop=whole[6:8]).finish_reason == "stop"
    assert ask(presence_penalty=2, frequency_penalty=2, logit_bias={"100": 100}).message.content != whole
    assert ask(extra_body={"ignore_eos": True}).finish_reason == "length"
    assert ask(extra_body={"repetition_penalty": 5.0}).message.content != whole


def test_log_probabilities(client, server):
    options = {"model": "demo", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    done = client.chat.completions.create(logprobs=True, top_logprobs=3, **options)
    content = done.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == done.choices[0].message.content
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.0001
    streamed = []
    for chunk in client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **options):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    plain = client.chat.completions.create(logprobs=True, **options)
    assert all(entry.top_logprobs == [] for entry in plain.choices[0].logprobs.content)


def test_completions(client, server):
    prompts = ["Hello there", server.llm.get_tokenizer()("How many", add_special_tokens=False).input_ids]
    done = client.completions.create(model="demo", prompt=prompts, max_tokens=5, temperature=0, logprobs=2)
    outputs = in_process(server, prompts)
    assert [choice.text for choice in done.choices] == outputs
    for choice in done.choices:
        ending = "<|im_end|>" if choice.finish_reason == "stop" else ""
        assert "".join(choice.logprobs.tokens) == choice.text + ending
        assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    texts = ["", ""]
    for chunk in client.completions.create(model="demo", prompt=prompts, max_tokens=5, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == outputs
    assert len(client.completions.create(model="demo", prompt="Hello", temperature=0).choices[0].text) > 0


def in_process(server: Served, prompts) -> list[str]:
    """The same in process, with an engine of its own."""
    from qwen3vl_moe import LLM

    llm = LLM.from_parts(
        server.llm.engine.model, server.llm.processor, server.llm.engine.defaults, num_blocks=64, max_num_seqs=4
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5))
    return [output.outputs[0].text for output in outputs]


def test_structured_answers(client, question):
    picture, text, _ = question
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA, "strict": True}}
    for temperature in (0, 1.5):
        done = client.chat.completions.create(
            model="demo",
            messages=asking(text, data_url(picture)),
            response_format=form,
            temperature=temperature,
            max_tokens=60,
            seed=1,
        )
        value = json.loads(done.choices[0].message.content)
        assert value.keys() == {"number", "ink"}
        assert value["ink"] in ("orange", "blue")
        assert 0 <= value["number"] <= 999
    done = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        temperature=1,
        seed=2,
        max_tokens=30,
        extra_body={"structured_outputs": {"regex": "[a-c]{4}"}},
    )
    assert re.fullmatch("[a-c]{4}", done.choices[0].message.content)


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("gpt-4")


def test_errors_have_the_shape_that_the_client_knows(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert "temperature=-1: a number from 0" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model="demo", messages=HELLO, extra_body={"tempreature": 1})
    assert unknown.value.param == "tempreature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"
