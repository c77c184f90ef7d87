"""eval/gsm8k.py: answers equal a plain loop over transformers' generate, figures are right, errors are one line."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fetch_gsm8k
import gsm8k
import problems
from qwen3vl_moe.errors import UserError
from tests.eval.conftest import ROOT, run_program


@pytest.fixture
def run(problems_dir):
    """Run the program on the demo checkpoint in fp32; ``--data`` comes first, so that a test may give another one."""

    def call(*arguments):
        small = ("--dtype", "float32", "--device", "cpu", "--max-model-len", 512, "--max-num-seqs", 4)
        return run_program(gsm8k.app, "--data", problems_dir, *small, *arguments)

    return call


def result_files(folder):
    (results,), (samples,) = folder.rglob("results_*.json"), folder.rglob("samples_gsm8k_*.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def plain_loop(demo, prompts, max_tokens):
    for prompt in prompts:
        ids = demo.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            out = demo.oracle.generate(ids, max_new_tokens=max_tokens, do_sample=False)
        text = demo.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        yield ids.shape[1], out.shape[1] - ids.shape[1], re.split("Question:|</s>", text)[0]


@pytest.mark.parametrize(("num_fewshot", "split"), [(0, "test"), (1, "train")])
def test_answers_equal_a_plain_loop_over_transformers(demo, run, problems_dir, tmp_path, num_fewshot, split):
    arguments = ("--num-fewshot", num_fewshot, "--split", split, "--limit", 3, "--max-gen-toks", 12)
    done = run(*arguments, "--output", tmp_path)
    assert done.code == 0, done.err
    results, samples = result_files(tmp_path)
    rows = [row for row in samples if row["filter"] == "flexible-extract"]
    assert len(rows) == 3
    truths = [json.loads(line) for line in (problems_dir / f"{split}.jsonl").read_text().splitlines()]
    prompts = [row["arguments"]["gen_args_0"]["arg_0"] for row in rows]
    for row, truth, prompt in zip(rows, truths, prompts, strict=False):
        assert row["doc"] == truth
        question = {"role": "user", "content": f"Question: {truth['question']}\nAnswer:"}
        asked = demo.tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        # With an example, the problem comes as a later turn, and is never its own example.
        assert prompt == asked if num_fewshot == 0 else prompt.endswith(asked)
        assert prompt.count("<|im_start|>user") == num_fewshot + 1
        assert prompt.count(truth["question"]) == 1
    expected = list(plain_loop(demo, prompts, 12))
    assert [row["resps"] for row in rows] == [[[text]] for *_, text in expected]

    # The figures: counted once more from the loop and from the answers.
    figures = results["qwen3vl_moe"]
    assert figures["prompt_tokens"] == sum(length for length, *_ in expected)
    assert figures["answer_tokens"] == sum(length for _, length, _ in expected)
    assert figures["seconds"] > 0
    for name, pattern in (("strict-match", r"#### (-?[0-9.,]+)"), ("flexible-extract", r"-?[$0-9.,]{2,}|-?[0-9]+")):
        right = 0
        for truth, (*_, text) in zip(truths, expected, strict=False):
            found = re.findall(pattern, text)
            chosen = found[0 if name == "strict-match" else -1] if found else "[invalid]"
            strip = str.maketrans("", "", ",$")
            right += chosen.translate(strip).rstrip(".") == truth["answer"].split("#### ")[1].translate(strip)
        assert results["results"]["gsm8k"][f"exact_match,{name}"] == pytest.approx(right / 3)
        assert re.search(rf"{name} +{right / 3:.2%}", done.out)
    assert f"gsm8k, {split}, 3 problems, {num_fewshot}-shot" in done.out
    assert f"{figures['prompt_tokens']} prompt tokens" in done.out


def test_a_right_answer_counts(demo, problems_dir, monkeypatch):
    """The way from an answer to the accuracy: two of three right, one of them only for the lenient filter."""
    from lm import EngineLM

    answers = ["So there are 11 pens.\n#### 11", "That is $7,000.", "#### 4"]
    model = EngineLM(demo.llm, progress=False)
    monkeypatch.setattr(model, "generate_until", lambda requests: answers)
    asked = problems.Gsm8k(num_fewshot=0, data=problems_dir)
    results, _ = problems.evaluate(model, asked, name="demo", gen_kwargs=gsm8k.generation(8))
    assert problems.accuracy(results, "strict-match")[0] == pytest.approx(1 / 3)
    share, error = problems.accuracy(results, "flexible-extract")
    assert share == pytest.approx(2 / 3)
    assert error == pytest.approx((share * (1 - share) / (3 - 1)) ** 0.5)


def test_an_interrupted_run_goes_on_from_the_cache(run, tmp_path):
    arguments = ("--num-fewshot", 0, "--max-gen-toks", 4, "--cache", tmp_path / "cache")
    assert run(*arguments, "--limit", 1).code == 0
    whole = run(*arguments, "--output", tmp_path / "out")
    assert whole.code == 0
    assert result_files(tmp_path / "out")[0]["qwen3vl_moe"]["answers_computed"] == 2
    assert "1 answers were in the cache" in whole.out
    again = run(*arguments)
    assert "3 answers were in the cache" in again.out
    assert again.out.splitlines()[:6] == whole.out.splitlines()[:6]
    # Another way of computing has a cache of its own.
    other = run(*arguments, "--dtype", "bfloat16")
    assert "in the cache" not in other.out


def test_fixed_examples_are_computed_once(run, problems_dir, tmp_path):
    arguments = ("--num-fewshot", 2, "--fixed-examples", "--max-num-seqs", 1, "--max-gen-toks", 2)
    assert run(*arguments, "--output", tmp_path).code == 0
    results, samples = result_files(tmp_path)
    prompts = [row["arguments"]["gen_args_0"]["arg_0"] for row in samples if row["filter"] == "strict-match"]
    examples = [json.loads(line) for line in (problems_dir / "train.jsonl").read_text().splitlines()[:2]]
    for prompt in prompts:
        places = [prompt.index(example["answer"]) for example in examples]
        assert places == sorted(places)
    figures = results["qwen3vl_moe"]
    assert 0.4 < figures["prompt_tokens_reused"] / figures["prompt_tokens"] < 2 / 3, "for the 2nd and 3rd problem"


def test_answers_of_one_length(run, tmp_path):
    done = run("--num-fewshot", 0, "--max-gen-toks", 7, "--ignore-eos", "--temperature", 1, "--output", tmp_path)
    assert done.code == 0, done.err
    figures = result_files(tmp_path)[0]["qwen3vl_moe"]
    assert figures["answer_tokens"] == 3 * 7
    assert figures["answers_truncated"] == 3
    # Three tokens of four experts each, of sixteen.
    experts = figures["experts"]
    assert experts["sequences"] == 3
    assert experts["of"] == 16
    assert 4 <= experts["per_layer"] <= 12
    assert f"a decoding step of 3 problems reads {experts['per_layer']:.0f} of 16 experts a layer" in done.out


def test_answers_that_spell_an_images_tokens(run, monkeypatch, tmp_path):
    """Random weights write them. What is counted after the run takes them for text, too."""
    from lm import EngineLM

    answer = EngineLM._answer

    def spelling(self, prompts, params, done):
        config = self.llm.engine.model.config
        special = (config.vision_start_token_id, config.image_token_id, config.video_token_id)
        answer(self, prompts, params, lambda n, a: done(n, replace(a, token_ids=special + a.token_ids[3:])))

    monkeypatch.setattr(EngineLM, "_answer", spelling)
    arguments = ("--num-fewshot", 0, "--max-gen-toks", 7, "--ignore-eos", "--fixed-examples", "--temperature", 1)
    done = run(*arguments, "--output", tmp_path)
    assert done.code == 0, done.err
    assert "a decoding step of 3 problems reads" in done.out
    assert result_files(tmp_path)[0]["qwen3vl_moe"]["experts"]["sequences"] == 3


def test_answers_are_kept_where_a_later_count_fails(run, monkeypatch, tmp_path):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no room to count")

    monkeypatch.setattr("benchmarking.experts_read.experts_while_decoding", fail)
    shown = []
    monkeypatch.setattr(gsm8k, "report", lambda results, figures, asked: shown.append(figures))
    with pytest.raises(torch.OutOfMemoryError):
        run("--num-fewshot", 0, "--max-gen-toks", 2, "--ignore-eos", "--output", tmp_path)
    results, samples = result_files(tmp_path)
    assert len(samples) == 6
    assert results["qwen3vl_moe"]["answer_tokens"] == shown[0]["answer_tokens"] == 6


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_run_through_transformers(run, tmp_path, batch):
    """Greedy in fp32, padded on the left or one by one: the engine's answers."""
    arguments = ("--num-fewshot", 0, "--max-gen-toks", 12)
    assert run(*arguments, "--output", tmp_path / "engine").code == 0
    done = run(*arguments, "--through", "transformers", "--max-num-seqs", batch, "--output", tmp_path / "peer")
    assert done.code == 0, done.err
    (ours, own), (peers, theirs) = (result_files(tmp_path / folder) for folder in ("engine", "peer"))
    assert [row["resps"] for row in own] == [row["resps"] for row in theirs]
    for key in ("prompt_tokens", "answer_tokens", "answers_truncated"):
        assert ours["qwen3vl_moe"][key] == peers["qwen3vl_moe"][key]
    assert peers["qwen3vl_moe"]["through"] == "transformers"


def test_answers_of_one_length_through_transformers(run, tmp_path):
    arguments = ("--num-fewshot", 0, "--max-gen-toks", 7, "--ignore-eos", "--temperature", 1)
    done = run(*arguments, "--through", "transformers", "--output", tmp_path)
    assert done.code == 0, done.err
    assert result_files(tmp_path)[0]["qwen3vl_moe"]["answer_tokens"] == 3 * 7


def test_prompts_that_do_not_fit_are_counted(demo, run, tmp_path):
    arguments = ("--num-fewshot", 0, "--max-gen-toks", 4)
    whole = run(*arguments, "--output", tmp_path / "whole")
    assert "lost their beginning" not in whole.out
    figures, samples = result_files(tmp_path / "whole")
    assert figures["qwen3vl_moe"]["prompts_cut"] == 0
    prompts = [row["arguments"]["gen_args_0"]["arg_0"] for row in samples if row["filter"] == "strict-match"]
    lengths = [len(demo.tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts]
    longer = sum(length > min(lengths) for length in lengths)
    assert 0 < longer < 3
    # The shortest have just enough room for their answers beside them.
    done = run(*arguments, "--max-model-len", min(lengths) + 4, "--output", tmp_path / "cut")
    assert f"{longer} of 3 prompts did not fit and lost their beginning: raise --max-model-len" in done.out
    assert result_files(tmp_path / "cut")[0]["qwen3vl_moe"]["prompts_cut"] == longer


def test_random_weights_for_a_directory(demo, run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in demo.path.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    done = run("--model", bare, "--load-format", "dummy", "--num-fewshot", 0, "--limit", 1, "--max-gen-toks", 2)
    assert done.code == 0, done.err
    assert "The weights are random" in done.out
    for option, value, message in (
        ("--device", "abacus", "device 'abacus' is unknown"),
        ("--dtype", "float64", "dtype float64 is not supported"),
        ("--moe", "tma", "moe='tma' cannot run here"),
    ):
        refused = run("--model", bare, "--load-format", "dummy", "--num-fewshot", 0, option, value)
        assert refused.code == 2
        assert refused.err.splitlines()[-1].startswith(f"error: {message}")


BAD_LINES = {
    "no JSON": ('{"question": "1 + 1?"', "test.jsonl, line 2: no JSON"),
    "no answer": ('{"question": "1 + 1?"}', "test.jsonl, line 2: an object with the texts question and answer"),
    "no key": ('{"question": "1 + 1?", "answer": "two"}', "test.jsonl, line 2: the answer does not end in '#### '"),
}


@pytest.mark.parametrize("case", list(BAD_LINES))
def test_a_bad_line_is_named(run, problems_dir, tmp_path, case):
    line, message = BAD_LINES[case]
    first = (problems_dir / "test.jsonl").read_text().splitlines()[0]
    (tmp_path / "test.jsonl").write_text(f"{first}\n{line}\n")
    done = run("--data", tmp_path, "--num-fewshot", 0)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "nowhere/test.jsonl is missing"),
        (("--split", "validation"), "--split validation: gsm8k has test and train"),
        (("--limit", 0), "--limit 0: 1 or more"),
        (("--num-fewshot", -1), "--num-fewshot -1: 0 or more"),
        (("--num-fewshot", 4), "has 4 problems, and 5 are needed"),
        (("--max-gen-toks", 0), "--max-gen-toks 0: 1 or more"),
        (("--output", __file__), "cannot be made a folder"),
        (("--cache", f"{__file__}/cache"), "--cache: "),
        (("--temperature", -1), "--temperature -1.0: 0 or more"),
        (("--gpu-memory-utilization", 1.5), "gpu_memory_utilization=1.5"),
        (("--load-format", "tensorizer"), "choose from auto, dummy"),
        (("--through", "vllm"), "--through vllm: choose engine or transformers"),
        (("--moe", "fast"), "moe='fast' is unknown"),
        (("--load-format", "dummy", "--model", "nowhere"), "nowhere is neither a directory nor a hub id"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    done = run("--num-fewshot", 0, *arguments)
    assert (done.code, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_no_hub(monkeypatch):
    def unreachable(*arguments):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *arguments, **named: None)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    done = run_program(gsm8k.app, "--limit", 1, "--device", "cpu")
    assert done.code == 2
    assert "cannot be had from the hub (Couldn't reach" in done.err
    assert "--data DIR" in done.err


@pytest.fixture
def hub(monkeypatch):
    """``hub(error)``: it answers the first question with an error, or without one; the arguments of what is loaded."""
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(*arguments):
        asked.append((*arguments, datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.is_offline_mode()))
        raise ConnectionError("not here")

    def answer(error=None):
        def dataset_info(self, name, **named):
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return asked

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    return answer


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("no answer")], ids=repr)
def test_a_hub_that_is_not_reached_is_not_asked_again_and_again(hub, error):
    """Its libraries take what they have kept, and know of the hub again afterwards."""
    asked = hub(error)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"cannot be had from the hub \({error}\); give programs --data DIR"):
            problems.from_hub(["test"])
    assert asked == 2 * [("openai/gsm8k", "main", True, True)]
    import datasets
    import huggingface_hub

    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.is_offline_mode()


def test_a_hub_that_answers_is_asked_for_the_data(hub):
    from huggingface_hub.errors import HfHubHTTPError

    refused = HfHubHTTPError.__new__(HfHubHTTPError)  # what its constructor takes differs between releases
    for error in (None, refused):
        asked = hub(error)
        with pytest.raises(UserError, match=r"cannot be had from the hub \(not here\)"):
            problems.from_hub(["test"])
    assert asked == 2 * [("openai/gsm8k", "main", False, False)]


def test_the_data_are_fetched_once(tmp_path, monkeypatch):
    rows = {
        "train": [{"question": "1+1?", "answer": "It is 2.\n#### 2"}],
        "test": [{"question": "ä", "answer": "#### 3"}],
    }
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return {name: SimpleNamespace(to_list=lambda name=name: rows[name]) for name in rows}

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *arguments, **named: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for _ in range(2):
        assert run_program(fetch_gsm8k.app, tmp_path / "new" / "gsm8k").code == 0
    assert {name: problems.read_problems(tmp_path / "new" / "gsm8k" / f"{name}.jsonl") for name in rows} == rows
    assert asked == [("openai/gsm8k", "main")]
    (tmp_path / "file").touch()
    done = run_program(fetch_gsm8k.app, tmp_path / "file" / "gsm8k")
    assert done.code == 2
    assert done.err.endswith("test.jsonl cannot be written: Not a directory\n")


def test_files_that_lm_eval_could_not_write(run, tmp_path, monkeypatch):
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda *arguments, **named: None)
    done = run("--num-fewshot", 0, "--limit", 1, "--max-gen-toks", 2, "--output", tmp_path)
    assert done.code == 2
    assert "could not write its result files" in done.err


def test_the_program_runs_from_anywhere(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, ROOT / "eval" / "gsm8k.py", "--num-fewshot", "-1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --num-fewshot -1: 0 or more is needed\n"


def test_the_published_problems(shared_dir):
    folder = shared_dir / "gsm8k"
    if not folder.is_dir():
        pytest.skip("the shared folder holds no gsm8k")
    counts = {name: len(problems.read_problems(folder / f"{name}.jsonl")) for name in problems.SPLITS}
    assert counts == {"test": 1319, "train": 7473}
    with pytest.raises(UserError, match="missing"):
        problems.read_problems(folder / "validation.jsonl")
