"""The gsm8k problems, lm-eval's own task over them, and its result files: what gsm8k.py and parity.py share."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_moe.errors import OptionError, UserError
from qwen3vl_moe.json_files import parse_json, read_regular

SPLITS = ("test", "train")
FILTERS = ("strict-match", "flexible-extract")
_DATA_SET = "openai/gsm8k"  # on the hub
_MOST_BYTES = 1 << 30  # of a file of problems; gsm8k's have 5 MB
_KEY = re.compile(r"#### *-?[0-9][0-9.,]*\s*$")


@dataclass(frozen=True)
class Gsm8k:
    """Which problems, and how they are asked.

    Attributes:
        split: "test" (1,319 problems) or "train" (7,473).
        num_fewshot: worked examples before each problem, drawn from the training split with lm-eval's seed.
        limit: only the first so many problems; None for all.
        data: folder with ``train.jsonl`` and ``test.jsonl``; None takes the data set from the hub.
        chat: put question and examples into the chat template, the examples as earlier turns.
        fixed_examples: the same (first) examples before every problem, which the engine then computes once. lm-eval
            draws them anew for each problem unless told otherwise.

    Raises:
        OptionError: an impossible value.
    """

    split: str = "test"
    num_fewshot: int = 5
    limit: int | None = None
    data: Path | None = None
    chat: bool = True
    fixed_examples: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise OptionError(f"--split {self.split}: gsm8k has {' and '.join(SPLITS)}")
        if self.num_fewshot < 0:
            raise OptionError(f"--num-fewshot {self.num_fewshot}: 0 or more is needed")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"--limit {self.limit}: 1 or more is needed")

    def task(self) -> dict[str, Any]:
        """What differs from lm-eval's own task: data, split and examples.

        Raises:
            UserError: the hub cannot be reached, or a data file is missing or damaged.
        """
        names = [self.split] + (["train"] if self.num_fewshot and self.split != "train" else [])
        rows = from_hub(names) if self.data is None else {n: read_problems(self.data / f"{n}.jsonl") for n in names}
        # An example is never the problem itself, so the training split has to hold one more.
        if self.num_fewshot and len(rows["train"]) <= self.num_fewshot:
            raise OptionError(
                f"--num-fewshot {self.num_fewshot}: the training split has {len(rows['train'])} problems, "
                f"and {self.num_fewshot + 1} are needed"
            )
        task = {"task": "gsm8k", "num_fewshot": self.num_fewshot, "test_split": self.split}
        task["custom_dataset"] = _Rows(rows)
        if not self.num_fewshot:
            task |= {"training_split": None, "fewshot_split": None}  # no examples: their file need not be there
        elif self.fixed_examples:
            task["fewshot_config"] = {"sampler": "first_n"}
        return task


class _Rows:
    """A data set in memory, in the form in which lm-eval calls for one."""

    def __init__(self, rows: dict[str, list[dict[str, str]]]):
        self.rows = rows

    def __call__(self, **_: Any) -> Any:
        import datasets

        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in self.rows.items()})


def read_problems(path: Path) -> list[dict[str, str]]:
    """Problems of a file in gsm8k's form: a JSON object with ``question`` and ``answer`` per line.

    Raises:
        UserError: no such file, or a line of another form; the message names file and line.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: --data needs a folder with train.jsonl and test.jsonl of gsm8k")
    problems = []
    try:
        text = read_regular(path, UserError, _MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut a text at U+2028, too
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise UserError(f"{path}, line {number}: an object with the texts question and answer is needed")
        if not _KEY.search(row["answer"]):
            raise UserError(f"{path}, line {number}: the answer does not end in '#### ' and a number")
        problems.append({"question": row["question"], "answer": row["answer"]})
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def from_hub(names: list[str]) -> dict[str, list[dict[str, str]]]:
    """Splits of gsm8k from the Hugging Face hub.

    Raises:
        UserError: lm-eval's package of data sets is not there, or the hub cannot be reached.
    """
    require_lm_eval()
    import datasets

    unreached = None
    try:
        with _no_retries_in_vain() as unreached:
            found = datasets.load_dataset(_DATA_SET, "main")
    except Exception as error:  # of a dozen kinds, from four libraries
        reason = (str(unreached or error).splitlines() or [type(unreached or error).__name__])[0]
        raise UserError(
            f"gsm8k cannot be had from the hub ({reason}); give programs --data DIR, a folder with train.jsonl and "
            "test.jsonl"
        ) from error
    return {name: found[name].to_list() for name in names}


@contextmanager
def _no_retries_in_vain() -> Iterator[Exception | None]:
    """Where the hub cannot be reached, its libraries are offline in here; gives the error that says why.

    They then take what is in their cache, or say at once that it is not there, instead of after half a minute of tries.
    """
    import datasets
    import huggingface_hub as hub

    unreached = None
    try:
        hub.HfApi().dataset_info(_DATA_SET, timeout=5)
    except hub.errors.HfHubHTTPError:
        pass  # it has answered, if with an error: loading says which
    except Exception as error:  # of its HTTP client, and releases differ in which one that is
        unreached = error
    flags = () if unreached is None else (hub.constants, datasets.config)
    before = [flag.HF_HUB_OFFLINE for flag in flags]
    try:
        for flag in flags:
            flag.HF_HUB_OFFLINE = True
        yield unreached
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.HF_HUB_OFFLINE = value


def require_lm_eval() -> None:
    """Raises UserError where lm-eval is not installed; quiets it where it is."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("lm-eval is not installed: pip install 'qwen3vl-moe[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every option that is passed in Python


def evaluate(
    lm: Any,
    problems: Gsm8k,
    *,
    name: str,
    gen_kwargs: dict[str, Any],
    cache: Path | None = None,
    output: Path | None = None,
) -> tuple[dict[str, Any], Any]:
    """Run the task through lm-eval.

    Args:
        lm: an lm-eval model.
        problems: what is asked.
        name: of the model, which names the folder of the result files.
        gen_kwargs: generation arguments beside the task's own.
        cache: prefix of the cache of answers (answer_cache.py); None for none.
        output: folder for lm-eval's result files; None writes none.

    Returns:
        lm-eval's results, ``samples`` included, and its tracker for :func:`save` (None without ``output``).

    Raises:
        UserError: the data is not to be had.
    """
    import yaml
    from lm_eval import simple_evaluate, tasks
    from lm_eval.loggers import EvaluationTracker

    import answer_cache

    answer_cache.install()
    # lm-eval replaces a task of its own whole by one that is passed in: start from its file.
    original = Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(original.read_text(encoding="utf-8")) | problems.task()
    tracker = None if output is None else EvaluationTracker(output_path=str(output))
    results = simple_evaluate(
        model=lm,
        model_args={"pretrained": name},  # names the folder of the result files
        tasks=[task],
        task_manager=tasks.TaskManager(include_defaults=False),
        apply_chat_template=problems.chat,
        fewshot_as_multiturn=problems.chat,
        limit=problems.limit,
        gen_kwargs=gen_kwargs,
        use_cache=None if cache is None else str(cache),
        evaluation_tracker=tracker,
        log_samples=True,
    )
    results["configs"]["gsm8k"].pop("custom_dataset", None)  # the rows themselves, which no result file should repeat
    return results, tracker


def save(results: dict[str, Any], tracker: Any) -> list[Path]:
    """Write lm-eval's result file and sample file.

    Raises:
        UserError: lm-eval, which only warns where it cannot write, has not written one of them.
    """
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name="gsm8k", samples=copy.deepcopy(samples["gsm8k"]))  # it alters them
    results["samples"] = samples
    folder, date = Path(tracker.output_path), tracker.date_id
    written = [*folder.rglob(f"results_{date}.json"), *folder.rglob(f"samples_gsm8k_{date}.jsonl")]
    if len(written) != 2 or not all(path.stat().st_size for path in written):
        raise UserError(f"lm-eval could not write its result files into {folder}")
    return written


def accuracy(results: dict[str, Any], name: str) -> tuple[float, float | None]:
    """Share of right answers by one of :data:`FILTERS`, and its standard error (None for a single problem)."""
    figures = results["results"]["gsm8k"]
    error = figures[f"exact_match_stderr,{name}"]
    return figures[f"exact_match,{name}"], error if isinstance(error, float) else None
