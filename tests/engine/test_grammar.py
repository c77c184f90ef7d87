"""Answers of a given form: every drawn answer has it, alone, among others, and after it was begun again."""

import json
import re

import pytest
import torch

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.grammar import Grammars
from qwen3vl_moe.errors import OptionError
from tests.engine.conftest import PROMPTS, check_leaks

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grün"]}, "big": {"type": "boolean"}},
    "required": ["colour", "big"],
    "additionalProperties": False,
}
FORMS = {
    "json": ({"json": SCHEMA}, re.compile(r'\{"colour": "(red|grün)", "big": (true|false)\}')),
    "text of a schema": ({"json": json.dumps(SCHEMA)}, re.compile(r'\{"colour": "(red|grün)", "big": (true|false)\}')),
    "regex": ({"regex": "[0-3]{4}-x"}, re.compile("[0-3]{4}-x")),
    "choice": ({"choice": ['a "b"', "ö\n"]}, re.compile('a "b"|ö\n')),
    "grammar": ({"grammar": 'start: "<" ("a" | "b") ">"'}, re.compile("<[ab]>")),
}


def texts(llm, form, prompt="Hello", **params):
    params = {"temperature": 50.0, "seed": 1, "n": 4, "max_tokens": 100} | params
    [output] = llm.generate(prompt, SamplingParams(structured_outputs=form, **params))
    assert all(each.finish_reason == "stop" for each in output.outputs)
    return [each.text for each in output.outputs]


@pytest.mark.parametrize(("form", "pattern"), FORMS.values(), ids=FORMS)
def test_answers_have_the_form(llm, form, pattern):
    found = texts(llm, form)
    assert all(pattern.fullmatch(text) for text in found)
    assert pattern.fullmatch(*texts(llm, form, temperature=0, n=1))
    check_leaks(llm)


def test_each_answer_of_a_request_goes_its_own_way(llm):
    assert len(set(texts(llm, {"regex": "[0-9]{8}"}))) == 4


def test_json_object_is_any_object(llm):
    for text in texts(llm, {"json_object": True}, temperature=1.0, n=3, max_tokens=3000):
        assert isinstance(json.loads(text), dict)


def test_in_company_each_answer_has_its_own_form(llm):
    free = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    alone = llm.generate("Hello", free)[0].outputs[0].token_ids
    shaped = [SamplingParams(structured_outputs=form, temperature=1.0, seed=3) for form, _ in FORMS.values()]
    outputs = llm.generate([*PROMPTS.values(), "Hello", "x", "y"], [*shaped, free])
    for output, (_, pattern) in zip(outputs, FORMS.values(), strict=False):
        assert pattern.fullmatch(output.outputs[0].text)
    assert outputs[-1].outputs[0].token_ids != []
    assert llm.generate("Hello", free)[0].outputs[0].token_ids == alone


def test_an_answer_that_lost_its_blocks_keeps_its_form(plain, make_llm):
    small = make_llm(plain, num_blocks=5, max_num_seqs=4)
    params = SamplingParams(structured_outputs={"regex": "[0-9]{40}"}, temperature=1.0, seed=1, max_tokens=60)
    outputs = small.generate(["aaaa", "bbbb", "cccc"], params)
    assert any(output.metrics.num_preemptions for output in outputs)
    assert all(re.fullmatch("[0-9]{40}", output.outputs[0].text) for output in outputs)


def test_tokens_that_were_taken_back_are_forgotten(llm):
    vocabulary = llm.engine.model.config.text.vocab_size
    grammar = Grammars(llm.get_tokenizer(), vocabulary, {5}).of({"choice": ["ab", "ac"]})
    encode = llm.get_tokenizer().backend_tokenizer.encode

    def allowed(text):
        logits_V = torch.zeros(vocabulary)
        grammar.apply(logits_V, [token for letter in text for token in encode(letter).ids])
        return {llm.get_tokenizer().decode(token) for token in logits_V.isfinite().nonzero().flatten().tolist()}

    assert "a" in allowed("")
    assert {"b", "c"} <= allowed("a")
    assert len(allowed("ab")) == 1  # end-of-text
    assert {"b", "c"} <= allowed("a")
    assert "a" in allowed("")
    assert allowed("x") == set()  # nothing can follow what has not the form


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "objekt"}}, "json cannot be used: Invalid type: objekt"),
        ({"json": {"not": {"type": "string"}}}, "json cannot be used: .*not"),
        ({"json": "{"}, "json: EOF"),
        ({"regex": "a" * 300_000}, "at most 262144 are compiled"),
        ({"regex": "("}, "regex cannot be used: .*unclosed group"),
        ({"grammar": "begin: x"}, "grammar cannot be used"),
    ],
)
def test_forms_that_cannot_be_followed_are_refused(llm, form, message):
    with pytest.raises(OptionError, match=message) as caught:
        texts(llm, form)
    assert str(caught.value).isprintable()
    check_leaks(llm)


def test_without_end_of_text_no_form_ends(llm):
    with pytest.raises(OptionError, match="names none"):
        Grammars(llm.get_tokenizer(), 512, ()).of({"json_object": True})


def test_a_missing_library_is_named(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(OptionError, match="pip install llguidance"):
        texts(llm, {"json_object": True})


def test_a_form_begins_where_the_reasoning_ends(llm):
    """A prompt that has its answer think first, by whatever way it comes."""
    params = SamplingParams(structured_outputs={"choice": ["a"]}, temperature=0, max_tokens=8)
    plain, thinking = llm.generate(["Hello", "Hello<think>\n"], params)
    assert plain.outputs[0].text == "a"
    assert thinking.outputs[0].finish_reason == "length"  # it thinks yet
    assert not thinking.outputs[0].text.startswith("a")
    ended = llm.generate("Hello<think>\n</think>\n\n", params)
    assert ended[0].outputs[0].text == "a"
    with pytest.raises(OptionError, match="regex does not go with a checkpoint that thinks first"):
        llm.generate("Hello <think>", SamplingParams(structured_outputs={"regex": "a"}))
    check_leaks(llm)


@pytest.mark.parametrize("schema", ["{nope", "[" * 5000, "true"])
def test_a_schema_that_cannot_follow_reasoning_is_its_requests_error(llm, schema):
    params = SamplingParams(structured_outputs={"json": schema}, temperature=0, max_tokens=2)
    free = SamplingParams(temperature=0, max_tokens=2)
    done = dict(llm.as_completed(["Hello<think>\n", "Hello"], [params, free], return_exceptions=True))
    assert isinstance(done[0], OptionError)
    assert str(done[0]).startswith("structured_outputs: json: ")
    assert len(done[1].outputs[0].token_ids) == 2
    check_leaks(llm)
