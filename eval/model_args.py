"""Arguments of lm-eval's other models, as people have them in their commands: what becomes of each here.

Every argument of lm-eval's ``hf`` and ``vllm`` is one of these: it has a meaning here (it is an argument of
:class:`lm.EngineLM` or an option of :class:`LLM`), or it is in :data:`WITHOUT_EFFECT`, or in :data:`NOT_HERE`, where
values that ask for nothing pass and others are refused. Nothing is dropped in silence.
"""

from __future__ import annotations

from typing import Any

from qwen3vl_moe.errors import OptionError

# Whatever they say, the same is done: the engine batches by itself, and nothing of a checkpoint is ever run as code.
WITHOUT_EFFECT = {"batch_size", "max_batch_size", "trust_remote_code", "logits_cache", "offload_folder"}
_SEVERAL_GPUS = "tensor_parallel_size divides the layers, data_parallel_size the requests"
_OWN_TOKENIZER = "the checkpoint's own tokenizer is read, from its tokenizer.json"
_PLAIN_WEIGHTS = "only plain weights of bf16, fp16, fp32 are read; merge or convert them first"
# What values change nothing, and why there are no others.
NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_bos_token": ((None, False), "texts of this model begin with no special token"),
    "autogptq": ((None, False), _PLAIN_WEIGHTS),
    "backend": (("default", "causal"), "the model is a decoder"),
    "delta": ((None,), _PLAIN_WEIGHTS),
    "gguf_file": ((None,), _PLAIN_WEIGHTS),
    "gptqmodel": ((None, False), _PLAIN_WEIGHTS),
    "max_lora_rank": ((None, 16), _PLAIN_WEIGHTS),
    "lora_local_path": ((None,), _PLAIN_WEIGHTS),
    "max_cpu_memory": ((None,), "all weights are on the device"),
    "max_memory_per_gpu": ((None,), "gpu_memory_utilization bounds the memory"),
    "mixed_precision_dtype": ((None,), "dtype is that of the whole model"),
    "parallelize": ((None, False), _SEVERAL_GPUS),
    "peft": ((None,), _PLAIN_WEIGHTS),
    "quantization": ((None,), _PLAIN_WEIGHTS),
    "revision": ((None, "main"), "download that revision (hf download ... --revision) and give its directory"),
    "softmax_dtype": ((None, "float32"), "log-probabilities are fp32"),
    "subfolder": ((None, ""), "give the directory itself"),
    "tokenizer": ((None,), _OWN_TOKENIZER),
    "tokenizer_mode": ((None, "auto"), _OWN_TOKENIZER),
    "tokenizer_revision": ((None, "main"), _OWN_TOKENIZER),
    "tp_plan": ((None,), _SEVERAL_GPUS),
    "truncation": ((None, False), "what is too long loses its beginning, and is counted"),
    "truncation_side": ((None, "left"), "what is too long loses its beginning"),
    "use_fast_tokenizer": ((None, True), _OWN_TOKENIZER),
}


def engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """What of ``given`` is for :class:`LLM`; ``max_length``, hf's word, becomes ``max_model_len``.

    Raises:
        OptionError: an argument asks for what there is not.
    """
    options = {}
    for name, value in given.items():
        harmless, reason = NOT_HERE.get(name, ((), ""))
        if name in WITHOUT_EFFECT or any(type(value) is type(each) and value == each for each in harmless):
            continue
        if name in NOT_HERE:
            raise OptionError(f"{name}={value!r} is not supported: {reason}")
        options[name] = value
    longest = {name: options.pop(name, None) for name in ("max_length", "max_model_len")}
    lengths = {value for value in longest.values() if value is not None}
    if len(lengths) > 1:
        raise OptionError(f"max_length={longest['max_length']} and max_model_len={longest['max_model_len']}: name one")
    return {**options, "max_model_len": lengths.pop()} if lengths else options


def template_variables(enable_thinking: bool | None, chat_template_args: Any) -> dict[str, Any]:
    """Variables of the chat template. lm-eval's command gives a dict, or its text in braces.

    Raises:
        OptionError: they are no dict, or say two things of thinking.
    """
    variables = {} if chat_template_args is None else chat_template_args
    if not isinstance(variables, dict):
        raise OptionError(f"chat_template_args={chat_template_args!r}: a dict is needed")
    if enable_thinking is None:
        return dict(variables)
    if not isinstance(enable_thinking, bool):
        raise OptionError(f"enable_thinking={enable_thinking!r}: True or False is needed")
    if variables.get("enable_thinking", enable_thinking) != enable_thinking:
        raise OptionError(f"enable_thinking={enable_thinking} contradicts chat_template_args")
    return {**variables, "enable_thinking": enable_thinking}


def think_end(token: Any, tokenizer: Any) -> str | None:
    """The text that ends what a model thinks, from a text or, as hf takes it, a token id.

    Raises:
        OptionError: it never shows in an answer.
    """
    if token is None:
        return None
    known = tokenizer.get_vocab()
    if isinstance(token, str) and token.isdigit():
        token = int(token)
    if type(token) is int:
        if not 0 <= token < len(tokenizer):
            raise OptionError(f"think_end_token={token} is no token of the checkpoint's {len(tokenizer)}")
        token = tokenizer.decode([token])
    if not isinstance(token, str) or not token:
        raise OptionError(f"think_end_token={token!r}: a text or a token id is needed")
    if token in known and token in tokenizer.all_special_tokens:
        raise OptionError(f"think_end_token={token!r} is a special token, which the text of an answer leaves out")
    return token
