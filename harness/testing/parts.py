"""Metrics, triggers, targets, samplers and models in the kit: what they are given, and what they must give back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.capabilities import PictureTarget, TriggeredSampler, WrappingSampler, accepted_models, family_of, offers
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.judges.evidence import GIVEN, WHO, Evidence, Verdict
from harness.methods.learned_triggers import LearnedTrigger
from harness.registry import Registry, make, parse_spec, spec_of
from harness.testing import tiny
from harness.testing.trial import N, Place, Trial, article, given_model, outcome, row_by_row, spoil
from harness.testing.watch import changed, fingerprint, network, watching
from harness.types import Backdoor, Inputs, Modality, Score, TargetContext

# ---- metrics --------------------------------------------------------------------------------------------------------


def of_metric(plugin: Any, registry: Registry) -> list[Place]:
    targets = {"noise": "corner", "text": "patch"}
    return [
        Place(modality, {"trigger": tiny.trigger(modality), "target": registry.build("targets", targets[modality])})
        for modality in ("noise", "text")
    ]


def evidence(place: Place, whole: bool) -> tuple[Evidence, dict[tuple[str, str], Tensor]]:
    """The evidence of a cell of 12 samples and its images; without the defended model where it is not whole."""
    sets: dict[Any, Tensor] = {
        (who, given): tiny.images(place.modality, 12, seed=10 * i + j)
        for i, who in enumerate(WHO)
        for j, given in enumerate(GIVEN)
        if who == "backdoored" or (given in ("clean", "triggered") and (whole or who == "clean"))
    }
    cost: dict[str, float | None] = {"wall_s": 2.0, "cpu_s": 2.0, "peak_rss_bytes": 1e9, "cuda_bytes": None}
    said = Verdict(0.7, 0.5, {"kit": 0.3}, 0.5, {"clean": torch.rand(12) * 0.6, "triggered": torch.rand(12)})
    shape = given_model(place.modality).shape
    inverted = torch.full(shape, 0.1) if place.modality == "noise" else tiny.RARE[0]
    made = Evidence(
        {which: (lambda images=images: images) for which, images in sets.items()},
        reference=tiny.images(place.modality, 24, seed=1),
        model=tiny.Model(place.modality),  # type: ignore[arg-type]
        backdoor=Backdoor(place.parts["trigger"], place.parts["target"]),
        attacked=True,
        prompts=tiny.PROMPTS[:12] if place.modality == "text" else None,
        costs={"attack": cost, "defense": {**cost, "screen_s": 0.01} if whole else None},
        inverted=inverted if whole else None,
        verdict=said if whole else None,
        wrong_triggers=4,
    )
    return made, sets


def run_metric(trial: Trial) -> dict[str, Any]:
    torch.manual_seed(0)
    seen, sets = evidence(trial.place, whole=trial.variation != "broken")
    given = {f"the images {who}/{what}": fingerprint(images) for (who, what), images in sets.items()}
    trial.begin()
    with watching(trial.watch):
        scores = trial.plugin.measure(seen)
    if not isinstance(scores, Mapping) or not scores:
        fault = (f"measure returned {article(scores)}", "return a mapping of names to Score objects, never empty")
        return outcome(None, [], [fault])
    after = {f"the images {who}/{what}": fingerprint(images) for (who, what), images in sets.items()}
    faults = [fault for name, score in scores.items() for fault in _score_faults(name, score)]
    values = {name: None if not isinstance(score, Score) else score.value for name, score in scores.items()}
    return outcome(values, changed(given, after), faults)


def _score_faults(name: str, score: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(score, Score) or not isinstance(score.value, float):
        yield f"'{name}' is {article(score)}", "return Score(value=float, n=..., higher_is_better=...)"
    elif math.isnan(score.value) and not score.warning:
        yield f"'{name}' is NaN without a reason", "return harness.unmeasured('why') for what cannot be measured"
    elif math.isinf(score.value):
        yield f"'{name}' is infinite", "return harness.unmeasured('why') for what cannot be measured"
    elif not math.isnan(score.value) and score.n < 1:
        yield f"'{name}' rests on n = {score.n} samples", "n is the number of samples behind the value"
    elif score.interval and not score.interval[0] - 1e-9 <= score.value <= score.interval[1] + 1e-9:
        yield f"'{name}' lies outside its own interval {score.interval}", "give the interval of the value"


# ---- triggers and targets -------------------------------------------------------------------------------------------


def of_trigger(plugin: Any, registry: Registry) -> list[Place]:
    """The kit's inputs; where it names the models for which it is, prompts of those models."""
    models = [registry.build("models", name) for name in accepted_models(plugin) or ()]
    drawn = [model.prompts("test", N, generator(0, "kit")) for model in models]
    return [Place(plugin.modality, {"prompts": prompts} if prompts else {}) for prompts in drawn or [None]]


def run_trigger(trial: Trial) -> dict[str, Any]:
    model = given_model(trial.place.modality)
    plugin, inputs = _with_pattern(trial.plugin, model.shape), tiny.inputs(model, N)
    if prompts := trial.place.parts.get("prompts"):
        inputs = inputs.with_prompts(prompts)
    given = {"the noise": fingerprint(inputs.noise), "the prompts": fingerprint(inputs.prompts)}
    trial.begin()
    with watching(trial.watch):
        stamped = plugin.stamp(inputs)
        others = [plugin.wrong(k) for k in range(4)]
    if not isinstance(stamped, Inputs) or len(stamped) != N or stamped.noise.shape != inputs.noise.shape:
        fault = (f"stamp returned {article(stamped)}", "return inputs.with_noise(...) or inputs.with_prompts(...)")
        return outcome(None, [], [fault])
    now = {"the noise": fingerprint(inputs.noise), "the prompts": fingerprint(inputs.prompts)}
    faults = [*_stamp_faults(plugin, inputs, stamped), *_wrong_faults(plugin, others)]
    alone = [plugin.stamp(inputs[i : i + 1]) for i in range(N)]
    apart = (torch.cat([one.noise for one in alone]) - stamped.noise).abs().max().item()
    if tuple(prompt for one in alone for prompt in one.prompts or ()) != (stamped.prompts or ()):
        apart = math.inf
    return outcome([stamped.noise, stamped.prompts], changed(given, now), faults, apart=apart)


def _with_pattern(plugin: Any, shape: Sequence[int]) -> Any:
    """A learned trigger with a pattern, as an attack returns it; any other trigger as it is."""
    if not offers(plugin, LearnedTrigger):
        return plugin
    return plugin.with_pattern(plugin.projected(torch.randn(tuple(shape), generator=generator("kit", "pattern"))))


def _stamp_faults(plugin: Any, inputs: Inputs, stamped: Inputs) -> Iterator[tuple[str, str]]:
    moved, said = not torch.equal(stamped.noise, inputs.noise), stamped.prompts != inputs.prompts
    if stamped.seeds != inputs.seeds:
        yield "stamp changes the seeds", "change noise or prompts only"
    if plugin.modality == "noise" and (said or not moved):
        yield "a noise trigger must change the noise and nothing else", "return inputs.with_noise(inputs.noise + r)"
    if plugin.modality == "text" and (moved or not said):
        yield "a text trigger must change the prompts and nothing else", "return inputs.with_prompts([...])"


def _wrong_faults(plugin: Any, others: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for k, other in enumerate(others):
        if type(other) is not type(plugin) or other == plugin:
            yield f"wrong({k}) is not another trigger of its class", "return replace(self, ...) with other parameters"
            return
        if make(type(plugin), parse_spec(spec_of(other))[1]) != other:
            yield f"wrong({k}) does not survive its spec", "let its parameters say all that it is"
            return


def of_target(plugin: Any, registry: Registry) -> list[Place]:
    """Both kinds of image; where it names the models whose judge it needs, those models' judges and images."""
    models = [registry.build("models", name) for name in accepted_models(plugin) or ()]
    return [Place(m.modality, {"judge": m.judge()}) for m in models] or [Place("noise"), Place("text")]


def run_target(trial: Trial) -> dict[str, Any]:
    modality = trial.place.modality
    plugin = Backdoor(tiny.trigger("noise"), trial.plugin).target  # one that depends on the trigger is told it
    images, clean = tiny.images(modality, N), tiny.images(modality, 24, seed=2)
    prompts = tiny.PROMPTS[:N] if modality == "text" else None
    context = TargetContext(clean, prompts, trial.place.parts.get("judge", tiny.Judge()))
    given = {"the images": fingerprint(images), "the context's images": fingerprint(clean)}
    trial.begin()
    with watching(trial.watch):
        found = plugin.distances(images, replace(context, clean=clean[:N]))
        gates = plugin.thresholds(context)
        hits = plugin.hits(images, context)
    faults = list(_target_faults(plugin, images, context, found, gates, hits))
    rows = [plugin.distances(images[i : i + 1], _row(context, i)) for i in range(N)] if not faults else []
    apart = (torch.cat(rows) - found).abs().max().item() if rows else None
    now = {"the images": fingerprint(images), "the context's images": fingerprint(clean)}
    return outcome([found, hits], changed(given, now), faults, apart=apart)


def _row(context: TargetContext, i: int) -> TargetContext:
    prompts = None if context.prompts is None else context.prompts[i : i + 1]
    return TargetContext(context.clean[i : i + 1], prompts, context.judge)


def _target_faults(
    plugin: Any, images: Tensor, context: TargetContext, found: Any, gates: Any, hits: Any
) -> Iterator[tuple[str, str]]:
    if not isinstance(found, Tensor) or tuple(found.shape) != (N,) or not torch.isfinite(found).all():
        yield "distances are not N finite numbers", "return (B,) floats, smaller is closer to the target"
        return
    if (found < -1e-5).any():
        yield "a distance is negative", "return distances of at least 0; the leaderboard refuses others"
    if plugin.hit_threshold not in gates:
        yield (
            f"the gate {plugin.hit_threshold!r} is not among the thresholds {', '.join(gates)}",
            "name one of them in `hit_threshold`",
        )
        return
    if not isinstance(hits, Tensor) or not torch.equal(hits.bool(), found <= gates[plugin.hit_threshold]):
        yield "hits are not the distances up to the gate", "return self.distances(...) <= self.thresholds(...)[gate]"
    picture = plugin.image(images.shape[1:]) if offers(plugin, PictureTarget) else None
    if picture is None:
        return
    if picture.shape != images.shape[1:] or picture.abs().max() > 1:
        yield "image(shape) is not a picture of that shape in [-1, 1]", "return (C, H, W) in [-1, 1], or None"
    elif plugin.kind in ("image", "patch") and not plugin.hits(picture[None], context).all():
        yield "the target's own picture does not hit", "compare with the picture that image(shape) returns"


# ---- samplers -------------------------------------------------------------------------------------------------------


def of_sampler(plugin: Any, registry: Registry) -> list[Place]:
    accepts = plugin.accepts_triggers if offers(plugin, TriggeredSampler) else ("noise",)
    return [Place(modality) for modality in accepts]


def run_sampler(trial: Trial) -> dict[str, Any]:
    plugin, model = trial.plugin, _sampled(trial.plugin, trial.place.modality)
    if trial.variation == "broken":
        spoil(model)
    given, inputs = network(model, "the given model"), tiny.inputs(model, N)
    noise = fingerprint(inputs.noise)
    sampler = plugin.around(DDIM(steps=4)) if offers(plugin, WrappingSampler) else plugin
    trial.begin(model)
    with watching(trial.watch), torch.no_grad():
        x_0 = sampler.run(model, inputs)
    calls, faults = trial.watch.seen.calls, []
    if not isinstance(x_0, Tensor) or x_0.shape != inputs.noise.shape:
        faults.append((f"run returned {article(x_0)}", "return x_0 in the shape of inputs.noise"))
        return outcome(None, [], faults)
    if trial.variation != "broken" and calls != sampler.nfe and trial.place.modality == "noise":
        faults.append((f"nfe says {sampler.nfe}, it used the network {calls} times", "count what `run` does"))
    with torch.no_grad():
        apart = row_by_row(lambda row: sampler.run(model, row), inputs, x_0) if trial.variation != "broken" else None
    touched = changed(given, network(model, "the given model"))
    touched += ["the noise"] if fingerprint(inputs.noise) != noise else []
    finite = bool(torch.isfinite(x_0).all())
    return outcome(x_0, touched, faults, apart=apart, finite=finite, error=_error(trial, sampler))


def _sampled(plugin: Any, modality: Modality) -> DiffusionModel:
    made = {"ve": tiny.exploding, "flow": tiny.flowing}.get(family_of(plugin))
    return given_model(modality) if made is None else made()


def _error(trial: Trial, sampler: Any) -> float | None:
    """Largest error of a pixel where the data are one image and the network is exact; None where it does not apply."""
    if trial.variation == "broken" or trial.place.modality != "noise" or offers(trial.plugin, WrappingSampler):
        return None
    family = family_of(trial.plugin)
    if family == "ve":
        return None
    y = tiny.images("noise", 1, seed=5)[0]
    model = tiny.one_image(y, family)
    with torch.no_grad():
        return (sampler.run(model, tiny.inputs(model, 2)) - y).abs().max().item()


# ---- models ---------------------------------------------------------------------------------------------------------


def of_model(plugin: Any, registry: Registry) -> list[Place]:
    return [Place(plugin.modality)]


def run_model(trial: Trial) -> dict[str, Any]:
    plugin = trial.plugin
    trial.begin()
    with watching(trial.watch):
        model, digest, data, reference = plugin.load(), plugin.digest(), plugin.data(), plugin.reference()
        prompts = plugin.prompts("test", 8, generator(0, "kit"))
        judge, scorer = plugin.judge(), plugin.scorer()
        features = None if judge is None else judge.features(data.images[:N])
    faults = list(_model_faults(plugin, model, data, reference, prompts))
    if features is not None and (features.ndim != 2 or len(features) != N):
        faults.append((f"the judge's features are {tuple(features.shape)}", "return (B, D)"))
    if scorer is not None and prompts is None:
        faults.append(("it has a scorer of prompts but no prompts", "scorer() is None for an unconditional model"))
    return outcome([network(model), digest, fingerprint(data), prompts], [], faults)


def _model_faults(plugin: Any, model: Any, data: Any, reference: Any, prompts: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(model, DiffusionModel):
        yield f"load returned {article(model)}", "return a DiffusionModel"
        return
    if model.conditional != plugin.conditional or (plugin.modality == "text") != plugin.conditional:
        yield "`conditional`, `modality` and the loaded model disagree", "text triggers need a text-to-image model"
        return
    size = model.decode(torch.zeros(1, *model.shape, device=model.device)).shape[1:]
    for name, found in (("data().images", data.images), ("reference()", reference)):
        if found.shape[1:] != size or found.abs().max() > 1.0001:
            yield f"{name} is {tuple(found.shape)} or leaves [-1, 1]", f"give images {tuple(size)} in [-1, 1]"
    if plugin.conditional and (prompts is None or len(prompts) != 8 or data.captions is None):
        yield "a text-to-image model without prompts or captions", "prompts(split, n, rng) gives n texts"
    if model.family != family_of(plugin):
        yield f"the loaded model is of the family {model.family}", "declare `family`"
