"""The table of names: which tensor of a checkpoint goes where in the model, and how ranks divide it.

Two writers of checkpoints are known, and only what they write is accepted: the published Qwen3-VL-MoE checkpoints and
``save_pretrained`` of transformers 5. They use the same names and differ in the layout of the fused expert tensors:

================== ============================ ============================
layout             ``experts.gate_up_proj``     ``experts.down_proj``
================== ============================ ============================
``published``      [E, H, 2I], gate | up        [E, I, H]
``transformers5``  [E, 2I, H], gate over up     [E, H, I]
================== ============================ ============================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen3vl_moe.config import Qwen3VLMoeConfig, TextConfig
from qwen3vl_moe.model.part import Part, divides_width
from qwen3vl_moe.ops import ALONE, Ranks
from tma_moe.block_fp8 import scale_shape

LAYOUTS = ("published", "transformers5")

# Sizes in the table: V vocabulary, H hidden, N*D and G*D query and key/value heads times head width, D head width,
# E experts, I expert width; of the vision tower: C width, m*m*C that of merge_size x merge_size patches side by side,
# F width of its MLP, S position embeddings, and the Conv3d kernel: c channels, t frames, p rows and columns of pixels.
# What stands in brackets is divided among ranks (model/part.py), where those do not hold whole experts instead.
_TABLE = """
# name in the checkpoint                          our parameter                          transform  its shape there
model.visual.patch_embed.proj.weight              vision.patch_embed.weight              reshape    C c t p p
model.visual.patch_embed.proj.bias                vision.patch_embed.bias                copy       C
model.visual.pos_embed.weight                     vision.pos_embed.weight                copy       S C
model.visual.blocks.{b}.norm1.weight              vision.blocks.{b}.norm1.weight         copy       C
model.visual.blocks.{b}.norm1.bias                vision.blocks.{b}.norm1.bias           copy       C
model.visual.blocks.{b}.norm2.weight              vision.blocks.{b}.norm2.weight         copy       C
model.visual.blocks.{b}.norm2.bias                vision.blocks.{b}.norm2.bias           copy       C
model.visual.blocks.{b}.attn.qkv.weight           vision.blocks.{b}.attn.qkv.weight      copy       3C C
model.visual.blocks.{b}.attn.qkv.bias             vision.blocks.{b}.attn.qkv.bias        copy       3C
model.visual.blocks.{b}.attn.proj.weight          vision.blocks.{b}.attn.out.weight      copy       C C
model.visual.blocks.{b}.attn.proj.bias            vision.blocks.{b}.attn.out.bias        copy       C
model.visual.blocks.{b}.mlp.linear_fc1.weight     vision.blocks.{b}.mlp.fc1.weight       copy       F C
model.visual.blocks.{b}.mlp.linear_fc1.bias       vision.blocks.{b}.mlp.fc1.bias         copy       F
model.visual.blocks.{b}.mlp.linear_fc2.weight     vision.blocks.{b}.mlp.fc2.weight       copy       C F
model.visual.blocks.{b}.mlp.linear_fc2.bias       vision.blocks.{b}.mlp.fc2.bias         copy       C
model.visual.merger.norm.weight                   vision.merger.norm.weight              copy       C
model.visual.merger.norm.bias                     vision.merger.norm.bias                copy       C
model.visual.merger.linear_fc1.weight             vision.merger.fc1.weight               copy       m*m*C m*m*C
model.visual.merger.linear_fc1.bias               vision.merger.fc1.bias                 copy       m*m*C
model.visual.merger.linear_fc2.weight             vision.merger.fc2.weight               copy       H m*m*C
model.visual.merger.linear_fc2.bias               vision.merger.fc2.bias                 copy       H
model.visual.deepstack_merger_list.{d}.norm.weight        vision.deepstack_mergers.{d}.norm.weight  copy  m*m*C
model.visual.deepstack_merger_list.{d}.norm.bias          vision.deepstack_mergers.{d}.norm.bias    copy  m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc1.weight  vision.deepstack_mergers.{d}.fc1.weight   copy  m*m*C m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc1.bias    vision.deepstack_mergers.{d}.fc1.bias     copy  m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc2.weight  vision.deepstack_mergers.{d}.fc2.weight   copy  H m*m*C
model.visual.deepstack_merger_list.{d}.linear_fc2.bias    vision.deepstack_mergers.{d}.fc2.bias     copy  H
model.language_model.embed_tokens.weight          text.embed.weight                      copy       [V] H
model.language_model.layers.{l}.input_layernorm.weight           text.layers.{l}.attn_norm.weight      copy     H
model.language_model.layers.{l}.self_attn.q_proj.weight          text.layers.{l}.attn.qkv.weight       rows     [N*D] H
model.language_model.layers.{l}.self_attn.k_proj.weight          text.layers.{l}.attn.qkv.weight       rows     [G*D] H
model.language_model.layers.{l}.self_attn.v_proj.weight          text.layers.{l}.attn.qkv.weight       rows     [G*D] H
model.language_model.layers.{l}.self_attn.q_norm.weight          text.layers.{l}.attn.q_norm.weight    copy     D
model.language_model.layers.{l}.self_attn.k_norm.weight          text.layers.{l}.attn.k_norm.weight    copy     D
model.language_model.layers.{l}.self_attn.o_proj.weight          text.layers.{l}.attn.out.weight       copy     H [N*D]
model.language_model.layers.{l}.post_attention_layernorm.weight  text.layers.{l}.moe_norm.weight       copy     H
model.language_model.layers.{l}.mlp.gate.weight                  text.layers.{l}.moe.router.weight     copy     E H
model.language_model.layers.{l}.mlp.experts.gate_up_proj         text.layers.{l}.moe.experts.gate_up   experts  E H [2I]
model.language_model.layers.{l}.mlp.experts.down_proj            text.layers.{l}.moe.experts.down      experts  E [I] H
model.language_model.norm.weight                  text.norm.weight                       copy       H
lm_head.weight                                    lm_head.weight                         copy       [V] H"""


@dataclass(frozen=True)
class Entry:
    """One row of the table for one layer.

    Attributes:
        source, target: its name in the checkpoint, and that of our parameter.
        transform: ``copy``; ``reshape`` (same bytes, our parameter has fewer dimensions); ``rows`` (of the parameter,
            from ``first_row`` on); or ``experts`` (``shape`` is that of the published layout; ours is transformers 5's,
            with the last two dimensions swapped).
        shape: of the whole tensor.
        first_row: see ``rows``.
        fp8: whether the weights are quantised and have scales (weights/scales.py).
        axis: the dimension of ``shape`` that is divided among ranks; None: each holds the whole tensor.
        ranges: of each rank, in order: what it holds along that.
        rank: whose ``first_row`` and ``own`` these are.
    """

    source: str
    target: str
    transform: str
    shape: tuple[int, ...]
    first_row: int = 0
    fp8: bool = False
    axis: int | None = None
    ranges: tuple[tuple[range, ...], ...] = ()
    rank: int = 0

    @property
    def own(self) -> tuple[range, ...]:
        """What this rank holds of a tensor that is divided."""
        return self.ranges[self.rank]

    def axis_in(self, layout: str) -> int | None:
        """``axis`` in a checkpoint whose experts have ``layout``."""
        if self.axis is not None and self.axis > 0 and self.transform == "experts" and layout == "transformers5":
            return 3 - self.axis
        return self.axis

    def shape_in(self, layout: str) -> tuple[int, ...]:
        """Shape in a checkpoint whose experts have ``layout``."""
        if self.transform == "experts" and layout == "transformers5":
            return self.shape[0], self.shape[2], self.shape[1]
        return self.shape

    def scale_shape_in(self, layout: str) -> tuple[int, ...]:
        """Shape of its scales in such a checkpoint."""
        return scale_shape(self.shape_in(layout))

    def destination(self, parameter: torch.Tensor, layout: str) -> torch.Tensor:
        """The view of ``parameter`` that, filled with the stored tensor as it is, carries out the transform.

        Of a divided tensor, with what this rank holds: its ranges one after the other.
        """
        if self.transform == "reshape":
            return parameter.view(self.shape)
        if self.transform == "rows":
            return parameter[self.first_row : self.first_row + self.rows]
        if self.transform == "experts" and layout == "published":
            return parameter.transpose(1, 2)
        return parameter

    @property
    def rows(self) -> int:
        """How long the first dimension is here."""
        return sum(map(len, self.own)) if self.axis == 0 else self.shape[0]


def expand_table(config: Qwen3VLMoeConfig, ranks: Ranks = ALONE) -> list[Entry]:
    """The table for all layers of ``config``. Rows of one parameter follow each other in the order of the table.

    Args:
        ranks: among which the tensors are divided.
    """
    text, vision = config.text, config.vision
    sizes = {
        "V": text.vocab_size,
        "H": text.hidden_size,
        "N*D": text.num_heads * text.head_dim,
        "G*D": text.num_kv_heads * text.head_dim,
        "D": text.head_dim,
        "E": text.num_experts,
        "I": text.expert_width,
        "2I": 2 * text.expert_width,
        "C": vision.hidden_size,
        "3C": 3 * vision.hidden_size,
        "m*m*C": vision.merged_width,
        "F": vision.intermediate_size,
        "S": vision.num_positions,
        "c": vision.in_channels,
        "t": vision.temporal_patch_size,
        "p": vision.patch_size,
    }
    repeats = {"l": text.num_layers, "b": vision.depth, "d": len(vision.deepstack_indexes)}
    entries, next_row = [], {}
    for line in _TABLE.strip().splitlines()[1:]:
        source, target, transform, *shape_names = line.split()
        shape = tuple(sizes[name.strip("[]")] for name in shape_names)
        axis, ranges = _division(config.text, shape_names, ranks)
        counter = re.search(r"\{(.)\}", source)
        for i in range(repeats[counter[1]] if counter else 1):
            name = target.replace(counter[0], str(i)) if counter else target
            named = source.replace(counter[0], str(i)) if counter else source
            layers = text.fp8_attention if ".self_attn." in source else text.fp8_experts
            fp8 = i in layers and (transform == "experts" or source.endswith("_proj.weight"))
            first_row = next_row.get(name, 0)
            entry = Entry(named, name, transform, shape, first_row, fp8, axis, ranges, ranks.rank)
            next_row[name] = first_row + entry.rows
            entries.append(entry)
    return entries


def _division(
    config: TextConfig, names: Sequence[str], ranks: Ranks
) -> tuple[int | None, tuple[tuple[range, ...], ...]]:
    """Which dimension of a tensor is divided among ranks, and what of it each of them holds."""
    divided = next((name for name in names if name.startswith("[")), None)
    if divided is None or ranks.alone:
        return None, ()
    parts = [Part.of(config, rank, ranks.size) for rank in range(ranks.size)]
    if divided in ("[I]", "[2I]") and not divides_width(config, ranks.size):
        return names.index("E"), tuple((part.experts,) for part in parts)
    D, I = config.head_dim, config.expert_width  # noqa: E741
    held = {
        "[V]": lambda part: (part.vocabulary,),
        "[N*D]": lambda part: (range(part.heads.start * D, part.heads.stop * D),),
        "[G*D]": lambda part: (range(part.kv_heads.start * D, part.kv_heads.stop * D),),
        "[I]": lambda part: (part.width,),
        "[2I]": lambda part: (part.width, range(I + part.width.start, I + part.width.stop)),  # gate and up
    }
    return names.index(divided), tuple(map(held[divided], parts))
