"""A purified model as an adapter of its base: the low-rank factors of what differs between the two.

For each linear layer and convolution whose weights W differ from those W_0 of the base, the adapter holds the best
approximation of W - W_0 with a stated rank (truncated singular value decomposition, Eckart and Young 1936). A layer
that the defense left alone keeps its factors if they are of at most that rank. Biases, norms and embeddings have no
place in an adapter, nor has an autoencoder: what a defense changed there is named, with the size of the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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


@dataclass
class _Layer:
    """The weights of a layer in the base, in the model that was given, and in the purified one. own: the factors of the
    adapter that was given, None for a layer that it does not change."""

    name: str
    base: Tensor
    given: Tensor
    purified: Tensor
    own: LowRank | None

    @property
    def delta(self) -> Tensor:
        """What differs from the base (out, in), float64 on the CPU. Computed at each call, because the changes of all
        layers of a large model would take twice its memory."""
        return (self.purified - self.base).flatten(1).double().cpu()

    @cached_property
    def size(self) -> float:
        return self.delta.square().sum().item()

    @cached_property
    def moved(self) -> float:
        """‖W - W_given‖²."""
        return (self.purified - self.given).flatten(1).double().cpu().square().sum().item()

    @cached_property
    def spectrum(self) -> Spectrum:
        return decomposed(self.delta)

    def kept_as_it_was(self, most: int) -> bool:
        return self.own is not None and len(self.own.a) <= most and torch.equal(self.purified, self.given)


@dataclass(frozen=True)
class _Difference:
    """The layers of two networks. largest: rank of the adapter that was given."""

    layers: Sequence[_Layer]
    largest: int

    def wanted(self, layer: _Layer, rank: int | None) -> int:
        return rank or (self.largest if layer.own is None else len(layer.own.a))

    def shares(self, rank: int | None, left: Callable[[_Layer], float]) -> tuple[float, float]:
        """`kept` and `purification` of a `Change`. left: the squared norm of what the rank leaves out of a layer."""
        whole = dropped = cleaned = missed = 0.0
        for layer in self.layers:
            if layer.kept_as_it_was(rank or self.largest):
                assert layer.own is not None
                whole += layer.own.delta.double().square().sum().item()
            elif layer.size == 0:  # the defense undid the adapter here
                cleaned += layer.moved
            else:
                rest = left(layer)
                whole, dropped = whole + layer.size, dropped + rest
                if layer.moved > 0:
                    cleaned, missed = cleaned + layer.moved, missed + rest
        return 1 - dropped / max(whole, TINY), max(0.0, 1 - missed / cleaned) if cleaned else 1.0

    def enough(self, rank: int | None) -> bool:
        """Whether a rank keeps LEAST_KEPT of both, by the singular values."""
        return min(self.shares(rank, lambda layer: layer.spectrum.left(self.wanted(layer, rank)))) >= LEAST_KEPT

    def factors(self, rank: int | None) -> dict[str, LowRank]:
        """Layer → its factors, but for layers that are those of the base."""
        found = {}
        for layer in self.layers:
            if layer.kept_as_it_was(rank or self.largest):
                assert layer.own is not None
                found[layer.name] = layer.own
            elif layer.size > 0:
                found[layer.name] = layer.spectrum.factors(layer.delta, self.wanted(layer, rank))
        return found


@torch.no_grad()
def change_from(base: DiffusionModel, given: DiffusionModel, purified: DiffusionModel, rank: int | None) -> Change:
    """The adapter that makes `purified` of `base`. given: the base with the adapter that was purified.

    rank: of every layer; None: of each layer that of the adapter that was given, and its largest rank for the layers
    that it does not change. Raises ValueError for a network with other layers than the base, such as a pruned one.
    """
    return _change(_difference(base, given, purified), given, purified, rank)


@torch.no_grad()
def sufficient(base: DiffusionModel, given: DiffusionModel, purified: DiffusionModel) -> Change:
    """The change at the rank of the adapter that was given, or at the first of its doubles that keeps LEAST_KEPT of the
    change from the base and of what the defense changed. Raises ValueError as `change_from` does.

    Each layer is decomposed once, and the rank follows from the singular values. Until it is known, the singular
    vectors of all changed layers are held, which takes at most twice the memory of these layers.
    """
    difference = _difference(base, given, purified)
    rank, largest, widest = None, difference.largest, _widest(difference)
    while not difference.enough(rank) and largest < widest:
        rank = largest = 2 * largest
    return _change(difference, given, purified, rank)


def _difference(base: DiffusionModel, given: DiffusionModel, purified: DiffusionModel) -> _Difference:
    ours = given.adapter
    assert ours is not None, "the model that was purified has no adapter"
    origin, before, held = (dict(_layers(model)) for model in (base, given, purified))
    for name, weight in origin.items():
        if name not in held or held[name].shape != weight.shape:
            raise ValueError(f"the layer {name} has another shape than in the base")
    layers = [_Layer(name, origin[name], before[name], held[name], ours.layers.get(name)) for name in origin]
    return _Difference(layers, max(len(factors.a) for factors in ours.layers.values()))


def _change(difference: _Difference, given: DiffusionModel, purified: DiffusionModel, rank: int | None) -> Change:
    found = difference.factors(rank)
    kept, purification = difference.shares(
        rank, lambda layer: (found[layer.name].delta.double() - layer.delta).square().sum().item()
    )
    names = {layer.name for layer in difference.layers}
    added = tuple(layer.name for layer in difference.layers if layer.own is None and layer.name in found)
    same = max((len(factors.a) for factors in found.values()), default=0)
    return Change(
        {name: padded(factors, same) for name, factors in found.items()}, same, kept, purification, added,
        tuple(_lost(given, purified, names)), _widest(difference),
    )  # fmt: skip


def _widest(difference: _Difference) -> int:
    return max((min(layer.base.flatten(1).shape) for layer in difference.layers), default=0)


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values (k,) of a matrix (out, in), descending, and the singular vectors (k, k) of its shorter
    side as columns; float64, k = min(out, in)."""

    squares: Tensor
    vectors: Tensor

    def rank(self, most: int) -> int:
        """Singular values that an approximation of at most that rank holds: those below SMALLEST times the largest are
        left out."""
        sizes = self.squares[:most].sqrt()
        return int((sizes > SMALLEST * sizes[0]).sum())

    def left(self, rank: int) -> float:
        """‖ΔW - B A‖² of the best approximation with at most `rank`."""
        return self.squares[self.rank(rank) :].sum().item()

    def factors(self, delta: Tensor, rank: int) -> LowRank:
        """The best approximation of ΔW, of which this is the spectrum, with at most `rank`. A and B share its singular
        values."""
        k = self.rank(rank)
        vectors, root = self.vectors[:, :k], self.squares[:k].sqrt().sqrt()
        if delta.shape[0] <= delta.shape[1]:
            a, b = (vectors.T @ delta) / root[:, None], vectors * root
        else:
            a, b = vectors.T * root[:, None], (delta @ vectors) / root
        return LowRank(a.float().contiguous(), b.float().contiguous())


def decomposed(delta: Tensor) -> Spectrum:
    """The spectrum of ΔW (out, in), float64."""
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    values, vectors = torch.linalg.eigh(gram)
    return Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))


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
