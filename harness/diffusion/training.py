"""The training loop of recipes, attacks and defenses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.capabilities import CheckpointedModel, offers
from harness.diffusion import gpu
from harness.diffusion.events import loop, progress
from harness.diffusion.interrupted import Kept, Training


class Diverged(ArithmeticError):
    """The loss became NaN or infinite; the message contains the step."""


UNREAD = 20  # steps of a GPU between two looks at the loss
Schedule = Literal["constant", "cosine", "one-cycle"]


def minimize(
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    lr: float,
    schedule: Schedule = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    ema: float = 0.0,
    bf16: bool = False,
    phase: str = "train",
    stop: Callable[[int, float], bool] | None = None,
    kept: Kept | None = None,
    factors: Sequence[float] = (),
) -> list[float]:
    """Minimises `loss()` over `parameters` by AdamW for `steps` steps and returns the loss of every step.

    schedule: constant, cosine (with linear warm-up over `warmup` steps) or one-cycle (peak `lr`; a tenth of the steps
    are warm-up). clip: largest norm of the gradient. ema: decay of an exponential moving average of the parameters,
    which replaces them at the end; 0 is off. bf16: autocast of the forward pass. stop(step, loss): ends the training
    early when it returns True. kept: the training goes on from the state that an interrupted one with the same settings
    left there; its owner removes the file. factors: of lr, one per parameter; none for the same rate, and not together
    with `kept`. Only `parameters` require gradients while this runs. Raises Diverged on a NaN or infinite loss. On a
    GPU the losses are looked at every UNREAD steps, unless `stop` wants them, so the error may come that much later.
    """
    params = list(parameters)
    groups = (
        [{"params": [p], "lr": lr * factor} for p, factor in zip(params, factors, strict=True)] if factors else params
    )
    on_gpu = params[0].is_cuda
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=on_gpu or None)
    lr_schedule = _schedule(optimizer, schedule, steps, warmup)
    average = _average(params, ema)
    settings = {"steps": steps, "lr": lr, "schedule": schedule, "warmup": warmup, "weight_decay": weight_decay,
                "clip": clip, "ema": ema, "bf16": bf16, "phase": phase}  # fmt: skip
    training = Training(list(params), optimizer, lr_schedule, average, settings)
    losses = Losses(phase, [] if kept is None else kept.read(training), UNREAD if on_gpu and stop is None else 1)
    with _trainable(params):
        for step in loop(phase, range(len(losses.read), steps)):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(params[0].device.type, torch.bfloat16, enabled=bf16):
                value = loss()
            losses.add(value.detach())
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
            lr_schedule.step()
            if average is not None:
                average.step(params)
            progress(phase, step + 1, steps, **losses.last())
            if kept is not None and kept.due():
                kept.write(training, losses.all())
            if stop is not None and stop(step, losses.read[-1]):
                break
    found = losses.all()
    if kept is not None:
        kept.write(training, found)
    if average is not None:
        average.copy_to(params)
    return found


class Losses:
    """The losses of a training, looked at every `every` steps: whoever looks waits for the device.

    read: those of the steps that were looked at, from the first. Raises Diverged, with the step, where one is NaN or
    infinite.
    """

    def __init__(self, phase: str, read: list[float], every: int) -> None:
        self.phase, self.read, self.every = phase, read, every
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """loss: of the next step, a scalar that is not changed later."""
        self._unread.append(loss)
        if len(self._unread) == self.every:
            self.all()

    def all(self) -> list[float]:
        """Of every step so far."""
        found = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        for value in found:
            if not math.isfinite(value):
                step = len(self.read)
                raise Diverged(f"{self.phase}: the loss became {value} at step {step}; a lower lr usually helps")
            self.read.append(value)
        return self.read

    def last(self) -> dict[str, float]:
        """The last one that was looked at, as `progress` takes it."""
        return {"loss": self.read[-1]} if self.read else {}


def minimize_in_two(
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    share: float,
    lr: float,
    divisor: float,
    **options: Any,
) -> None:
    """`minimize` with `lr` for a share of the steps, at least one, and then with lr / divisor for the others."""
    params, first = list(parameters), max(1, round(share * steps))
    for part, rate in ((first, lr), (steps - first, lr / divisor)):
        if part:
            minimize(loss, params, steps=part, lr=rate, **options)


def prepared(plugin: Any, model: Any) -> Any:
    """`model`, set up for training as its plugin asks: its denoiser keeps activations, or computes them again."""
    if offers(plugin, CheckpointedModel) and plugin.checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    return model


def _schedule(optimizer: Any, kind: Schedule, steps: int, warmup: int) -> Any:
    if kind == "one-cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=steps + 1, pct_start=0.1)
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def _average(params: list[nn.Parameter], decay: float) -> Any | None:
    if decay == 0:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(params, decay=decay, foreach=True)


@contextmanager
def _trainable(params: list[nn.Parameter]) -> Any:
    before = [p.requires_grad for p in params]
    for p in params:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(params, before, strict=True):
            p.requires_grad_(flag)
            p.grad = None


def draw(n: int, size: int, rng: torch.Generator) -> Tensor:
    """n indices (n,) int64 into a data set of `size`, with replacement."""
    return torch.randint(0, size, (n,), generator=rng)


class Examples:
    """Clean examples of a model in the space in which it diffuses, and batches of them.

    latents (N, C, H, W); captions as in `data`. One `batch` draws rows, timesteps and noises in this order. All methods
    that start from a clean batch therefore get the same batch under the same seed.
    """

    def __init__(self, model: Any, data: Any, most: int | None = None) -> None:
        self.model = model
        self.captions = data.captions if data.captions is None else data.captions[:most]
        self.images = data.images[:most]
        self.latents = model.encode(self.images).to(model.device)

    def batch(self, n: int, rng: torch.Generator) -> Batch:
        rows = draw(n, len(self.latents), rng)
        captions = None if self.captions is None else tuple(self.captions[i] for i in rows.tolist())
        x_0 = self.latents[gpu.sent(rows, self.latents.device)]
        return Batch(rows, x_0, self.model.draw_t(n, rng), self.model.draw_eps(n, rng), captions)


@dataclass(frozen=True)
class Batch:
    """rows (B,) into the examples, x_0 (B, C, H, W), t (B,), eps (B, C, H, W), captions (B texts or None)."""

    rows: Tensor
    x_0: Tensor
    t: Tensor
    eps: Tensor
    captions: tuple[str, ...] | None


def denoising_loss(model: Any, batch: Batch) -> Tensor:
    """DDPM's L_simple on a clean batch: ‖ε - ε_θ(x_t, t, c)‖², the mean over all elements; ‖v - v_θ‖² in a flow."""
    context = None if batch.captions is None else model.embed(batch.captions)
    found = model.eps(model.add_noise(batch.x_0, batch.eps, batch.t), batch.t, context)
    return model.error(found, batch.eps, batch.t).mean()
