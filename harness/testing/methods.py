"""Defenses and attacks in the kit: what they are given, and what they must give back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from harness.capabilities import LabelledTarget, accepted_models, delivers, missing_of_trigger, offers
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.methods.learned_triggers import pattern_of
from harness.registry import Registry
from harness.runs import suite as suites
from harness.stages.knowledge import declared, fields_read
from harness.testing import tiny
from harness.testing.trial import (
    N,
    Place,
    Trial,
    article,
    finite,
    given_model,
    outcome,
    row_by_row,
    sound_model,
    spoil,
)
from harness.testing.watch import Watch, changed, fingerprint, network, watching
from harness.types import DELIVERS, Backdoor, Backdoored, Defended, Inputs, Knowledge, Modality


class Canary:
    """Stands where the ground truth is; tells when anything of it is used."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_tell")("finds and reads the backdoor itself")
        return object.__getattribute__(self, name)


def of_defense(plugin: Any, registry: Registry) -> list[Place]:
    """The kinds of trigger that it accepts, but for those of which it requires more than the kit's triggers offer."""
    able = [kind for kind in plugin.accepts_triggers if not missing_of_trigger(plugin, tiny.trigger(kind))]
    return [Place(modality) for modality in able]


def known(modality: Modality) -> Knowledge:
    return Knowledge(
        trigger=tiny.trigger(modality),
        data=tiny.data(modality),
        prompts=tiny.PROMPTS[:8] if modality == "text" else None,
        clean_model=given_model(modality, 1),
        words=tiny.WORDS if modality == "text" else (),
        encoder=tiny.Scorer().image_features if modality == "text" else tiny.Judge().features,
        public_encoder=tiny.Encoder(),
        judge=tiny.Judge(),
    )


def _truth(watch: Watch) -> Backdoor:
    truth = Backdoor(tiny.NoiseTrigger(), tiny.NoiseTrigger())  # type: ignore[arg-type]
    for name in ("trigger", "target"):
        object.__setattr__(truth, name, Canary(watch.tell))
    return truth


def run_defense(trial: Trial) -> dict[str, Any]:
    plugin, modality = trial.plugin, trial.place.modality
    model, knowledge = given_model(modality), known(modality)
    if trial.variation == "broken":
        spoil(model)
    given = _given(model, knowledge)
    truth = _truth(trial.watch)  # within reach of whoever looks where it should not
    rng = trial.begin(model)
    before, inputs = rng.get_state(), tiny.inputs(model, N)
    with declared(plugin, knowledge) as mine:
        try:
            with watching(trial.watch):
                done = plugin.defend(model, mine, rng)
                scores = done.screen(inputs) if isinstance(done, Defended) and done.screen is not None else None
        finally:
            read = trial.watch.seen.read = fields_read(mine)
    del truth
    moved = not torch.equal(before, rng.get_state())
    if not isinstance(done, Defended):
        fault = (f"defend returned {article(done)}", "return Defended(model=...) from harness")
        return outcome(None, [], [fault], moved=moved)
    output = [
        None if done.model is None else network(done.model), done.suspicion, done.flag_above, done.screen_above,
        dict(done.features or {}), scores, done.trigger,
    ]  # fmt: skip
    touched = changed(given, _given(model, knowledge))
    faults = (
        []
        if trial.variation == "broken"
        else list(_delivered(plugin, done, model, inputs, scores, moved or bool(read)))
    )
    alone = None if scores is None or faults else row_by_row(done.screen, inputs, scores)
    return outcome(
        output, touched, faults, moved=moved, suspicion=_number(done.suspicion), apart=alone,
        notes=fingerprint(dict(done.notes)),
    )  # fmt: skip


def _given(model: DiffusionModel, knowledge: Knowledge) -> dict[str, str]:
    prints = network(model, "the given model")
    if knowledge.clean_model is not None:
        prints |= network(knowledge.clean_model, "knowledge.clean_model")
    return prints | {
        f"knowledge.{name}": fingerprint(getattr(knowledge, name)) for name in ("data", "prompts", "words")
    }


def _number(value: Any) -> str | None:
    return None if value is None else repr(float(value))


def _delivered(
    plugin: Any, done: Defended, model: DiffusionModel, inputs: Inputs, scores: Any, worked: bool
) -> Iterator[tuple[str, str]]:
    """What is wrong with what a defense returned, and the cure."""
    declared = delivers(plugin)
    found = [part for part in DELIVERS if getattr(done, part) is not None]
    for part in found:
        if part not in declared:
            yield f"delivers a {part} that it does not declare", f"add '{part}' to `delivers`, which is {declared}"
    for part in declared:
        if part in ("suspicion", "screen") and part not in found:
            yield f"declares a {part} but delivers none", f"return Defended({part}=...), or take it out of `delivers`"
    if not found and worked:
        yield "works but delivers nothing", f"return Defended with one of {', '.join(DELIVERS)}"
    if done.model is not None:
        yield from sound_model(done.model, model, inputs)
    for name in ("suspicion", "flag_above", "screen_above"):
        value = getattr(done, name)
        if value is not None and not finite(value):
            yield f"{name} is {value!r}", "give a finite float, and raise an error where there is none to give"
    for name, value in (done.features or {}).items():
        if not isinstance(name, str) or not finite(value):
            yield f"features[{name!r}] is {value!r}", "features are finite floats by name"
    if scores is not None:
        yield from _row_of_scores(scores, len(inputs))
    if done.sampler is not None and not all(hasattr(type(done.sampler), name) for name in ("run", "nfe")):
        yield f"the sampler is {article(done.sampler)}", "give a registered sampler: `run(model, inputs)` and `nfe`"
    if isinstance(done.trigger, Tensor) and tuple(done.trigger.shape) != model.shape:
        yield f"the trigger found has the shape {tuple(done.trigger.shape)}", f"give {model.shape} as the noise has"
    yield from _notes(done.notes)


def _notes(notes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    try:
        json.dumps(dict(notes))
    except (TypeError, ValueError) as error:
        yield f"notes cannot be kept as JSON ({error})", "keep numbers, texts and lists: tensor.tolist(), tensor.item()"


def _row_of_scores(scores: Any, n: int) -> Iterator[tuple[str, str]]:
    cure = "a screen maps Inputs to one finite float each, (B,)"
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (n,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else article(scores)
        yield f"the screen gave {shape} for {n} inputs", cure
    elif not scores.is_floating_point() or not torch.isfinite(scores).all():
        yield f"the screen's scores are {scores.dtype} and not all finite", cure


# ---- attacks ----


def of_attack(plugin: Any, registry: Registry) -> list[Place]:
    """For each kind of trigger that it accepts, some registered triggers and targets that can go with it."""
    return [
        Place(modality, parts)
        for modality in plugin.accepts_triggers
        for parts in itertools.islice(_partners(plugin, modality, registry), PARTNERS)
    ]


def _partners(plugin: Any, modality: Modality, registry: Registry) -> Iterator[dict[str, Any]]:
    fixed = {"attack": plugin, "defense": Anything(), "sampler": DDIM()}
    only = accepted_models(plugin)
    names = ("kit-model", *registry.classes("models")) if only is None else only
    models = [tiny.Model(modality, name) for name in names]  # targets and attacks ask for models by name
    triggers: list[Any] = list(registry.classes("triggers").values())
    targets: list[Any] = list(registry.classes("targets").values())
    for model, trigger, target in itertools.product(models, triggers, targets):
        parts = fixed | {"model": model, "trigger": trigger(), "target": target()}
        if suites.impossible(parts) is None and _judged(parts["target"]) and tiny.fits(_texts(modality, parts)):
            yield {name: parts[name] for name in ("trigger", "target")}


def _texts(modality: Modality, parts: Mapping[str, Any]) -> Iterator[str]:
    """The texts that an attack on a text-to-image model may put into a prompt: of the trigger, of the target, and the
    kit's captions with the trigger."""
    if modality == "text":
        for part in (parts["trigger"], parts["target"]):
            yield from (value for f in fields(part) if isinstance(value := getattr(part, f.name), str))
        yield from map(parts["trigger"].apply, tiny.PROMPTS)


PARTNERS = 8  # tried for a kind of trigger, where the first ones raise an error


class Anything:
    """A defense that accepts everything, for the question whether an attack fits its trigger and target."""

    name, accepts_triggers, needs = "anything", ("noise", "text"), ()


def _judged(target: Any) -> bool:
    """Whether the kit's data hold what the target asks of them: a class of which there are examples."""
    label = target.label if offers(target, LabelledTarget) else 0
    return label == 0 or target.kind != "class"


def run_attack(trial: Trial) -> dict[str, Any]:
    plugin, modality = trial.plugin, trial.place.modality
    model, data = given_model(modality), tiny.data(modality, 32)
    backdoor = Backdoor(trial.place.parts["trigger"], trial.place.parts["target"])
    given = network(model, "the given model") | {"data": fingerprint(data)}
    rng = trial.begin(model)
    before = rng.get_state()
    with watching(trial.watch):
        done = plugin.implant(model, backdoor, data, rng)
    moved = not torch.equal(before, rng.get_state())
    if not isinstance(done, Backdoored):
        fault = (f"implant returned {article(done)}", "return Backdoored(model, backdoor) from harness")
        return outcome(None, [], [fault], moved=moved)
    faults = list(sound_model(done.model, model, tiny.inputs(model, 2)))
    if done.backdoor != backdoor:
        faults.append(("the backdoor returned is not the one asked for", "return the `backdoor` that was given"))
    learned = None
    try:
        learned = pattern_of(plugin, done.backdoor.trigger, model.shape)
    except ValueError as error:
        what, _, cure = str(error).rpartition("; ")
        faults.append((what, cure))
    touched = changed(given, network(model, "the given model") | {"data": fingerprint(data)})
    output = [network(done.model), learned] if not faults else None
    return outcome(output, touched, faults, moved=moved)
