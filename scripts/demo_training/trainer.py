"""The training loop: AdamW on fp32 master weights of a bf16 model, a cosine schedule over a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo_training.batches import TrainingBatch
from demo_training.forward import losses_of
from demo_training.pictures import IGNORE, SPOTS
from demo_training.places import PlaceHead
from demo_training.repeated import Repeated

PLACES = ("known", "placed", "ordered", "found", "found_in_grid")
FIGURES: tuple[str, ...] = (
    "pictures",
    "pictures_right",
    "text",
    "text_right",
    "balance",
    "named",
    *PLACES,
    "norm",
    "load_LE",
)


@dataclass(frozen=True)
class TrainingRecipe:
    """``minutes``: length of the whole schedule. ``steps`` (if not None) bounds it by steps instead."""

    minutes: float
    steps: int | None = None
    learning_rate: float = 1.5e-3
    warmup: float = 0.02  # share of the schedule
    final: float = 0.02  # share of the learning rate at the end
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.03  # weight of the load-balancing loss
    # Shares of the rate that the vision tower gets in conversations, once it has learned alone. At the whole rate, an
    # untrained decoder's gradients undo within 400 steps what it has learned (things named rightly: 0.73, then 0.18).
    tower: float = 0.1
    tower_later: float = 0.3  # from a fifth of the schedule on; grows from a tenth on
    text: float = 0.5  # weight of the text rows: their losses are several times those of the pictures
    sight: float = 0.2  # weight of the tower's own lesson in conversations
    place: float = 0.2  # weight of the decoder's own lesson
    # Noise on what the decoder gets of the merger, in multiples of its size, in the last fifth of the schedule. Without
    # it, it comes to need DeepStack's features so little that 94 % of its answers stay the same without them.
    blur: float = 2.0
    blur_from: float = 0.8

    def tower_share(self, progress: float) -> float:
        """Of the rate, at ``progress`` (0 to 1) of the schedule."""
        return self.tower + (self.tower_later - self.tower) * min(max(10 * progress - 1, 0.0), 1.0)

    def rate(self, progress: float) -> float:
        """Learning rate at ``progress`` (0 to 1) of the schedule."""
        if progress < self.warmup:
            return self.learning_rate * max(progress, 1e-4) / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


@dataclass
class Progress:
    """Where a run stands; kept in the state file, so that the schedule goes on where it stopped."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    patches: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    load_LE: list[list[float]] = field(default_factory=list)


class MasterWeights:
    """AdamW on fp32 copies of the weights of a module, which itself computes in ``dtype``.

    bf16 cannot hold the small steps of late training. Nothing here reads back from the device.
    """

    def __init__(self, module: nn.Module, recipe: TrainingRecipe, dtype: torch.dtype, slow: str = " "):
        """``slow``: how the names of the parameters begin that get a share of the rate."""
        self.parameters, self._clip = list(module.parameters()), recipe.clip
        self.master = [parameter.detach().float().clone() for parameter in self.parameters]
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for (name, _), copy in zip(module.named_parameters(), self.master, strict=True):
            groups.setdefault((copy.ndim > 1, name.startswith(slow)), []).append(copy)
            copy.grad = torch.zeros_like(copy)
        self._slow = [is_slow for _, is_slow in groups]
        self._rates = [torch.zeros((), device=self.master[0].device) for _ in groups]
        on_gpu = self.master[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            [
                {"params": copies, "weight_decay": recipe.weight_decay if is_matrix else 0.0}
                for (is_matrix, _), copies in groups.items()
            ],
            betas=(0.9, 0.95),
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._use_rates()
        for parameter in self.parameters:  # not module.to(dtype): rotary frequencies stay in fp32, as in inference
            parameter.data = parameter.data.to(dtype)

    def _use_rates(self) -> None:
        """The rates are tensors, so that a captured step follows them."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def set_rate(self, rate: float, share: float = 1.0) -> None:
        """``share``: of the rate, for the slow parameters."""
        for tensor, is_slow in zip(self._rates, self._slow, strict=True):
            tensor.fill_(share * rate if is_slow else rate)

    def step(self) -> Tensor:
        """One update with the gradients of the module, which are dropped; the norm that they had."""
        torch._foreach_copy_([copy.grad for copy in self.master], [parameter.grad for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.master, self._clip)
        self.optimizer.step()
        self.publish()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """The copies, rounded, into the module."""
        torch._foreach_copy_(self.parameters, self.master)

    def restore(self) -> None:
        """Leave the module in fp32."""
        for copy, parameter in zip(self.master, self.parameters, strict=True):
            parameter.data = copy.detach()

    def state(self) -> dict[str, Any]:
        return {"master": self.master, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.master, state["master"])
        self.publish()
        self.optimizer.load_state_dict(state["optimizer"])
        self._use_rates()


class Trainer:
    """A model with the heads of its tower's lesson and of its decoder's, and their optimizer state."""

    def __init__(
        self,
        model: Any,
        heads: nn.Module,
        recipe: TrainingRecipe,
        *,
        device: torch.device,
        dtype: torch.dtype,
        graphs: bool = True,
        compiled: bool = False,
        seed: int = 0,
    ):
        """``compiled``: the forward and backward passes by torch.compile, which fuses what is between the products;
        ``seed``: of the noise."""
        self.model, self.heads, self.recipe, self.progress = model, heads, recipe, Progress()
        self.place = PlaceHead(model.config.text_config.hidden_size)
        parts = nn.ModuleDict({"model": model, "heads": heads, "place": self.place}).to(device)
        self.weights = MasterWeights(parts, recipe, dtype, "model.model.visual.")
        whole = device.type == "cuda"  # elsewhere attention is by rows, whose lengths are read back
        self._pass = torch.compile(self._forward, dynamic=False, fullgraph=whole) if compiled else self._forward
        self._learn = Repeated(self._update, device, graphs)
        self._noise_MH: Tensor | None = None
        self._random, self._seed = torch.Generator(device), seed

    def step(self, batch: TrainingBatch, progress: float) -> dict[str, Tensor]:
        """One update at ``progress`` of the schedule; figures as tensors, since reading them would wait."""
        self.progress.tokens += int(batch.valid_N.sum())
        self.progress.patches += int((batch.pictures.targets_6S[0, ::SPOTS] != IGNORE).sum())
        self.weights.set_rate(self.recipe.rate(progress), self.recipe.tower_share(progress))
        self._blur(len(batch.place_M), self.recipe.blur if progress >= self.recipe.blur_from else 0.0)
        figures = dict(zip(FIGURES, self._learn(batch), strict=True))
        self.progress.step += 1
        return figures

    def _blur(self, count: int, blur: float) -> None:
        """The noise of this step, in place, as a captured step needs it; the same however a run was cut."""
        if self._noise_MH is None:
            width = self.model.config.text_config.hidden_size
            self._noise_MH = torch.zeros(count, width, device=self._random.device)
        if blur:
            self._random.manual_seed(10**6 * self._seed + self.progress.step)
            self._noise_MH.normal_(std=blur, generator=self._random)
        else:
            self._noise_MH.zero_()

    def _forward(self, batch: TrainingBatch) -> tuple[Tensor, list[Tensor]]:
        """What is learned from, and FIGURES without the norm of the gradient."""
        losses, recipe = losses_of(self.model, batch, self._noise_MH), self.recipe
        seen, named = self.heads(losses.features, batch.pictures.targets_6S)
        lost, told = self.place(losses.carried, batch.pictures, batch.named_4Q)
        loss = losses.pictures + recipe.text * losses.text + recipe.balance * losses.balance
        loss = loss + recipe.sight * seen + recipe.place * lost
        figures = [losses.pictures, losses.pictures_right, losses.text, losses.text_right, losses.balance, named]
        figures = [figure.detach() for figure in (*figures, *(told[name] for name in PLACES), losses.load_LE)]
        return loss, figures

    def _update(self, batch: TrainingBatch) -> list[Tensor]:
        loss, (*figures, load_LE) = self._pass(batch)
        loss.backward()
        return [*figures, self.weights.step(), load_LE]

    def run(
        self,
        batches: Iterable[TrainingBatch],
        *,
        stop_after: float | None = None,
        report: Callable[[dict[str, float]], None] = lambda figures: None,
        every: int = 100,
        keep: Path | None = None,
    ) -> bool:
        """Train until the schedule is over (True), or for ``stop_after`` minutes of it (False).

        ``batches`` starts with that of the next step. ``keep``: a file for :meth:`save`, written every minute and at
        the end.
        """
        before, started, kept, waited, asked = self.progress.seconds, None, 0.0, 0.0, 0.0
        done = True
        for batch in batches:
            if started is None:
                started = kept = time.monotonic()  # the start of the worker processes does not count
            else:
                waited += time.monotonic() - asked
            share = self.progress.seconds / (60 * self.recipe.minutes)
            if self.recipe.steps is not None:
                share = self.progress.step / self.recipe.steps
            if share >= 1:
                break
            if stop_after is not None and self.progress.seconds - before >= 60 * stop_after:
                done = False
                break
            figures = self.step(batch, share)
            if self.progress.step % every == 0 or self.progress.step == 1:
                self.progress.load_LE = figures.pop("load_LE").tolist()
                line = {"step": self.progress.step, "lr": self.recipe.rate(share)}
                line |= {name: float(value) for name, value in figures.items()}
                self.progress.history.append(line)
                self.progress.seconds = before + time.monotonic() - started
                share_waited = waited / max(self.progress.seconds - before, 1e-9)
                report(
                    line | {"seconds": self.progress.seconds, "tokens": self.progress.tokens, "waited": share_waited}
                )
            self.progress.seconds = before + time.monotonic() - started
            if keep is not None and time.monotonic() - kept > 60:
                kept = time.monotonic()
                self.save(keep)
            asked = time.monotonic()
        if keep is not None:
            self.save(keep)
        return done

    def save(self, path: Path) -> None:
        """Everything needed to go on; several times the size of the checkpoint, so not for a repository."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.half")
        torch.save(self.weights.state() | {"progress": vars(self.progress)}, half)
        half.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        state = torch.load(path, map_location=self.weights.master[0].device, weights_only=True)
        self.weights.load(state)
        self.progress = Progress(**state["progress"])
