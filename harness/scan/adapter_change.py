"""A purified model as an adapter of its base: the low-rank factors of what differs between the two.

For each linear layer and convolution whose weights W differ from those W_0 of the base, the adapter holds the best
approximation of W - W_0 with a stated rank (truncated singular value decomposition, Eckart and Young 1936). A layer
that the defense left alone keeps its factors if they are of at most that rank. Biases, norms and embeddings have no
place in an adapter, nor has an autoencoder: what a defense changed there is named, with the size of the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.diffusion import adapters
from harness.diffusion.adapter_files import PARTS
from harness.diffusion.adapters import LowRank
from harness.diffusion.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.diffusion.model import DiffusionModel

# Layers of a text encoder to which diffusers attaches an adapter.
ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROBES = 8  # rows on which answers are compared
SMALLEST = 1e-6  # singular values over the largest
TINY = 1e-12
LEAST_KEPT = 0.9  # share of a change that an adapter should keep; ours


@dataclass(frozen=True)
class Lost:
    """A tensor that the defense changed and an adapter cannot hold. relative: ‖W - W_given‖ / ‖W_given‖."""

    tensor: str
    relative: float


@dataclass(frozen=True)
class Change:
    """layers: the factors, all of one rank. kept: share of ‖W - W_0‖², over these layers, that the rank keeps.
    purification: share of what the defense changed, ‖W - W_given‖², that is in the adapter; 1 if it changed no such
    layer. added: layers that only the defense changed."""

    layers: Mapping[str, LowRank]
    rank: int
    kept: float
    purification: float
    added: tuple[str, ...]
    lost: tuple[Lost, ...]
    widest: int  # largest rank that a layer can have


@torch.no_grad()
def change_from(base: DiffusionModel, given: DiffusionModel, purified: DiffusionModel, rank: int | None) -> Change:
    """The adapter that makes `purified` of `base`. given: the base with the adapter that was purified.

    rank: of every layer; None: of each layer that of the adapter that was given, and its largest rank for the layers
    that it does not change. Raises ValueError for a network with other layers than the base, such as a pruned one.
    """
    ours = given.adapter
    assert ours is not None, "the model that was purified has no adapter"
    largest = max(len(factors.a) for factors in ours.layers.values())
    found: dict[str, LowRank] = {}
    added: list[str] = []
    whole = dropped = cleaned = missed = 0.0
    held, before = dict(_layers(purified)), dict(_layers(given))
    origin = dict(_layers(base))
    for name in origin:
        if name not in held or held[name].shape != origin[name].shape:
            raise ValueError(f"the layer {name} has another shape than in the base")
        mine = ours.layers.get(name)
        if mine is not None and torch.equal(held[name], before[name]) and len(mine.a) <= (rank or largest):
            found[name] = mine
            whole += mine.delta.double().square().sum().item()
            continue
        delta = (held[name] - origin[name]).flatten(1).double().cpu()
        size = delta.square().sum().item()
        moved = (held[name] - before[name]).flatten(1).double().cpu().square().sum().item()
        if size == 0:  # the defense undid the adapter here
            cleaned += moved
            continue
        wanted = rank or (largest if mine is None else len(mine.a))
        found[name] = truncated(delta, wanted)
        left = (found[name].delta.double() - delta).square().sum().item()
        whole, dropped = whole + size, dropped + left
        if moved > 0:
            cleaned, missed = cleaned + moved, missed + left
        if mine is None:
            added.append(name)
    same = max((len(factors.a) for factors in found.values()), default=0)
    return Change(
        {name: padded(factors, same) for name, factors in found.items()}, same, 1 - dropped / max(whole, TINY),
        max(0.0, 1 - missed / cleaned) if cleaned else 1.0, tuple(added), tuple(_lost(given, purified, set(origin))),
        max((min(weight.flatten(1).shape) for weight in origin.values()), default=0),
    )  # fmt: skip


def sufficient(base: DiffusionModel, given: DiffusionModel, purified: DiffusionModel) -> Change:
    """The change at the rank of the adapter that was given, or at the first of its doubles that keeps LEAST_KEPT of the
    change from the base and of what the defense changed. Raises ValueError as `change_from` does."""
    ours = given.adapter
    assert ours is not None, "the model that was purified has no adapter"
    rank = max(len(factors.a) for factors in ours.layers.values())
    found = change_from(base, given, purified, None)
    while min(found.kept, found.purification) < LEAST_KEPT and rank < found.widest:
        rank *= 2
        found = change_from(base, given, purified, rank)
    return found


def truncated(delta: Tensor, rank: int) -> LowRank:
    """The best approximation of ΔW (out, in), float64, with at most `rank`. A and B share its singular values; those
    below SMALLEST times the largest are left out."""
    wide = delta.shape[0] <= delta.shape[1]
    gram = delta @ delta.T if wide else delta.T @ delta  # its eigenvectors are singular vectors of the shorter side
    values, vectors = (found.flip(-1)[..., :rank] for found in torch.linalg.eigh(gram))
    sizes = values.clamp_min(0).sqrt()
    kept = sizes > SMALLEST * sizes[0]
    vectors, root = vectors[:, kept], sizes[kept].sqrt()
    if wide:
        a, b = (vectors.T @ delta) / root[:, None], vectors * root
    else:
        a, b = vectors.T * root[:, None], (delta @ vectors) / root
    return LowRank(a.float().contiguous(), b.float().contiguous())


def padded(factors: LowRank, rank: int) -> LowRank:
    """The same change with factors of `rank`: releases of diffusers before 0.42 scale layers of a file wrongly whose
    ranks differ."""
    more = rank - len(factors.a)
    if not more:
        return factors
    return LowRank(nn.functional.pad(factors.a, (0, 0, 0, more)), nn.functional.pad(factors.b, (0, more)))


def _layers(model: DiffusionModel) -> Iterator[tuple[str, Tensor]]:
    """Part and name, and weights, of the layers that an adapter can change."""
    for part, net in model.components().items():
        if part not in PARTS:
            continue
        for name, layer in net.named_modules():
            fits = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
            if fits and (not part.startswith("text_encoder") or name.endswith(ENCODER)):
                yield f"{part}.{name}", _untyped(layer).weight


def _lost(given: DiffusionModel, purified: DiffusionModel, kept: set[str]) -> Iterator[Lost]:
    for part, net in purified.components().items():
        before: Any = given.components()[part].state_dict()
        for name, value in net.state_dict().items():
            layer, _, kind = f"{part}.{name}".rpartition(".")
            if (kind == "weight" and layer in kept) or torch.equal(value, before[name]):
                continue
            apart = (value.double() - before[name].double()).norm().item()
            yield Lost(f"{part}.{name}", apart / max(before[name].double().norm().item(), TINY))


@torch.no_grad()
def left_over(
    given: DiffusionModel, purified: DiffusionModel, written: DiffusionModel, prompts: Sequence[str] | None
) -> float:
    """How far the answers of `written` are from those of `purified`, in units of how far the defense moved them:
    ‖ε_written - ε_purified‖ / ‖ε_given - ε_purified‖ on a few noisy inputs. 0: the purification is whole. 1: as far
    away as before it. 0 if the defense moved nothing."""
    texts = [(prompts or ("",))[i % len(prompts or ("",))] for i in range(PROBES)]
    rng = generator(0, "adapter")
    x_t = torch.randn((PROBES, *given.shape), generator=rng)
    t = torch.linspace(0.1, 0.9, PROBES).mul(given.T).long()

    def answers(model: DiffusionModel) -> Tensor:
        context = model.embed(texts) if model.conditional else None
        return model.eps(x_t.to(model.device), t.to(model.device), context).double().cpu()

    wanted = answers(purified)
    moved = (answers(given) - wanted).norm().item()
    return (answers(written) - wanted).norm().item() / moved if moved > 0 else 0.0


def onto(base: DiffusionModel, change: Change) -> DiffusionModel:
    """A copy of the base with the adapter that is written."""
    made = adapters.base_of(base)
    adapters.attach(made, change.layers)
    return made


def _untyped(value: Any) -> Any:
    return value
