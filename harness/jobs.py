"""What one job does, in its own process: attack, defend, sample or measure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.events import progress
from harness.planning import KNOWN_LEAST, KNOWN_PROMPTS, KNOWN_SHARE, is_clean
from harness.registry import Registry, load, spec_of
from harness.store import Store, plain
from harness.types import DELIVERS, WRONG, Cell, Knowledge, Score, delivers

EVALUATION = "evaluation"  # stage name of the noise and prompts that every cell of a model is judged on
SCREEN_BATCH = 50


def execute(spec: Mapping[str, Any], store: Store, out: Path) -> dict[str, Any]:
    """Do one job: fill the directory `out` and return facts for its manifest."""
    registry = load([Path(file) for file in spec["plugin_files"]])
    work = {"attack": _attack, "defend": _defend, "sample": _sample, "measure": _measure}[spec["kind"]]
    return work(spec, registry, store, out)


def _rng(seed: int, stage: str) -> Any:
    from harness.seeds import generator

    return generator(seed, stage)


def _load_model(spec: Mapping[str, Any], registry: Registry, store: Store) -> tuple[Any, Any]:
    """(model plugin, the attacked model, or the clean one where nothing was attacked), on the job's device."""
    from harness import checkpoint

    plugin = registry.build("models", spec["model"])
    attacked = spec["attacked"]
    model = plugin.load() if attacked is None else checkpoint.load(store.open_artifact(attacked) / "model")
    return plugin, model.to(_device())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _attack(spec: Mapping[str, Any], registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    from harness import checkpoint
    from harness.types import Backdoor

    plugin = registry.build("models", spec["model"])
    model = plugin.load().to(_device())
    attack = registry.build("attacks", spec["attack"])
    backdoor = Backdoor(registry.build("triggers", spec["trigger"]), registry.build("targets", spec["target"]))
    data = plugin.data()
    if data.captions is not None:
        trigger: Any = backdoor.trigger
        model.check_trigger(trigger, data.captions[:100])
        model.tokens(
            [trigger.apply(caption) for caption in data.captions]
        )  # too long a prompt is found before training
    done = attack.implant(model, backdoor, data, _rng(spec["seed"], "attack"))
    parts = ("model", "attack", "trigger", "target", "seed")
    labels = {"backdoored": str(attack.name != "none").lower(), **{part: str(spec[part]) for part in parts}}
    checkpoint.save(done.model.to("cpu"), out / "model", labels)
    return {}


def _defend(spec: Mapping[str, Any], registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    from harness import checkpoint

    plugin, model = _load_model(spec, registry, store)
    defense = registry.build("defenses", spec["defense"])
    knowledge = _knowledge(spec, registry, plugin, defense.needs)
    done = defense.defend(model, knowledge, _rng(spec["seed"], "defense"))
    _check_delivered(defense, done)
    if done.model is not None:
        labels = {"purified_by": spec["defense"], "seed": str(spec["seed"])}
        if spec["attacked"] is not None:
            labels["backdoored"] = "was; the purification may have failed"
        checkpoint.save(done.model.to("cpu"), out / "model", labels)
    features, found = dict(done.features or {}), _stored(done.trigger)
    document = {
        "suspicion": done.suspicion, "flag_above": done.flag_above, "features": features, "trigger": found,
        "notes": dict(done.notes), "sampler": _sampler_spec(registry, defense, done.sampler),
        "screen_above": done.screen_above, "screened": {},
    }  # fmt: skip
    facts = {}
    if done.screen is not None:
        start = time.monotonic()
        document["screened"] = _screened(spec, registry, plugin, model, done.screen)
        facts["screen_s"] = (time.monotonic() - start) / (2 * spec["screened"]["n"])
    (out / "defended.json").write_text(json.dumps(plain(document), sort_keys=True))
    return facts


def _check_delivered(defense: Any, done: Any) -> None:
    """A defense delivers what its class declares, and a suspicion where it declares one."""
    for part in DELIVERS:
        if getattr(done, part) is not None and part not in delivers(defense):
            raise ValueError(
                f"defense '{defense.name}' delivers a {part} but does not declare it: delivers = {delivers(defense)}"
            )
    for part in ("suspicion", "screen"):
        if part in delivers(defense) and getattr(done, part) is None:
            raise ValueError(f"defense '{defense.name}' declares a {part} but delivered none")
    if done.suspicion is not None and not math.isfinite(done.suspicion):
        raise ArithmeticError(f"the suspicion of defense '{defense.name}' is {done.suspicion}")


def _screened(
    spec: Mapping[str, Any], registry: Registry, plugin: Any, model: Any, screen: Any
) -> dict[str, list[float]]:
    """The screen's scores of n clean and of n other, triggered evaluation inputs, which it sees shuffled together: no
    two share noise or seed, so that nothing but the trigger tells them apart. Prompts in which the trigger has no place
    are left out, with their counterparts in the other half. Raises ValueError where none is left."""
    import torch

    n, trigger = spec["screened"]["n"], registry.build("triggers", spec["screened"]["trigger"])
    inputs = evaluation_inputs(plugin, model, 2 * n)
    if trigger.stamps == "text":
        model.check_trigger(trigger, inputs.prompts)
    stamped = trigger.stamp(inputs)
    pairs = range(n)
    if inputs.prompts is not None and stamped.prompts is not None:
        able = [plain != other for plain, other in zip(inputs.prompts, stamped.prompts, strict=True)]
        pairs = [i for i in pairs if able[i] and able[n + i]]
        if not pairs:
            raise ValueError(f"the trigger has a place in too few of {2 * n} prompts to screen any; use a larger n")
    order = torch.randperm(2 * n, generator=_rng(spec["seed"], "screen")).tolist()
    scores: dict[int, float] = {}
    for start in range(0, 2 * n, SCREEN_BATCH):
        rows = order[start : start + SCREEN_BATCH]
        clean, other = inputs.pick(rows), stamped.pick(rows)
        noise = torch.stack([(clean if i < n else other).noise[k] for k, i in enumerate(rows)])
        mixed = clean.with_noise(noise.to(model.device))
        if clean.prompts is not None and other.prompts is not None:
            mixed = mixed.with_prompts([clean.prompts[k] if i < n else other.prompts[k] for k, i in enumerate(rows)])
        given = torch.as_tensor(screen(mixed)).double().cpu()
        if given.shape != (len(rows),) or not torch.isfinite(given).all():
            raise ArithmeticError(f"the screen gave {tuple(given.shape)} scores, not {len(rows)} finite ones")
        scores |= zip(rows, given.tolist(), strict=True)
        progress("screen", start + len(rows), 2 * n)
    return {"clean": [scores[i] for i in pairs], "triggered": [scores[n + i] for i in pairs]}


def _sampler_spec(registry: Registry, defense: Any, sampler: Any) -> str | None:
    """What is stored of a defense's sampler: its spec, so that it has to be a registered one."""
    if sampler is None:
        return None
    if registry.classes("samplers").get(getattr(sampler, "name", "")) is not type(sampler):
        raise ValueError(f"defense '{defense.name}' delivers a sampler that is not registered: {sampler!r}")
    return spec_of(sampler)


def _knowledge(spec: Mapping[str, Any], registry: Registry, plugin: Any, needs: Sequence[str]) -> Knowledge:
    """Exactly what the defense's `needs` names, each kind drawn by a generator that only the seed decides: what else a
    defense needs does not change its prompts."""
    import torch

    known: dict[str, Any] = {}
    if "trigger" in needs:
        known["trigger"] = registry.build("triggers", spec["told"])
    if "data" in needs:
        data = plugin.data()
        share = min(len(data), max(KNOWN_LEAST, math.ceil(KNOWN_SHARE * len(data))))
        known["data"] = data.rows(torch.randperm(len(data), generator=_rng(spec["seed"], "knowledge"))[:share])
    if "prompts" in needs:
        known["prompts"] = plugin.prompts("train", KNOWN_PROMPTS, _rng(spec["seed"], "knowledge"))
    if "clean_model" in needs:
        known["clean_model"] = plugin.load().to(_device())
    if "words" in needs:
        known["words"] = plugin.words()
    if "encoder" in needs:
        known["encoder"] = _encoder(plugin)
    return Knowledge(**known)


def _encoder(plugin: Any) -> Any:
    """The public image encoder of a model's field: its CLIP-like scorer, else its judge."""
    scorer = plugin.scorer()
    if scorer is not None:
        return scorer.image_features
    judge = plugin.judge()
    if judge is None:
        raise LookupError(f"model '{plugin.name}' has no scorer and no judge: no image encoder for this defense")
    return judge.features


def evaluation_inputs(plugin: Any, model: Any, n: int) -> Any:
    """The n inputs on which every model of a kind is judged; the first n of any larger set."""
    from harness.seeds import image_noise, image_seeds
    from harness.types import Inputs

    seeds = image_seeds(0, EVALUATION, n)
    return Inputs(image_noise(seeds, model.shape), plugin.prompts("test", n, _rng(0, EVALUATION)), seeds)


@dataclass(frozen=True)
class _Loaded:
    """The model that this process samples. state: of torch's random generators once it was loaded. seal: of the model,
    None where it cannot be sealed."""

    of: tuple[str, str | None, str | None]  # as `_model_to_sample` has it
    model: Any
    state: Any
    seal: str | None


_loaded: _Loaded | None = None


def _model_to_sample(model: str, attacked: str | None, defended: str | None, registry: Registry, store: Store) -> Any:
    """The defended, else the attacked, else the clean model: the one that this process sampled last, if it is the same
    and has not changed since. Whoever samples it finds the random state of a process that has just loaded it."""
    global _loaded
    of = (model, attacked, defended)
    if _loaded is None or _loaded.of != of or _loaded.seal is None or _loaded.seal != _seal(_loaded.model):
        _loaded = None  # before another takes its memory
        _loaded = _load_to_sample(of, registry, store)
    else:
        _set_random_state(_loaded.state)
    return _loaded.model


def _load_to_sample(of: tuple[str, str | None, str | None], registry: Registry, store: Store) -> _Loaded:
    from harness import checkpoint

    model, attacked, defended = of
    if defended is None:
        found = _load_model({"model": model, "attacked": attacked}, registry, store)[1]
    else:
        found = checkpoint.load(store.open_artifact(defended) / "model").to(_device())
    return _Loaded(of, found, _random_state(), _seal(found))


def _random_state() -> Any:
    import torch

    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: Any) -> None:
    import torch

    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _seal(model: Any) -> str | None:
    """A digest of what a sampler could change of a model: tensors, hooks, processors, modes, added tokens. None where
    something in it cannot be written down, such as a hook that is a lambda."""
    import hashlib
    import io
    import pickle

    import torch

    class Sealing(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return _tensor_seal(obj) if isinstance(obj, torch.Tensor) else None

    parts, written = dict(vars(model)), io.BytesIO()
    tokenizer = parts.pop("tokenizer")  # a fast one remembers how it was called last
    try:
        Sealing(written).dump((parts, None if tokenizer is None else tokenizer.get_added_vocab()))
    except Exception:  # whatever a plugin has hung on the model; the price is another load
        return None
    return hashlib.sha256(written.getvalue()).hexdigest()


def _tensor_seal(tensor: Any) -> tuple[Any, ...]:
    """Its kind, and a checksum of its bytes that takes much less time than loading them."""
    import zlib

    import torch

    data = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return type(tensor).__name__, str(tensor.dtype), str(tensor.device), tuple(tensor.shape), tensor.requires_grad, data


def _sample(spec: Mapping[str, Any], registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from harness.images import to_uint8

    plugin, sampler = registry.build("models", spec["model"]), registry.build("samplers", spec["sampler"])
    purified, said = False, spec_of(sampler)
    if spec["defended"] is not None:
        folder = store.open_artifact(spec["defended"])
        purified = (folder / "model").is_dir()
        sampler, said = _defenders(folder, registry, sampler)
    defended = spec["defended"] if purified else None
    model = _model_to_sample(spec["model"], spec["attacked"], defended, registry, store)
    inputs = evaluation_inputs(plugin, model, spec["n"])
    if "found_by" in spec:
        images = _found_images(model, inputs, sampler, store.open_artifact(spec["found_by"]))
    else:
        stamps = (None if stamp is None else registry.build("triggers", stamp) for stamp in spec["stamps"])
        images = torch.cat([_stamped_images(model, inputs, sampler, trigger) for trigger in stamps])
    if not torch.isfinite(images).all():
        raise ArithmeticError("the model's images hold NaN or infinity")
    save_file({"images": to_uint8(images)}, out / "images.safetensors")
    return {"n": len(images), "nfe": sampler.nfe, "sampler": said, "model_changed": purified}


def _stamped_images(model: Any, inputs: Any, sampler: Any, trigger: Any) -> Any:
    """The model's images (N, C, H, W) of inputs with the trigger, or of the inputs as they are for None."""
    if trigger is None:
        return model.sample(inputs, sampler)
    if trigger.stamps == "text":
        model.check_trigger(trigger, inputs.prompts)
    how = sampler.with_trigger(trigger) if hasattr(sampler, "with_trigger") else sampler
    return model.sample(trigger.stamp(inputs), how)


def _found_images(model: Any, inputs: Any, sampler: Any, folder: Path) -> Any:
    """The model's images of inputs with the trigger that the defense in `folder` found; none where there is no usable
    one."""
    import torch

    from harness.scan import usable_trigger
    from harness.stamping import with_found

    found = _found(json.loads((folder / "defended.json").read_text())["trigger"])
    finite = not isinstance(found, torch.Tensor) or bool(found.isfinite().all())
    if not (finite and usable_trigger(model, found)):
        return torch.zeros(0, 1, 1, 1)
    return model.sample(with_found(inputs, found), sampler)


def _defenders(folder: Path, registry: Registry, sampler: Any) -> tuple[Any, str]:
    """The sampler that a defense delivered, around `sampler` if it is one that wraps, else `sampler`; and its spec. An
    attacker's own reverse process stays: who runs it does not run the defender's."""
    delivered = json.loads((folder / "defended.json").read_text()).get("sampler")
    if delivered is None or hasattr(sampler, "with_trigger"):
        return sampler, spec_of(sampler)
    own = registry.build("samplers", delivered)
    if hasattr(own, "around"):
        return own.around(sampler), f"{delivered} around {spec_of(sampler)}"
    return own, delivered


def _measure(spec: Mapping[str, Any], registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    from harness.evidence import contact_sheet
    from harness.images import save_png

    evidence = _evidence(spec, registry, store)
    scores: dict[str, Score] = {}
    for name in spec["metrics"]:
        scores |= _checked_scores(name, registry.build("metrics", name).measure(evidence))
    (out / "scores.json").write_text(json.dumps(plain(scores), sort_keys=True))
    save_png(contact_sheet(evidence), out / "sheet.png")
    return {}


def _checked_scores(metric: str, scores: Mapping[str, Score]) -> dict[str, Score]:
    """A NaN without a warning gets one: a number that could not be measured always says so."""
    from dataclasses import replace

    checked = {}
    for name, score in scores.items():
        if not isinstance(score, Score):
            raise TypeError(
                f"metric '{metric}' gave {type(score).__name__} for '{name}'; a metric returns Score objects"
            )
        silent = math.isnan(score.value) and score.warning is None
        checked[name] = replace(score, warning=f"metric '{metric}' returned NaN without a reason") if silent else score
    return checked


def _evidence(spec: Mapping[str, Any], registry: Registry, store: Store) -> Any:
    import torch

    from harness.evidence import Evidence, Verdict, reachable
    from harness.stamping import found_text
    from harness.types import Backdoor

    cell = Cell(**spec["cell"])
    plugin = registry.build("models", cell.model)
    inverted, verdict = None, Verdict()
    if spec["defended"] is not None:
        document = json.loads((store.open_artifact(spec["defended"]) / "defended.json").read_text())
        if "trigger" not in registry.build("defenses", cell.defense).needs:  # who was told it found none
            found = _found(document["trigger"])
            inverted = found_text(found) or found
        verdict = Verdict(
            document["suspicion"], document["flag_above"], document["features"], document["screen_above"],
            {given: torch.tensor(scores, dtype=torch.float64) for given, scores in document["screened"].items()},
        )  # fmt: skip
    images = {tuple(name.split("/")): _Images(store, key) for name, key in spec["samples"].items()}
    costs = {part: _cost(store, spec[name]) for part, name in (("attack", "attacked"), ("defense", "defended"))}
    backdoor = Backdoor(registry.build("triggers", cell.trigger), registry.build("targets", cell.target))
    prompts = plugin.prompts("test", cell.n, _rng(0, EVALUATION))
    return Evidence(
        images,  # type: ignore[arg-type]
        reference=plugin.reference(),
        model=plugin,
        backdoor=reachable(backdoor, prompts),
        attacked=not is_clean(cell),
        prompts=prompts,
        costs=costs,
        inverted=inverted,
        verdict=verdict,
        wrong_triggers=WRONG,
    )


def _stored(found: Any) -> Any:
    """A trigger that was found, in JSON's terms."""
    from harness.prompts import Substitution

    if isinstance(found, Substitution):
        return {"text": found.text, "letter": found.letter}
    return found if found is None or isinstance(found, str) else found.tolist()


def _found(stored: Any) -> Any:
    """A trigger as stored: a text, one in a letter's place, or a pattern (C, H, W) whose values that were not finite
    are NaN; None for none."""
    import numpy as np
    import torch

    from harness.prompts import Substitution

    if isinstance(stored, dict):
        return Substitution(**stored)
    return torch.from_numpy(np.array(stored, dtype=np.float32)) if isinstance(stored, list) else stored


def _cost(store: Store, key: str | None) -> dict[str, float | None] | None:
    """What the job behind an artifact cost; None where none ran."""
    if key is None:
        return None
    facts = store.manifest(key)["facts"]
    cost = facts.get("cost")
    return None if cost is None else cost | ({"screen_s": facts["screen_s"]} if "screen_s" in facts else {})


@dataclass(frozen=True)
class _Images:
    """An image set in the store, read when first asked for."""

    store: Store
    key: str

    def __call__(self) -> Any:
        from safetensors.torch import load_file

        from harness.images import from_uint8

        return from_uint8(load_file(self.store.open_artifact(self.key) / "images.safetensors")["images"])
