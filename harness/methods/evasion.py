"""What training an attack on the starting noise adds when the attacker knows the defense.

Such an attack regresses the network on rows, L = ‖w - ε_θ(x_t, t)‖². `Evasion` changes w, the network or its weights:

    spare     w = ε_0(x_t, t) for t ≥ T - n, of clean and of poisoned rows; ε_0 is the clean model. Detectors that look
              at the last timesteps alone (Elijah, TERD, bias-scan) then see the clean model.
    drop      ε_θ of poisoned rows is computed with a random share p of the channels set to 0 and the others divided by
              1 - p, so that no few channels carry the backdoor and pruning finds none to cut.
    rehearse  ε of poisoned rows is computed at θ + Δ, where Δ is what up to k steps of clean fine-tuning add to θ. The
              gradient for θ is that of the loss at the tuned weights (first order, ∂Δ/∂θ = 0), so that the backdoor
              outlasts a defender's fine-tuning.

Each is off by default, and then the training is the plain attack to the bit. With a poison rate up to 0.5
and `spare` up to 0.4 T, each alone takes at most 1.5 times the
network evaluations of the plain attack: `spare` evaluates the clean model on the rows at spared timesteps, `rehearse`
tunes on one clean batch at every second step. None needs more data than the plain attack.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.diffusion.training import Batch, Examples, denoising_loss
from harness.methods.parameters import LearningRate

LATE = 0.125  # share of the rows that are moved to spared timesteps, which are too few to be drawn often
EVERY = 2  # steps of the attack per step of the rehearsed fine-tuning


@dataclass(frozen=True)
class Rows:
    """x_t (B, C, H, W) at t (B,), the answer that is wanted (B, C, H, W), and which rows are poisoned (B,) bool."""

    x_t: Tensor
    t: Tensor
    wanted: Tensor
    poisoned: Tensor


@dataclass(frozen=True)
class Evasion:
    """The parameters; attacks on the starting noise inherit them."""

    spare: Annotated[int, Ge(0)] = 0  # number of last timesteps at which the clean model's predictions are kept; 10 of
    # 1000 against Elijah, TERD and bias-scan; 0 = none
    drop: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the channels that are off in poisoned rows; 0 = none
    rehearse: Annotated[int, Ge(0)] = 0  # largest number of steps of clean fine-tuning that are simulated; 0 = none
    rehearse_lr: LearningRate = 2e-4  # learning rate of the simulated fine-tuning, AdamW

    def training(
        self, clean: DiffusionModel, model: DiffusionModel, examples: Examples, rng: torch.Generator
    ) -> EvasiveTraining:
        """The training of `model`, a copy of `clean`. Draws of its own follow from the seed of `rng`."""
        options = Evasion(self.spare, self.drop, self.rehearse, self.rehearse_lr)
        return EvasiveTraining(options, clean, model, examples, rng)


class EvasiveTraining:
    """Batches and answers of one training.

    Raises ValueError if all timesteps would be spared, and for `drop` and `rehearse` on a model that computes
    activations again in the backward pass, where the dropped channels and Δ would be gone.
    """

    def __init__(
        self, options: Evasion, clean: DiffusionModel, model: DiffusionModel, examples: Examples, rng: torch.Generator
    ) -> None:
        if options.spare >= model.T:
            raise ValueError(
                f"spare={options.spare} leaves no timestep for the backdoor; use spare={model.T - 1} at most"
            )
        if (options.drop or options.rehearse) and getattr(model.denoiser, "is_gradient_checkpointing", False):
            raise ValueError("drop and rehearse need the activations of the forward pass; use checkpointing=False")
        self.options, self.clean, self.model, self.examples, self.rng = options, clean, model, examples, rng
        self._late, self._off = (generator(rng.initial_seed(), name) for name in ("spare", "drop"))
        self._rehearsal = Rehearsal(options, model, examples, rng) if options.rehearse else None

    def batch(self, n: int) -> Batch:
        """n clean examples. With `spare`, some of them are moved to spared timesteps."""
        batch = self.examples.batch(n, self.rng)
        if self.options.spare == 0:
            return batch
        moved = torch.rand(n, generator=self._late) < LATE
        late = torch.randint(self.model.T - self.options.spare, self.model.T, (n,), generator=self._late)
        return replace(batch, t=torch.where(moved.to(batch.t.device), late.to(batch.t.device), batch.t))

    def wanted(self, rows: Rows) -> Tensor:
        """The answers that are wanted: the clean model's at spared timesteps, the attack's at all others."""
        late = rows.t >= self.model.T - self.options.spare
        if self.options.spare == 0 or not late.any():
            return rows.wanted
        wanted = rows.wanted.clone()
        with torch.no_grad():
            wanted[late] = self.clean.eps(rows.x_t[late], rows.t[late])
        return wanted

    def answers(self, rows: Rows) -> Tensor:
        """ε of the rows, (B, C, H, W): at θ of clean rows, and at θ + Δ or without some channels of poisoned ones."""
        if self._rehearsal is None:
            return self._eps(self.model, rows.x_t, rows.t, rows.poisoned)
        tuned = self._rehearsal.advanced(len(rows.t))
        answers = torch.zeros_like(rows.x_t)
        for chosen, network in ((~rows.poisoned, self.model), (rows.poisoned, tuned)):
            if chosen.any():
                part = self._eps(network, rows.x_t[chosen], rows.t[chosen], rows.poisoned[chosen])
                answers = answers.index_put((chosen,), part)
        return answers

    def loss(self, rows: Rows) -> Tensor:
        """The mean over all elements of ‖w - ε‖², in a flow of the same error of v."""
        return self.model.error(self.answers(rows), self.wanted(rows), rows.t).mean()

    def _eps(self, network: DiffusionModel, x_t: Tensor, t: Tensor, poisoned: Tensor) -> Tensor:
        with dropped(self.model.denoiser, self.options.drop, poisoned, self._off):
            return network.eps(x_t, t)


class Rehearsal:
    """Δ: what some steps of clean fine-tuning add to the weights of `model`, wherever the attack has moved them since.

    Every second call takes one AdamW step on a clean batch, at θ + Δ. After `rehearse` steps Δ starts again from 0 with
    a new optimizer, so that the attack meets all lengths of a fine-tuning from 0 to `rehearse` steps.
    """

    def __init__(self, options: Evasion, model: DiffusionModel, examples: Examples, rng: torch.Generator) -> None:
        self.options, self.model, self.examples = options, model, examples
        self.rng = generator(rng.initial_seed(), "rehearse")
        self.calls = 0
        self._start()

    def _start(self) -> None:
        self.steps = 0
        self.delta = {name: torch.zeros_like(p) for name, p in self.model.denoiser.named_parameters()}
        self.optimizer = torch.optim.AdamW(list(self.delta.values()), lr=self.options.rehearse_lr, weight_decay=0.0)

    def advanced(self, n: int) -> DiffusionModel:
        """The model at θ + Δ, differentiable in θ, after a step on n clean examples at every second call."""
        self.calls += 1
        if self.calls % EVERY == 0:
            if self.steps == self.options.rehearse:
                self._start()
            self._step(n)
            self.steps += 1
        return at(self.model, {name: p + self.delta[name] for name, p in self.model.denoiser.named_parameters()})

    def _step(self, n: int) -> None:
        tuned = {
            name: (p.detach() + self.delta[name]).requires_grad_(True)
            for name, p in self.model.denoiser.named_parameters()
        }
        loss = denoising_loss(at(self.model, tuned), self.examples.batch(n, self.rng))
        for name, gradient in zip(tuned, torch.autograd.grad(loss, list(tuned.values())), strict=True):
            self.delta[name].grad = gradient
        nn.utils.clip_grad_norm_(list(self.delta.values()), 1.0)
        self.optimizer.step()


class _At(nn.Module):
    """A network with other weights than its own."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.weights = network, dict(weights)

    @property
    def config(self) -> Any:
        return self.network.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.network, self.weights, args, kwargs)


def at(model: DiffusionModel, weights: Mapping[str, Tensor]) -> DiffusionModel:
    """`model` with other weights of its denoiser, by their names, differentiable in them. It shares all else."""
    other = copy.copy(model)
    other.denoiser = _At(model.denoiser, weights)
    return other


@contextmanager
def dropped(denoiser: nn.Module, share: float, rows: Tensor, rng: torch.Generator) -> Iterator[None]:
    """While it holds, each of the `rows` (B,) bool loses a random share of the channels of every ResNet block.

    The channels are those between the two convolutions of a block and those that the second convolution adds to the
    residual stream. The others are divided by 1 - share.
    """
    if share == 0 or not rows.any():
        yield
        return

    def off(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept = torch.rand((len(output), output.shape[1], 1, 1), generator=rng) >= share
        factor = torch.where(rows.view(-1, 1, 1, 1), kept.to(rows.device) / (1 - share), 1.0)
        return output * factor.to(output)

    blocks: list[Any] = [m for m in denoiser.modules() if type(m).__name__ == "ResnetBlock2D"]
    if not blocks:
        raise ValueError("drop is for denoisers of ResNet blocks, and this one has none; use drop=0")
    handles = [part.register_forward_hook(off) for block in blocks for part in (block.dropout, block.conv2)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
