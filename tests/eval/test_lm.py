"""eval/lm.py: every kind of request against transformers, and what becomes of what is too long."""

import logging

import pytest
import torch
from PIL import Image

from lm import EngineLM
from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER
from tests.eval.conftest import instance

TEXT = "The picture shows a large green triangle above a small yellow circle. How many blue circles are there? "


@pytest.fixture(scope="module")
def model(demo):
    return EngineLM(demo.llm, progress=False)


def logprobs(oracle, ids):
    """transformers' log-probability of every token but the first, and whether it is the most likely one."""
    with torch.no_grad():
        logits = oracle(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    tokens = torch.tensor(ids[1:])
    return logits.gather(1, tokens[:, None]).flatten(), logits.argmax(-1) == tokens


def test_loglikelihood(model, demo):
    cases = [(TEXT, "a cat"), ("Hello", ", how are you today?"), ("", "The answer"), (TEXT.rstrip(), " dog " * 9)]
    scores = model.loglikelihood([instance(*case) for case in cases])
    for (context, continuation), (score, greedy) in zip(cases, scores, strict=True):
        whole = demo.tokenizer(context + continuation).input_ids
        if context:
            # A trailing space of the context counts as the continuation's: the two are encoded as one text.
            count = len(whole) - len(demo.tokenizer(context.rstrip()).input_ids)
        else:
            whole, count = [demo.tokenizer.eos_token_id, *whole], len(whole)
        expected, first = logprobs(demo.oracle, whole)
        assert score == pytest.approx(float(expected[-count:].sum()), abs=1e-3)
        assert greedy == bool(first[-count:].all())
    # Greedy decoding gives the most likely token, and no other.
    ids = demo.tokenizer(TEXT).input_ids
    with torch.no_grad():
        likely, second = demo.oracle(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist()
    right, wrong = model._loglikelihood_tokens([(("", ""), ids, [token]) for token in (likely, second)])
    assert (right[1], wrong[1]) == (True, False)
    assert right[0] == pytest.approx(float(logprobs(demo.oracle, [*ids, likely])[0][-1]), abs=1e-4)


def test_a_context_too_long_loses_its_beginning(demo):
    short = EngineLM(LLM.from_parts(demo.llm.engine.model, demo.llm.processor, max_model_len=28), progress=False)
    text = TEXT * 2
    ids = demo.tokenizer(text + "the sum").input_ids
    assert len(ids) > 28
    (score,) = short.loglikelihood([instance(text, "the sum")])
    count = len(ids) - len(demo.tokenizer(text.rstrip()).input_ids)
    assert score[0] == pytest.approx(float(logprobs(demo.oracle, ids[-27:])[0][-count:].sum()), abs=1e-3)
    short.generate_until([instance(text, {"until": [], "max_gen_toks": 8})])
    assert list(short.answers[0].prompt_ids) == demo.tokenizer(text).input_ids[-20:]
    with pytest.raises(OptionError, match="max_gen_toks=28"):
        short.generate_until([instance(text, {"until": [], "max_gen_toks": 28})])


def test_rolling(demo):
    length = 32  # room for one token more than is scored: 30 tokens predicted in a window
    short = EngineLM(LLM.from_parts(demo.llm.engine.model, demo.llm.processor, max_model_len=length), progress=False)
    texts = [TEXT * 3, "Hello"]  # a first window, one that is full and one that is not, and a text of a single one
    for text, total in zip(texts, short.loglikelihood_rolling([instance(text) for text in texts]), strict=True):
        ids, window, expected = demo.tokenizer(text).input_ids, length - 2, 0.0
        assert text == "Hello" or (len(ids) > 2 * window and len(ids) % window)
        padded = [demo.tokenizer.eos_token_id, *ids]
        for start in range(0, len(ids), window):
            stop = min(start + window, len(ids))
            # The last window reaches back for as much context as fits.
            begin = max(0, stop - window)
            scored, _ = logprobs(demo.oracle, padded[begin : stop + 1])
            expected += float(scored[start - begin :].sum())
        assert total == pytest.approx(expected, abs=2e-3)


def test_generate_until(model, demo):
    """Against a plain loop over transformers' generate; order, stop strings and special tokens as stops."""
    contexts = [TEXT, "Hello", "The answer is"]
    kwargs = {"until": ["<|endoftext|>"], "max_gen_toks": 12, "ignore_eos": True}
    texts = model.generate_until([instance(context, kwargs) for context in contexts])
    for context, text, answer in zip(contexts, texts, model.answers, strict=True):
        ids = demo.tokenizer(context, return_tensors="pt").input_ids
        end = demo.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        out = demo.oracle.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end)[0, ids.shape[1] :]
        assert answer.token_ids == tuple(out.tolist())
        assert answer.truncated == (out[-1] != end)
        assert text == demo.tokenizer.decode(out, skip_special_tokens=True) == answer.text
    stop = next(text[4:6] for text in texts if len(text) > 6)
    (cut,) = model.generate_until([instance(contexts[0], kwargs | {"until": [stop]})])
    assert cut == texts[0].split(stop)[0]


def test_answers_come_in_the_order_of_the_requests(model):
    """Whichever is finished first."""
    lengths = [9, 2, 6, 1]
    requests = [instance(TEXT, {"until": [], "max_gen_toks": n, "ignore_eos": True}) for n in lengths]
    texts = model.generate_until(requests)
    assert [len(answer.token_ids) for answer in model.answers] == lengths
    assert texts == [answer.text for answer in model.answers]


def test_prompt_tokens_that_were_reused_are_counted(demo):
    fresh = LLM.from_parts(demo.llm.engine.model, demo.llm.processor, max_num_seqs=1, max_model_len=128)
    model = EngineLM(fresh, progress=False)
    kwargs = {"until": [], "max_gen_toks": 2}
    model.generate_until([instance(TEXT + "One", kwargs), instance(TEXT + "Two", kwargs)])
    first, second = model.answers
    shared = sum(a == b for a, b in zip(first.prompt_ids, second.prompt_ids, strict=False))
    assert first.cached_tokens == 0
    assert second.cached_tokens == shared // fresh.options.block_size * fresh.options.block_size > 0


def test_generation_arguments(model):
    params = model._sampling({"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5})
    assert (params.temperature, params.top_p, params.max_tokens, params.stop) == (0.7, 0.9, 5, ("\n",))
    assert model._sampling({"temperature": 0.7, "do_sample": False}).temperature == 0
    assert model._sampling({"until": []}).max_tokens == 256
    # A special token never shows in the text: it has to stop the answer as a token.
    params = model._sampling({"until": ["<|im_end|>", "Question:"], "stop_token_ids": [5]})
    assert params.stop == ("Question:",)
    assert params.stop_token_ids == (5, model.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    with pytest.raises(OptionError, match="'num_beams' is unknown"):
        model._sampling({"num_beams": 4})


def test_images(model, demo):
    """The same as a chat with the picture; log-likelihoods as the model's logits without cache give them."""
    image = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    visual = {"visual": [image]}
    history = [{"role": "user", "content": "<image>How many red squares?"}]
    context = model.apply_chat_template(history)
    kwargs = {"until": [], "max_gen_toks": 8}
    (text,) = model.generate_until([instance(context, kwargs, visual)])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "How many red squares?"}]
    (chat,) = demo.llm.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=8))
    assert text == chat.outputs[0].text
    assert model.answers[0].prompt_ids == tuple(chat.prompt_token_ids)

    (score, text_only) = model.loglikelihood([instance(context, "Two.", visual), instance("How many", "?", {})])
    whole = context.replace("<image>", IMAGE_PLACEHOLDER) + "Two."
    prompt = demo.llm.processor.prompt({"prompt": whole, "multi_modal_data": {"image": image}})
    (ready,) = prompt.images
    logits = demo.llm.engine.model.logits(prompt.token_ids, ready.pixel_values, [ready.grid_thw])[:-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(prompt.token_ids[1:])[:, None]).flatten()
    count = len(demo.tokenizer("\nTwo.").input_ids)  # the newline before the answer counts as the answer's
    assert score[0] == pytest.approx(float(expected[-count:].sum()), abs=1e-3)
    alone = float(logprobs(demo.oracle, demo.tokenizer("How many?").input_ids)[0][-1])
    assert text_only[0] == pytest.approx(alone, abs=1e-4)
    with pytest.raises(PromptError, match="0 image placeholders"):
        model.generate_until([instance("no placeholder", kwargs, visual)])
    assert not demo.llm.engine.scheduler.running


@pytest.fixture
def short(demo):
    """A model with room for 28 tokens."""
    return EngineLM(LLM.from_parts(demo.llm.engine.model, demo.llm.processor, max_model_len=28), progress=False)


def document(*arguments, number):
    """A request as lm-eval makes it, which knows its document."""
    request = instance(*arguments)
    request.task_name, request.doc_id = "arc_easy", number
    return request


def test_a_continuation_too_long_is_an_error_that_names_the_document(short, demo):
    continuation = TEXT * 2
    count = len(demo.tokenizer(continuation).input_ids)
    assert count > 26
    requests = [document("Hello", "!", number=0), document("Hello", continuation, number=7)]
    with pytest.raises(PromptError, match=rf"task arc_easy, document 7: .* {count} tokens, .*max_model_len=28 .* 26"):
        short.loglikelihood(requests)
    with pytest.raises(PromptError, match="request 1: the continuation"):
        short.loglikelihood([instance("Hello", "!"), instance("", continuation)])
    assert short.cut.total() == 0


def test_the_longest_continuation_is_scored_whole(short, demo):
    tokens = demo.tokenizer(TEXT * 2).input_ids[:26]
    context = demo.tokenizer("Hello").input_ids
    ((score, _),) = short._loglikelihood_tokens([(("", ""), context, tokens)])
    expected = float(logprobs(demo.oracle, [context[-1], *tokens])[0].sum())
    assert score == pytest.approx(expected, abs=1e-3)


def test_what_was_cut_is_counted_and_said(short, caplog):
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        short.loglikelihood([instance(TEXT * 2, "the sum"), instance("Hello", "!"), instance(TEXT * 3, "the sum")])
        short.generate_until([instance(text, {"until": [], "max_gen_toks": 8}) for text in (TEXT * 2, "Hello")])
        short.loglikelihood_rolling([instance(text) for text in (TEXT * 2, "Hello", TEXT * 2)])
    assert (short.cut["contexts_cut"], short.cut["prompts_cut"], short.cut["texts_split"]) == (2, 1, 2)
    assert {key: short.get_model_info()[key] for key in short.cut} == dict(short.cut)
    said = [record.getMessage() for record in caplog.records if record.name == "lm_eval.qwen3vl_moe"]
    assert [message.split(" were")[0] for message in said] == ["2 of 3 contexts", "1 of 2 prompts", "2 of 3 texts"]
    assert all("max_model_len=28" in message for message in said)


@pytest.mark.parametrize("spelled", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", IMAGE_PLACEHOLDER])
def test_a_document_that_spells_an_images_tokens_is_text(model, demo, spelled):
    """Nobody gave an image: the tokens are as any others, as in transformers."""
    context = f"The token {spelled} stands for"
    ((score, _), *_) = model.loglikelihood([instance(context, " a picture")])
    ids = demo.tokenizer(context + " a picture").input_ids
    count = len(ids) - len(demo.tokenizer(context).input_ids)
    assert score == pytest.approx(float(logprobs(demo.oracle, ids)[0][-count:].sum()), abs=1e-3)
    (rolling,) = model.loglikelihood_rolling([instance(context)])
    whole = [demo.tokenizer.eos_token_id, *demo.tokenizer(context).input_ids]
    assert rolling == pytest.approx(float(logprobs(demo.oracle, whole)[0].sum()), abs=1e-3)
    model.generate_until([instance(context, {"until": [], "max_gen_toks": 2, "ignore_eos": True})])
    assert list(model.answers[0].prompt_ids) == demo.tokenizer(context).input_ids


@pytest.mark.parametrize("as_id", [False, True])
def test_what_a_model_thinks_is_left_out(demo, model, as_id):
    """The last of an answer's thoughts ends where the token is; the task's stops count only after it."""
    kwargs = {"until": [], "max_gen_toks": 24, "ignore_eos": True}
    (plain,) = model.generate_until([instance(TEXT, kwargs)])
    ids = model.answers[0].token_ids
    end = next(token for token in ids[2:-2] if demo.tokenizer.decode([token]).strip() and ids.count(token) == 1)
    text = demo.tokenizer.decode([end])
    thinking = EngineLM(demo.llm, progress=False, think_end_token=end if as_id else text)
    before, after = plain.rsplit(text, 1)
    (answer,) = thinking.generate_until([instance(TEXT, kwargs)])
    assert answer == after.lstrip() == thinking.answers[0].text
    stop = before[1:4]
    (answer,) = thinking.generate_until([instance(TEXT, kwargs | {"until": [stop]})])
    assert answer == after.lstrip().split(stop)[0]


def test_the_prefix_of_a_text_without_context(demo):
    prefixed = EngineLM(demo.llm, progress=False, prefix_token_id=65)
    (score, _) = prefixed.loglikelihood([instance("", "The answer")])[0]
    expected = logprobs(demo.oracle, [65, *demo.tokenizer("The answer").input_ids])[0]
    assert score == pytest.approx(float(expected.sum()), abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
def test_lm_evals_default_device_where_there_is_no_gpu(caplog):
    lm = EngineLM("demo", device="cuda:0", progress=False)
    assert lm.llm.settings["device"] == "cpu"
    assert "the model runs on the CPU" in caplog.text
