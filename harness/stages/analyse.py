"""Looks inside a backdoored denoiser: norms of activations, attention by token, and neurons that carry the backdoor.

After the three analyses of BackdoorDM (Lin et al., arXiv:2502.11798), on the inputs of a cell and with its sampler:

    norms         of each column of a layer's input at each step, with and without the trigger
    assimilation  cross-attention maps by token, which a trigger can make similar (T2IShield, arXiv:2407.04215)
    neurons       pre-activations of those whose removal brings the answer to triggered inputs nearest to the clean
                  model's

The norm of a column here is its root mean square over samples and positions, so that layers of any size compare. The
"loss of the backdoor" of a neuron is our choice, so that it needs nothing of the attack: the mean square distance
between the answers of the attacked and of the clean denoiser to the same triggered inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from harness.diffusion import attention
from harness.diffusion.events import progress
from harness.diffusion.model import DiffusionModel
from harness.methods import prompt_screening
from harness.stages.sample import sample
from harness.types import Inputs, Sampler, Trigger

LAYERS = (nn.Conv2d, nn.Linear)
NEURONS = re.compile(r"(^|\.)(conv1|net\.0\.proj|linear_1)$")  # layers whose outputs go to a nonlinearity
GATED = ("GEGLU", "SwiGLU")  # diffusers' layers that multiply half of their outputs by a function of the other half
EXACT = 24  # neurons whose removal is also computed, of those that the gradient ranks first
SHOWN = 6  # neurons with a histogram
BINS = 40
CALLS = 3  # of the denoiser that are replayed: the first, and at one and two thirds of the run


@dataclass(frozen=True)
class Norms:
    """Columns of the inputs of layers. plain, triggered: (layers, times) the mean over columns of their root mean
    square. change: (layers, times) the distance between the columns' norms with and without the trigger, divided by the
    norm of those without. times: what the network was given as time, in the order of sampling."""

    layers: tuple[str, ...]
    times: tuple[float, ...]
    plain: list[list[float]]
    triggered: list[list[float]]
    change: list[list[float]]


@dataclass(frozen=True)
class Attended:
    """Attention to the tokens of a prompt. maps: (tokens, side, side) in [0, 1], the mean over steps, layers and heads,
    each divided by its largest value. spread: T2IShield's F, small where the maps are alike."""

    prompt: str
    tokens: tuple[str, ...]
    maps: list[list[list[float]]]
    spread: float


@dataclass(frozen=True)
class Neuron:
    """A neuron (output channel) of a layer. estimated, removed: change of the backdoor's loss when its pre-activation
    is set to 0, divided by the loss: to first order, and computed. plain: mean square change of the answer to inputs
    without the trigger, divided by the loss. edges: (BINS + 1) of the histograms of its pre-activations, which are
    shares."""

    layer: str
    channel: int
    estimated: float
    removed: float
    plain: float
    edges: list[float]
    shares_plain: list[float]
    shares_triggered: list[float]


@dataclass(frozen=True)
class Neurons:
    """loss: of the backdoor. estimated: of every neuron as in `Neuron`, in the order of the layers. most: those whose
    removal lowers the loss most."""

    loss: float
    estimated: list[float]
    most: tuple[Neuron, ...]


@dataclass(frozen=True)
class Analysis:
    """norms: by model ("clean", "attacked", "defended"). attended: by model, then for each prompt without and with the
    trigger. neurons: of the attacked denoiser. missing: analysis → why it is not there."""

    n: int
    norms: dict[str, Norms]
    attended: dict[str, list[Attended]]
    neurons: Neurons | None
    missing: dict[str, str]


# ---- what a run of the sampler shows --------------------------------------------------------------------------------


@dataclass
class Watch:
    """squares: of the inputs of each layer at each time, summed by column, with their number. calls: of the denoiser,
    with the last rows of each batch; guidance puts rows without a prompt before them."""

    squares: dict[str, dict[float, tuple[Tensor, int]]]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    time: float = 0.0

    def columns(self, layer: str) -> Tensor:
        """(times, columns) root mean squares."""
        return torch.stack([(total / count).sqrt() for total, count in self.squares[layer].values()])

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(next(iter(self.squares.values())))


@contextmanager
def watched(model: DiffusionModel, rows: int) -> Iterator[Watch]:
    """Records every call of the denoiser while the block runs. rows: of a batch, the last ones, that are looked at."""
    watch, hooks = Watch({}, []), []

    def began(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        watch.time = float(torch.as_tensor(time).flatten()[0])
        batch = len(args[0] if args else kwargs["hidden_states"])
        watch.calls.append(
            (tuple(_last(x, batch, rows) for x in args), {k: _last(x, batch, rows) for k, x in kwargs.items()})
        )

    def layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()[-rows:].float()
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            x = x.flatten(0, -2)
            total, count = watch.squares.setdefault(name, {}).get(watch.time, (x.new_zeros(x.shape[1]), 0))
            watch.squares[name][watch.time] = total + x.square().sum(0), count + len(x)

        return hook

    hooks.append(model.denoiser.register_forward_pre_hook(began, with_kwargs=True))
    for name, module in model.denoiser.named_modules():
        if isinstance(module, LAYERS):
            hooks.append(module.register_forward_pre_hook(layer(name)))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _last(value: Any, batch: int, rows: int) -> Any:
    """The last rows of what has a row for each of the batch, also inside dicts."""
    if isinstance(value, dict):
        return {name: _last(each, batch, rows) for name, each in value.items()}
    whole = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return value[-rows:].detach() if whole else value


@torch.no_grad()
def run(model: DiffusionModel, inputs: Inputs, sampler: Sampler, trigger: Trigger | None) -> Watch:
    """The watch over sampling the inputs, at most as many as the sampler takes at once."""
    with watched(model, len(inputs)) as watch:
        sample(model, inputs, sampler, [trigger])
    return watch


def norms(plain: Watch, triggered: Watch) -> Norms:
    layers = tuple(name for name in plain.squares if name in triggered.squares)
    pairs = [(plain.columns(name), triggered.columns(name)) for name in layers]
    change = [((b - a).norm(dim=1) / a.norm(dim=1).clamp(min=1e-12)).tolist() for a, b in pairs]
    return Norms(
        layers, plain.times, [a.mean(1).tolist() for a, _ in pairs], [b.mean(1).tolist() for _, b in pairs], change
    )


# ---- attention ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attended(
    model: DiffusionModel, inputs: Inputs, sampler: Sampler, trigger: Trigger | None, triggered_prompts: Sequence[str]
) -> list[Attended]:
    """The maps of each prompt. triggered_prompts: as the network gets them."""
    sums: list[Tensor] = []

    with attention.capture(model.denoiser) as maps:

        def after(*_: Any) -> None:
            sums.append(_by_token(maps, len(inputs)))

        hook = model.denoiser.register_forward_hook(after)
        try:
            sample(model, inputs, sampler, [trigger])
        finally:
            hook.remove()
    mean = torch.stack(sums).mean(0)
    return [_attended(model, prompt, own) for prompt, own in zip(triggered_prompts, mean, strict=True)]


def _by_token(maps: attention.Maps, rows: int) -> Tensor:
    """(rows, tokens, side, side): mean over layers and heads, at the side of the largest map."""
    found = [m[-rows:].float().mean(1).transpose(1, 2) for m in maps.values()]
    square = [m.unflatten(2, (round(m.shape[2] ** 0.5), -1)) for m in found]
    side = max(m.shape[-1] for m in square)
    sized = [nn.functional.interpolate(m, size=(side, side), mode="bilinear", align_corners=False) for m in square]
    return torch.stack(sized).mean(0)


def _attended(model: DiffusionModel, prompt: str, maps: Tensor) -> Attended:
    assert model.tokenizer is not None, "an unconditional model has no tokenizer"
    ids = model.tokenizer(prompt).input_ids
    own = maps[1 : len(ids)]  # words and EOS
    own = own / own.amax((1, 2), keepdim=True).clamp(min=1e-12)
    spread = prompt_screening.assimilation(own)
    words = tuple(model.tokenizer.convert_ids_to_tokens(ids[1:]))
    return Attended(prompt, words, [[[round(v, 3) for v in row] for row in m] for m in own.tolist()], spread)


# ---- neurons --------------------------------------------------------------------------------------------------------


def neurons(attacked: DiffusionModel, clean: DiffusionModel, plain: Watch, triggered: Watch) -> Neurons:
    """Neurons of the attacked denoiser by the change of the backdoor's loss when they are removed.

    plain, triggered: watches over the attacked model. Raises ValueError where both denoisers answer the same.
    """
    network, chosen = attacked.denoiser, _thirds(len(triggered.calls))
    carried, usual = [triggered.calls[i] for i in chosen], [plain.calls[i] for i in _thirds(len(plain.calls))]
    layers = {name: module for name, module in network.named_modules() if NEURONS.search(name)}
    if not layers:
        raise ValueError(f"{type(network).__name__} has no layer whose outputs are known to go to a nonlinearity")
    with torch.no_grad():
        wanted = [_answer(clean.denoiser, call) for call in carried]
        before = [_answer(network, call) for call in usual]
        loss = _loss(network, carried, wanted).item()
    scale = sum(answer.square().mean().item() for answer in wanted) / len(wanted)
    if loss <= 1e-6 * scale:
        raise ValueError("the attacked and the clean denoiser answer the same: the backdoor is not in the denoiser")
    first = {name: _first(network, name) for name in layers}
    changes = _estimated(network, layers, carried, wanted)
    estimated = {name: values[first[name] :] / loss for name, values in changes.items()}
    order = sorted(
        (float(value), name, first[name] + i) for name, values in estimated.items() for i, value in enumerate(values)
    )
    found = []
    for done, (value, name, channel) in enumerate(order[:EXACT]):
        with torch.no_grad(), _removed(layers[name], channel):
            change = (_loss(network, carried, wanted).item() - loss) / loss
            answers = [_answer(network, call) for call in usual]
        moved = sum((a - b).square().mean().item() for a, b in zip(answers, before, strict=True)) / len(usual) / loss
        found.append((change, value, moved, name, channel))
        progress("neurons", done + 1, min(EXACT, len(order)))
    most = []
    for change, value, moved, name, channel in sorted(found)[:SHOWN]:
        with torch.no_grad():
            a, b = (_outputs(network, layers[name], calls)[channel] for calls in (usual, carried))
        edges, one, other = _histograms(a, b)
        most.append(Neuron(name, channel, value, change, moved, edges, one, other))
    return Neurons(loss, [round(float(v), 6) for values in estimated.values() for v in values], tuple(most))


def _first(network: nn.Module, layer: str) -> int:
    """The first output of a layer that goes to a nonlinearity: in a gated feed-forward layer those are the gates, the
    second half, and a gate of 0 removes the neuron."""
    owner, module = network.get_submodule(layer.rpartition(".")[0]), cast(Any, network.get_submodule(layer))
    return int(module.out_features) // 2 if type(owner).__name__ in GATED else 0


def _thirds(n: int) -> list[int]:
    return sorted({n * k // CALLS for k in range(CALLS)})


def _answer(network: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    return network(*call[0], **call[1]).sample.float()


def _loss(network: nn.Module, calls: Sequence[Any], wanted: Sequence[Tensor]) -> Tensor:
    each = [(_answer(network, call) - answer).square().mean() for call, answer in zip(calls, wanted, strict=True)]
    return torch.stack(each).mean()


def _channels(x: Tensor) -> Tensor:
    """(channels, values) of a layer's output (B, C, H, W), (B, tokens, C) or (B, C)."""
    return (x.movedim(1, 0) if x.dim() == 4 else x.movedim(-1, 0)).flatten(1)


def _estimated(
    network: nn.Module, layers: dict[str, nn.Module], calls: Sequence[Any], wanted: Sequence[Tensor]
) -> dict[str, Tensor]:
    """-Σ a ∂L/∂a of each neuron's pre-activations a: the change of the loss to first order when they become 0."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = []
    for name, module in layers.items():

        def hook(_: nn.Module, __: Any, out: Tensor, name: str = name) -> None:
            out.retain_grad()
            kept[name].append(out)

        hooks.append(module.register_forward_hook(hook))
    flags = [(p, p.requires_grad) for p in network.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        with torch.enable_grad():
            loss = _loss(network, calls, wanted)
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
    found = {}
    for name, outs in kept.items():
        parts = [(-out.detach() * out.grad) for out in outs if out.grad is not None]
        found[name] = torch.stack([_channels(part).sum(1) for part in parts]).sum(0).cpu()
    return found


@contextmanager
def _removed(layer: nn.Module, channel: int) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[(slice(None), channel) if out.dim() == 4 else (..., channel)] = 0.0
        return out

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _outputs(network: nn.Module, layer: nn.Module, calls: Sequence[Any]) -> Tensor:
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: kept.append(_channels(out.detach().float())))
    try:
        for call in calls:
            _answer(network, call)
    finally:
        handle.remove()
    return torch.cat(kept, 1).cpu()


def _histograms(a: Tensor, b: Tensor) -> tuple[list[float], list[float], list[float]]:
    low, high = min(a.min().item(), b.min().item()), max(a.max().item(), b.max().item())
    edges = torch.linspace(low, high if high > low else low + 1.0, BINS + 1, dtype=torch.float64)
    shares = [torch.histogram(x.double(), edges).hist / len(x) for x in (a, b)]
    return edges.tolist(), shares[0].tolist(), shares[1].tolist()


# ---- all of it ------------------------------------------------------------------------------------------------------


def analyse(
    models: dict[str, DiffusionModel], inputs: Inputs, sampler: Sampler, trigger: Trigger, shown: int = 2
) -> Analysis:
    """All three analyses. models: "clean", "attacked" and, if the defense returned one, "defended". inputs: those of
    the cell, without the trigger. shown: prompts whose maps are kept."""
    missing: dict[str, str] = {}
    watches = {name: (run(model, inputs, sampler, None), run(model, inputs, sampler, trigger)) for name, model in
               models.items()}  # fmt: skip
    found: Neurons | None = None
    try:
        found = neurons(models["attacked"], models["clean"], *watches["attacked"])
    except ValueError as error:
        missing["neurons"] = str(error)
    maps: dict[str, list[Attended]] = {}
    few = inputs[:shown]
    if few.prompts is None:
        missing["assimilation"] = "the model takes no prompts"
    else:
        stamped = trigger.stamp(few)
        try:
            for name, model in models.items():
                plain = attended(model, few, sampler, None, few.prompts)
                other = attended(model, few, sampler, trigger, stamped.prompts or ())
                maps[name] = [each for both in zip(plain, other, strict=True) for each in both]
        except TypeError as error:
            missing["assimilation"] = str(error)
    return Analysis(len(inputs), {name: norms(*both) for name, both in watches.items()}, maps, found, missing)
