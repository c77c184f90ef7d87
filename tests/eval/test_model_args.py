"""eval/model_args.py: every argument of lm-eval's own models has its meaning here, or is refused by its name."""

import ast
import inspect
from pathlib import Path

import lm_eval.models
import pytest

import lm
from lm import EngineLM
from model_args import NOT_HERE, WITHOUT_EFFECT, engine_options, template_variables, think_end
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.errors import OptionError

OURS = inspect.signature(EngineLM.__init__).parameters.keys() | {"dtype", "max_length"}
OURS |= {"tensor_parallel_size", "data_parallel_size"}
OURS |= EngineOptions.__dataclass_fields__.keys()


def arguments(name: str) -> dict:
    """Arguments of an lm-eval model and their defaults, from its source: to import it takes libraries of its own."""
    tree = ast.parse((Path(lm_eval.models.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    init = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    found, defaults = init.args.args, init.args.defaults
    values = [None] * (len(found) - len(defaults)) + [ast.literal_eval(each) for each in defaults]
    return {each.arg: value for each, value in zip(found, values, strict=True) if each.arg != "self"}


@pytest.mark.parametrize("name", ["huggingface", "vllm_causallms"])
def test_every_argument_is_known(name):
    assert len(arguments(name)) > 20
    assert arguments(name).keys() <= OURS | NOT_HERE.keys() | set(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", ["huggingface", "vllm_causallms"])
def test_their_defaults_pass(name):
    theirs = {key: value for key, value in arguments(name).items() if key not in OURS}
    assert engine_options(theirs) == {}


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_what_is_not_here_is_refused_by_name(name):
    with pytest.raises(OptionError, match=rf"^{name}='something else' is not supported: "):
        engine_options({name: "something else"})
    with pytest.raises(OptionError, match=f"^{name}="):
        EngineLM("demo", **{name: 7})


def test_one_is_not_true():
    assert engine_options({"max_lora_rank": 16, "parallelize": False}) == {}
    for name, value in (("max_lora_rank", True), ("parallelize", 0), ("max_lora_rank", 2)):
        with pytest.raises(OptionError, match=name):
            engine_options({name: value})


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_has_no_effect_passes(name):
    assert engine_options({name: "anything", "dtype": "float32"}) == {"dtype": "float32"}


def test_hfs_word_for_the_length():
    assert engine_options({"max_length": 64}) == engine_options({"max_model_len": 64, "max_length": 64})
    assert engine_options({"max_length": None}) == {}
    with pytest.raises(OptionError, match="max_length=64 and max_model_len=32"):
        engine_options({"max_length": 64, "max_model_len": 32})


def test_an_option_beside_a_made_llm(demo):
    with pytest.raises(OptionError, match="max_model_len is an option of LLM"):
        EngineLM(demo.llm, max_length=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many'"),
        ({"prefix_token_id": -1}, "prefix_token_id=-1"),
        ({"prefix_token_id": "a"}, "prefix_token_id='a'"),
        ({"think_end_token": ""}, "think_end_token=''"),
        ({"think_end_token": 10**9}, "think_end_token=1000000000"),
        ({"think_end_token": "<|im_end|>"}, "special token"),
        ({"enable_thinking": "yes"}, "enable_thinking='yes'"),
        ({"chat_template_args": "yes"}, "chat_template_args='yes'"),
        ({"enable_thinking": True, "chat_template_args": {"enable_thinking": False}}, "contradicts"),
    ],
)
def test_impossible_values(demo, options, message):
    with pytest.raises(OptionError, match=message):
        EngineLM(demo.llm, progress=False, **options)


def test_variables_of_the_template(demo, monkeypatch):
    template = "{% if enable_thinking %}think{% else %}answer{% endif %} {{ style }}"
    monkeypatch.setattr(demo.llm.processor, "chat_template", template)
    for thinking, word in ((True, "think"), (False, "answer")):
        model = EngineLM(demo.llm, enable_thinking=thinking, chat_template_args={"style": "short"})
        assert model.apply_chat_template([{"role": "user", "content": "a"}]) == f"{word} short"
    unread = EngineLM(demo.llm, chat_template_args={"tone": "kind"})
    with pytest.raises(OptionError, match="does not read 'tone'"):
        unread.apply_chat_template([{"role": "user", "content": "a"}])


def test_the_end_of_thinking(demo):
    (token,) = demo.tokenizer("a").input_ids
    assert think_end(None, demo.tokenizer) is None
    assert think_end("</think>", demo.tokenizer) == "</think>"
    assert think_end(token, demo.tokenizer) == think_end(str(token), demo.tokenizer) == "a"
    assert template_variables(None, None) == {}
    assert lm.think_end is think_end
