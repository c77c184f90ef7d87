"""What one of several ranks holds of the decoder: the one place that says how its layers are divided (tensor parallel).

Every rank has all tokens of a step. Of attention it holds some heads, of the experts a part of each one's width or some
whole ones, of embedding and output layer a part of the vocabulary. So the output of attention and of the experts is a
part of a sum, which :class:`qwen3vl_moe.ops.Ranks` takes; norms, routers and the vision tower are on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3vl_moe.config import TextConfig

_KERNEL_WIDTH, _FP8_BLOCK = 8, 128  # what a part of an expert's width should be a multiple of


@dataclass(frozen=True)
class Part:
    """Ranges of what is divided.

    Attributes:
        heads, kv_heads: of attention. With more ranks than key/value heads, several hold the same one.
        experts: those that are held.
        width: of each of these.
        vocabulary: rows of the embedding and of the output layer.
    """

    heads: range
    kv_heads: range
    experts: range
    width: range
    vocabulary: range

    @classmethod
    def of(cls, config: TextConfig, rank: int, size: int) -> Part:
        """The part of rank ``rank`` of ``size``.

        Raises:
            ValueError: the decoder cannot be divided so: :func:`why_not`.
        """
        problem = why_not(config, size)
        if problem is not None:
            raise ValueError(problem)
        by_width = divides_width(config, size)
        kv_heads = max(1, config.num_kv_heads // size)
        first_kv_head = rank * config.num_kv_heads // size
        return cls(
            heads=_share(config.num_heads, rank, size),
            kv_heads=range(first_kv_head, first_kv_head + kv_heads),
            experts=range(config.num_experts) if by_width else _share(config.num_experts, rank, size),
            width=_share(config.expert_width, rank, size) if by_width else range(config.expert_width),
            vocabulary=_share(config.vocab_size, rank, size),
        )


def divides_width(config: TextConfig, size: int) -> bool:
    """Whether ranks hold a part of the width of every expert, which gives each the same work; else whole experts.

    Blocks of FP8 weights, and what kernels load at once, are not cut.
    """
    unit = size * (_FP8_BLOCK if config.fp8_experts else _KERNEL_WIDTH)
    return size == 1 or config.expert_width % unit == 0


def why_not(config: TextConfig, size: int) -> str | None:
    """Why a decoder cannot be divided among so many ranks, naming the size at fault; None if it can."""
    if size == 1:
        return None
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % size:
        return f"num_attention_heads={heads} is no multiple of it"
    if kv_heads % size and size % kv_heads:
        return f"it neither divides num_key_value_heads={kv_heads} nor is a multiple of it"
    if config.fp8_attention and (heads // size * config.head_dim) % _FP8_BLOCK:
        return f"it cuts the FP8 blocks of {heads} attention heads of {config.head_dim} channels"
    if not divides_width(config, size) and config.num_experts % size:
        unit = _FP8_BLOCK if config.fp8_experts else _KERNEL_WIDTH
        return (
            f"it divides neither moe_intermediate_size={config.expert_width} into multiples of {unit} nor "
            f"num_experts={config.num_experts}"
        )
    if config.vocab_size % size:
        return f"vocab_size={config.vocab_size} is no multiple of it"
    return None


def _share(count: int, rank: int, size: int) -> range:
    return range(rank * count // size, (rank + 1) * count // size)
