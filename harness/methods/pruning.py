"""Structural pruning of a denoiser by torch-pruning, scores for its channels, and fine-tuning of the pruned network.

Layers that must lose the same channels form a group: a convolution, its normalisation, all layers that read from it,
and what is added to it. Within a group, the channels of every normalisation group and the dimensions of every attention
head lose the same number. GroupNorm then keeps its number of groups, and their sizes stay equal. The ratios are
therefore coarse; the notes contain the realised share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from harness.diffusion.events import loop, progress
from harness.diffusion.model import DiffusionModel
from harness.diffusion.pruned_shapes import fit
from harness.diffusion.samplers import usual
from harness.diffusion.seeds import image_noise, image_seeds
from harness.diffusion.training import Examples, minimize
from harness.methods.parameters import Fraction, LearningRate, PositiveInt
from harness.types import Data, Inputs, Knowledge

Scope = Literal["all", "inner", "time-attention"]
Rounding = Literal["up", "down", "released"]
Importance = Callable[[Any], Tensor | None]  # a group of torch-pruning → one score per channel


# ---- removing channels ----------------------------------------------------------------------------------------------


def prune(
    model: DiffusionModel, importance: Importance, ratio: float, scope: Scope = "all", rounding: Rounding = "up"
) -> dict[str, float]:
    """Removes, in place, from every group of layers the share `ratio` of its channels with the smallest importance.

    scope: "all" = all layers except the last; "inner" = the channels between the two convolutions of a ResNet block,
    which the residual stream does not see; "time-attention" = the time embedding and the queries, keys and values of
    attention. rounding: "up" removes at least one channel of every normalisation group, as torch-pruning 1.6 does;
    "down" leaves a layer unchanged if `ratio` of a group is less than a channel; "released" rounds the share of the
    layer up and then that of a group down, as the copy of torch-pruning in Diff-Cleanse's code does. Returns the
    realised shares in [0, 1]: `layers` that lost outputs, output `channels` of all layers, `parameters`.
    """
    net = model.denoiser
    before = _sizes(net)
    graph = _graph(model)
    chosen = []
    for found in graph.get_all_groups(ignored_layers=_outside(net, scope), root_module_types=[nn.Conv2d, nn.Linear]):
        group = _rooted(graph, found)
        score = importance(group)
        rows = [] if score is None else smallest(score, _parts(net, group), ratio, rounding)
        if rows:
            chosen.append((group[0].dep.target.module, group[0].dep.handler, rows))
    for layer, cut, rows in chosen:
        graph.get_pruning_group(layer, cut, rows).prune()
    net.zero_grad(set_to_none=True)
    net.requires_grad_(False)
    fit(net)
    return _realised(before, _sizes(net))


def smallest(score: Tensor, parts: int, ratio: float, rounding: Rounding) -> list[int]:
    """The channels to remove: in each of `parts` equal runs of score (C,) the share `ratio` with the smallest score,
    never all.

    rounding: see `prune`. No channels are removed if C is not a multiple of `parts`.
    """
    if len(score) % parts:
        return []
    size = len(score) // parts
    of_run, of_layer = round(ratio * size, 9), round(ratio * len(score), 9)  # 9 digits: removes the rounding error of
    # floats
    n = {"up": math.ceil(of_run), "down": math.floor(of_run), "released": math.ceil(of_layer) // parts}[rounding]
    n = min(n, size - 1)
    rows = score.cpu().view(parts, size).argsort(dim=1, stable=True)[:, :n] + size * torch.arange(parts)[:, None]
    return sorted(rows.flatten().tolist())


def _graph(model: DiffusionModel) -> Any:
    import torch_pruning

    model.denoiser.requires_grad_(True)  # torch-pruning reads the graph of autograd
    t = torch.zeros(1, device=model.device).long()
    x = torch.zeros((1, *model.shape), device=model.device)
    with _plain_filters():
        return torch_pruning.DependencyGraph().build_dependency(
            model.denoiser, example_inputs={"sample": x, "timestep": model.time(t)}
        )


@contextmanager
def _plain_filters() -> Iterator[None]:
    """While it holds, the filters with which blocks of NCSN++ resize images are plain resizing.

    torch-pruning cannot follow channels through the reshapes of diffusers' filters. Both treat each channel alone.
    """
    from diffusers.models import downsampling, upsampling

    def resize(tensor: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
        sides = zip(tensor.shape[2:], kernel.shape, strict=True)
        return nn.functional.interpolate(tensor, size=[(n * up + sum(pad) - k) // down + 1 for n, k in sides])

    users: tuple[Any, ...] = (upsampling, downsampling)
    real = upsampling.upfirdn2d_native
    try:
        for module in users:
            module.upfirdn2d_native = resize
        yield
    finally:
        for module in users:
            module.upfirdn2d_native = real


def _rooted(graph: Any, group: Any) -> Any:
    """The group, seen from the layer of it that has the fewest outputs.

    A layer whose outputs are split (time_emb_proj, if the time embedding scales and shifts) has several outputs for
    one channel of the others. They are removed together, and the channel has one score.
    """
    layers = {
        dep.target.module: dep.handler
        for dep, _ in group
        if isinstance(dep.target.module, (nn.Conv2d, nn.Linear)) and graph.is_out_channel_pruning_fn(dep.handler)
    }
    root = group[0].dep.target.module
    narrowest = min(layers, key=lambda layer: layer.weight.shape[0], default=root)
    if root not in layers or narrowest.weight.shape[0] == root.weight.shape[0]:
        return group
    return graph.get_pruning_group(narrowest, layers[narrowest], list(range(narrowest.weight.shape[0])))


def _outside(net: Any, scope: Scope) -> list[nn.Module]:
    """The layers whose outputs are not pruned."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    inside: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "inner": lambda name: name.endswith((".conv1", ".time_emb_proj")),
        "time-attention": lambda name: name.startswith("time_embedding.") or name.endswith((".to_q", ".to_k", ".to_v")),
    }
    return [m for name, m in layers if name == "conv_out" or not inside[scope](name)]


def _parts(net: Any, group: Any) -> int:
    """The number of equal parts of the channels of a group.

    It is the common multiple of the groups of its GroupNorms and of the heads of its attention layers.
    """
    heads = {
        layer: m.heads for m in net.modules() if type(m).__name__ == "Attention" for layer in (m.to_q, m.to_k, m.to_v)
    }
    found = [1]
    for dep, _ in group:
        layer = dep.target.module
        if isinstance(layer, nn.GroupNorm):
            found.append(layer.num_groups)
        found.append(heads.get(layer, 1))
    return math.lcm(*found)


def _sizes(net: nn.Module) -> tuple[dict[str, int], int]:
    """(output channels by layer, number of parameters)."""
    layers = {name: m.weight.shape[0] for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return layers, sum(p.numel() for p in net.parameters())


def _realised(before: tuple[dict[str, int], int], after: tuple[dict[str, int], int]) -> dict[str, float]:
    touched = [name for name, size in before[0].items() if after[0][name] < size]
    return {
        "layers": len(touched) / len(before[0]),
        "channels": 1 - sum(after[0].values()) / sum(before[0].values()),
        "parameters": 1 - after[1] / before[1],
    }


# ---- scores ---------------------------------------------------------------------------------------------------------


def accumulated(
    model: DiffusionModel, loss: Callable[[int], Tensor], timesteps: Iterator[int] | range
) -> dict[str, Tensor]:
    """name → Σ_t ∂L_t/∂θ over `timesteps`, for the parameters of model.denoiser, where L_t = loss(t).

    The cost is one forward and one backward pass of all images of `loss` per timestep: on a CPU minutes for 64 images
    and 1000 timesteps. Every timestep is reported; an iterator may end before the last one of the model.
    """
    most = len(timesteps) if isinstance(timesteps, range) else model.T
    weights = dict(model.denoiser.named_parameters())
    model.denoiser.requires_grad_(True)
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for done, t in enumerate(loop("scores", timesteps, most), 1):
        found = torch.autograd.grad(loss(t), list(weights.values()), allow_unused=True)
        for name, grad in zip(weights, found, strict=True):
            if grad is not None:
                total[name] += grad
        progress("scores", done, most)
    model.denoiser.requires_grad_(False)
    return total


def taylor(model: DiffusionModel, gradients: Mapping[str, Tensor]) -> Importance:
    """I(θ_i) = Σ_k |θ_ik g_ik|, over all weights of convolutions and linear layers of a group that belong to its
    channel i.

    These are the weights that compute the channel and the weights that read it.
    """
    from torch_pruning.pruner.importance import TaylorImportance

    score = TaylorImportance(group_reduction="sum", normalizer=None)  # type: ignore[arg-type]

    def importance(group: Any) -> Tensor | None:
        for name, weight in model.denoiser.named_parameters():
            weight.grad = gradients[name]
        return score(group)

    return importance


def magnitude() -> Importance:
    """Σ_k θ_ik², over the same weights."""
    from torch_pruning.pruner.importance import MagnitudeImportance

    return MagnitudeImportance(p=2, group_reduction="sum", normalizer=None)  # type: ignore[arg-type]


def at_random(rng: torch.Generator) -> Importance:
    """A uniform draw for every channel of a group."""
    return lambda group: torch.rand(len(group[0].idxs), generator=rng)


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruning:
    """The parameters of all pruning defenses, and the steps that they share."""

    ratio: Annotated[float, Gt(0), Lt(1)] = 0.3  # share of the channels to remove from every layer; the notes contain
    # the realised share
    scope: Scope = "all"  # layers to prune: all = all layers; inner = inside ResNet blocks; time-attention = the time
    # embedding, q, k and v
    rounding: Rounding = "up"  # up = at least one channel of each normalisation group (torch-pruning 1.6); down =
    # possibly none; released = the rule of the copy in Diff-Cleanse's code, possibly none
    data: Literal["real", "synthetic"] = "real"  # images for the scores and the fine-tuning; synthetic = sampled from
    # the model
    synthetic: PositiveInt = 6000  # synthetic images; Diff-Cleanse's value at 32 pixels
    distil: bool = False  # add ‖ε_θ - ε_θ'‖² to the loss of the fine-tuning; θ' is the model before pruning
    steps: Annotated[int, Ge(0)] = 1875  # optimizer steps of the fine-tuning; 40 epochs of 6000 images at batch 128; 0
    # = no fine-tuning
    batch: PositiveInt = 128  # examples per step of the fine-tuning
    lr: LearningRate = 2e-4  # AdamW without weight decay
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"  # of the learning rate, without warm-up; released
    ema: Fraction = 0.999  # decay of the weights' moving average, released; 0 = off
    bf16: bool = False  # autocast of the forward pass of the fine-tuning

    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("data",) if self.data == "real" else ()

    def examples(self, model: DiffusionModel, knowledge: Knowledge, rng: torch.Generator) -> Examples:
        """The images for scores and fine-tuning: the defender's clean images, or images sampled from the model."""
        return Examples(model, knowledge.data if self.data == "real" else own_images(model, self.synthetic, rng))

    def pruned(self, model: DiffusionModel, importance: Importance, notes: dict[str, Any]) -> DiffusionModel:
        """`model`, pruned in place; what was realised goes to the notes."""
        start = time.perf_counter()
        notes["pruned"] = prune(model, importance, self.ratio, self.scope, self.rounding)
        notes["pruning_s"] = notes.get("scoring_s", 0.0) + time.perf_counter() - start
        return model

    def tuned(
        self, model: DiffusionModel, teacher: DiffusionModel, examples: Examples, rng: torch.Generator,
        notes: dict[str, Any],
    ) -> DiffusionModel:  # fmt: skip
        """`model`, fine-tuned in place with L = ‖ε - ε_θ(x_t, t)‖² (+ ‖ε_θ(x_t, t) - ε_θ'(x_t, t)‖²).

        The norms are over an image, the mean is over a batch.
        """

        def loss() -> Tensor:
            batch = examples.batch(self.batch, rng)
            x_t = model.add_noise(batch.x_0, batch.eps, batch.t)
            answer = model.eps(x_t, batch.t)
            value = (batch.eps - answer).square().flatten(1).sum(1).mean()
            if not self.distil:
                return value
            with torch.no_grad():
                wanted = teacher.eps(x_t, batch.t)
            return value + (answer - wanted).square().flatten(1).sum(1).mean()

        start = time.perf_counter()
        if self.steps:
            losses = minimize(
                loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema,
                bf16=self.bf16, phase="fine-tuning",
            )  # fmt: skip
            notes["finetuning_loss"] = losses
        notes["finetuning_s"] = time.perf_counter() - start
        return model


def own_images(model: DiffusionModel, n: int, rng: torch.Generator, steps: int = 50) -> Data:
    """n images sampled from the model and clean noise by its usual sampler."""
    root = int(torch.randint(2**62, (), generator=rng))
    seeds = image_seeds(root, "synthetic", n)
    sampler = usual(model, steps)
    progress("synthetic images", 0, n)
    return Data(model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), sampler, 250, "synthetic images"))
