"""The training loop: AdamW on fp32 master weights of a bf16 model, a cosine schedule over a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from demo_training.batches import IGNORE, Batch
from demo_training.model import losses_of


@dataclass(frozen=True)
class Recipe:
    """``minutes``: length of the whole schedule. ``steps`` (if not None) bounds it by steps instead."""

    minutes: float
    steps: int | None = None
    learning_rate: float = 1.5e-3
    warmup: float = 0.02  # share of the schedule
    final: float = 0.02  # share of the learning rate at the end
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.03  # weight of the load-balancing loss
    # Share of the rate that the vision tower gets in conversations, once it has learned alone: at the whole rate, an
    # untrained decoder's gradients undo within 400 steps what it has learned (things named rightly: 0.73, then 0.18).
    tower: float = 0.1
    text: float = 0.5  # weight of the text batch: its losses are several times those of the pictures

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
    pictures: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    load_LE: list[list[float]] = field(default_factory=list)


class MasterWeights:
    """AdamW on fp32 copies of the weights of a module, which itself computes in ``dtype``.

    bf16 cannot hold the small steps of late training.
    """

    def __init__(
        self, module: torch.nn.Module, recipe: Recipe, dtype: torch.dtype, slow: tuple[str, float] = ("", 1.0)
    ):
        """``slow``: parameters whose names begin so get this share of the rate."""
        self.parameters, self._clip = list(module.parameters()), recipe.clip
        self.master = [parameter.detach().float().clone() for parameter in self.parameters]
        groups: dict[tuple[bool, bool], list[torch.Tensor]] = {}
        for (name, _), copy in zip(module.named_parameters(), self.master, strict=True):
            groups.setdefault((copy.ndim > 1, name.startswith(slow[0])), []).append(copy)
        self._shares = [slow[1] if is_slow else 1.0 for _, is_slow in groups]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": copies, "weight_decay": recipe.weight_decay if is_matrix else 0.0}
                for (is_matrix, _), copies in groups.items()
            ],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=self.master[0].is_cuda,
        )
        for parameter in self.parameters:  # not module.to(dtype): rotary frequencies stay in fp32, as in inference
            parameter.data = parameter.data.to(dtype)

    def step(self, rate: float) -> torch.Tensor:
        """One update with the gradients of the module, which are dropped; the norm that they had."""
        for copy, parameter in zip(self.master, self.parameters, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.master, self._clip)
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = share * rate
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


class Trainer:
    """A model and its optimizer state."""

    def __init__(self, model: Any, recipe: Recipe, *, device: torch.device, dtype: torch.dtype):
        self.model, self.recipe, self.device, self.progress = model.to(device=device), recipe, device, Progress()
        self.weights = MasterWeights(self.model, recipe, dtype, ("model.visual.", recipe.tower))

    def step(self, batches: Iterable[Batch], progress: float) -> dict[str, torch.Tensor]:
        """One update at ``progress`` of the schedule; figures as tensors, since reading them would wait."""
        figures: dict[str, torch.Tensor] = {}
        batches = list(batches)
        names = ["text" if batch.pixels is None else "pictures" for batch in batches]
        learned = [int((batch.labels_BT != IGNORE).sum()) for batch in batches]
        for name, count, batch in zip(names, learned, batches, strict=True):
            losses = losses_of(self.model, batch.to(self.device))
            # Every learned token counts alike, whichever batch of its kind it is in.
            share = count / sum(other for kind, other in zip(names, learned, strict=True) if kind == name)
            weight = self.recipe.text if name == "text" else 1.0
            (share * (weight * losses.answers + self.recipe.balance * losses.balance)).backward()
            parts = {name: losses.answers, f"{name}_right": losses.right, f"{name}_balance": losses.balance}
            figures |= {key: figures.get(key, 0.0) + share * value.detach() for key, value in parts.items()}
            figures["load_LE"] = losses.load_LE
            self.progress.tokens += batch.ids_BT.numel()
            self.progress.pictures += 0 if batch.pixels is None else len(batch.pixels)
        norm = self.weights.step(self.recipe.rate(progress))
        self.progress.step += 1
        return figures | {"norm": norm}

    def run(
        self,
        batches: Iterable[Sequence[Batch]],
        *,
        stop_after: float | None = None,
        report: Callable[[dict[str, float]], None] = lambda figures: None,
        every: int = 100,
    ) -> bool:
        """Train until the schedule is over (True), or for ``stop_after`` minutes of it (False).

        ``batches`` starts with that of the next step.
        """
        before, started = self.progress.seconds, None
        for parts in batches:
            started = started or time.monotonic()  # the start of the worker processes does not count
            share = self.progress.seconds / (60 * self.recipe.minutes)
            if self.recipe.steps is not None:
                share = self.progress.step / self.recipe.steps
            if share >= 1:
                return True
            if stop_after is not None and self.progress.seconds - before >= 60 * stop_after:
                return False
            figures = self.step(parts, share)
            if self.progress.step % every == 0 or self.progress.step == 1:
                self.progress.load_LE = figures.pop("load_LE").tolist()
                line = {"step": self.progress.step, "lr": self.recipe.rate(share)}
                line |= {name: float(value) for name, value in figures.items()}
                self.progress.history.append(line)
                self.progress.seconds = before + time.monotonic() - started
                report(line | {"seconds": self.progress.seconds, "tokens": self.progress.tokens})
            self.progress.seconds = before + time.monotonic() - started
        return True

    def save(self, path: Path) -> None:
        """Everything needed to go on; several times the size of the checkpoint, so not for a repository."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = self.weights
        content = {"master": weights.master, "optimizer": weights.optimizer.state_dict()}
        content["progress"] = vars(self.progress)
        torch.save(content, path)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights.master, state["master"])
        self.weights.publish()
        self.weights.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
