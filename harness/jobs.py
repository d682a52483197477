"""From cells to jobs, from jobs to records: what is shared between cells, and what one job does in its own process.

    attack ─► defend ─► sample ─► measure ─► record          (clean models are sampled without an attack)

A key is the sha256 of everything that a job's numbers depend on; where it runs, how many others run beside it and
where it is reported are not in it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from harness.events import progress
from harness.grid import Suite, standard
from harness.job import Job
from harness.registry import Registry, load, parse_spec, source_digest, spec_of, write_spec
from harness.store import Store, key_of
from harness.types import DELIVERS, KNOWLEDGE, Cell, Knowledge, Score, delivers, extra_sets

KEY_VERSION = 3  # raise when the harness itself changes numbers
EVALUATION = "evaluation"  # stage name of the noise and prompts that every cell of a model is judged on
WRONG = 4  # wrong triggers behind the false-trigger rate
KNOWN_SHARE, KNOWN_LEAST = 0.1, 512  # clean training data a defender may hold: a tenth (Elijah's), at least this many
SCREEN_BATCH = 50
KNOWN_PROMPTS = 100  # clean prompts a defender may hold ("Sealing the Backdoor")
SECONDS = {"attack": 300.0, "defend": 60.0, "sample": 40.0, "measure": 10.0}  # first guesses on one CPU core


# ---- planning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedCell:
    """A cell, the key of its measure job (which is the record's key) and the keys of all jobs behind it."""

    cell: Cell
    key: str
    behind: tuple[str, ...]
    needs: tuple[str, ...]  # the defense's
    delivers: tuple[str, ...]  # the defense's
    short: Mapping[str, str]  # specs with only what differs from the defaults
    track: str


@dataclass
class Plan:
    """The jobs of a suite by key, in an order in which they could run, and its cells."""

    jobs: dict[str, Job] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)


def plan(suite: Suite, registry: Registry, store: Store, threads: int = 1) -> Plan:
    """Every job that `suite` needs, each once."""
    planner = _Planner(registry, suite.metrics or standard(registry), threads)
    for cell in suite.cells:
        planner.add(cell)
    return planner.plan


class _Planner:
    def __init__(self, registry: Registry, metrics: Sequence[str], threads: int) -> None:
        self.registry, self.threads, self.plan = registry, threads, Plan()
        self.metrics = {name: self.identity("metrics", name) for name in sorted(metrics)}
        self.sets = {name for metric in metrics for name in extra_sets(registry.build("metrics", metric))}
        self.model_identity = cache(self._model_identity)

    def identity(self, kind: str, spec: str) -> dict[str, Any]:
        """What of a plugin its numbers depend on."""
        made = self.registry.build(kind, spec)
        return {
            "spec": self.registry.canonical(kind, spec),
            "version": made.version,
            "source": source_digest(type(made)),
        }

    def _model_identity(self, spec: str) -> dict[str, Any]:
        return self.identity("models", spec) | {"weights": self.registry.build("models", spec).digest()}

    def short(self, part: str, cell: Cell) -> str:
        """The spec of one part of a cell with only those parameters that differ from the defaults."""
        spec, kind = getattr(cell, part), "defenses" if part == "defense" else part + "s"
        name, given = parse_spec(spec)
        usual = parse_spec(self.registry.canonical(kind, name))[1]
        return write_spec(name, {k: v for k, v in given.items() if v != usual.get(k)})

    def _defended(self, cell: Cell) -> str:
        return self.short("defense", cell) + (" (told a wrong trigger)" if cell.told == "wrong-trigger" else "")

    def job(
        self,
        kind: Any,
        label: str,
        needs: Sequence[str],
        spec: dict[str, Any],
        numbers: dict[str, Any],
        shares: str | None = None,
    ) -> str:
        """Add the job whose result depends on `numbers` (and on the artifacts in `needs`); its key."""
        ingredients = {
            "key_version": KEY_VERSION,
            "kind": kind,
            "threads": self.threads,
            "precision": "fp32",
            "inputs": sorted(needs),
            **numbers,
        }
        key = key_of(ingredients)
        if key not in self.plan.jobs:
            files = [str(path) for path in self.registry.files]
            told = {"kind": kind, **spec, "plugin_files": files}
            self.plan.jobs[key] = Job(key, kind, label, tuple(needs), told, SECONDS[kind], shares)
        return key

    def add(self, cell: Cell) -> None:
        attack = self.attack(cell)
        defend = self.defend(cell, attack)
        samples = self.samples(cell, attack, defend)
        key = self.measure(cell, attack, defend, samples)
        behind = tuple(k for k in (attack, defend, *samples.values(), key) if k is not None)
        defense = self.registry.build("defenses", cell.defense)
        short = {
            part: self.short(part, cell) for part in ("model", "attack", "trigger", "target", "defense", "sampler")
        }
        track = "text-to-image" if self.registry.build("models", cell.model).conditional else "unconditional"
        behind = tuple(dict.fromkeys(behind))
        self.plan.cells.append(PlannedCell(cell, key, behind, tuple(defense.needs), delivers(defense), short, track))

    def attack(self, cell: Cell) -> str | None:
        """Key of the attack job; None where the released clean model is left as it is."""
        if is_clean(cell) and not self.registry.build("attacks", cell.attack).steps:
            return None
        spec = {k: getattr(cell, k) for k in ("model", "attack", "trigger", "target", "seed")}
        numbers = {
            "model": self.model_identity(cell.model),
            "attack": self.identity("attacks", cell.attack),
            "trigger": self.identity("triggers", cell.trigger),
            "target": self.identity("targets", cell.target),
            "seed": cell.seed,
        }
        verb = "fine-tune" if is_clean(cell) else f"attack {self.short('attack', cell)} on"
        label = f"{verb} {self.short('model', cell)}, seed {cell.seed}"
        return self.job("attack", label, [], spec, numbers)

    def told(self, cell: Cell, needs: Sequence[str]) -> str | None:
        """Spec of the trigger that the defender is told; None where it is told none."""
        if "trigger" not in needs:
            return None
        if cell.told == "truth":
            return cell.trigger
        return spec_of(self.registry.build("triggers", cell.trigger).wrong(0))

    def defend(self, cell: Cell, attack: str | None) -> str | None:
        """Key of the defend job; None for defense `none`."""
        name = parse_spec(cell.defense)[0]
        if name == "none":
            return None
        defense = self.registry.build("defenses", cell.defense)
        needs = tuple(defense.needs)
        unknown = [need for need in needs if need not in KNOWLEDGE]
        if unknown:
            raise ValueError(f"defense '{name}' needs {unknown[0]!r}; there are {', '.join(KNOWLEDGE)}")
        told = self.told(cell, needs)
        spec = {
            "model": cell.model, "attacked": attack, "defense": cell.defense, "told": told, "seed": cell.seed,
        }  # fmt: skip
        numbers = {
            "model": self.model_identity(cell.model),
            "defense": self.identity("defenses", cell.defense),
            "told": None if told is None else self.identity("triggers", told),
            "known": [KNOWN_SHARE, KNOWN_LEAST, KNOWN_PROMPTS],
            "seed": cell.seed,
        }
        if "screen" in delivers(defense):
            spec["screened"] = {"trigger": cell.trigger, "n": cell.n}
            numbers["screened"] = {"trigger": self.identity("triggers", cell.trigger), "n": cell.n}
        about = ", told a wrong trigger" if cell.told == "wrong-trigger" else ""
        label = f"defend {self.short('defense', cell)}{about} on {self._whose(cell, attack)}"
        return self.job("defend", label, [attack] if attack else [], spec, numbers)

    def _whose(self, cell: Cell, attack: str | None) -> str:
        name = self.short("model", cell)
        if attack is None:
            return f"clean {name}"
        if is_clean(cell):
            return f"{name} fine-tuned, seed {cell.seed}"
        return f"{name} attacked by {parse_spec(cell.attack)[0]}, seed {cell.seed}"

    def samples(self, cell: Cell, attack: str | None, defend: str | None) -> dict[str, str]:
        """Keys of the image sets by "who/given"."""
        wrong = self.registry.build("triggers", cell.trigger)
        defense = self.registry.build("defenses", cell.defense)
        changes = {"model", "sampler"} & set(delivers(defense))
        stamps: dict[str, list[str | None]] = {
            "clean": [None],
            "triggered": [cell.trigger],
            "wrong": [spec_of(wrong.wrong(k)) for k in range(WRONG)],
        }
        models: dict[str, tuple[str | None, str | None]] = {
            "clean": (None, None),
            "backdoored": (attack, None),
            "defended": (attack, defend if changes else None),
        }
        wanted = [("clean", "clean"), ("backdoored", "clean"), ("backdoored", "triggered"), ("backdoored", "wrong"),
                  ("defended", "clean"), ("defended", "triggered")]  # fmt: skip
        if wrong.stamps == "noise":
            wanted.append(("clean", "triggered"))  # what this noise gives without a backdoor
        made = {f"{who}/{given}": self.sample(cell, models[who], stamps[given], given) for who, given in wanted}
        if defend and "backdoored/found" in self.sets and self.told(cell, defense.needs) is None:
            made["backdoored/found"] = self.sample_found(cell, attack, defend)
        return made

    def sample_found(self, cell: Cell, attack: str | None, defend: str) -> str:
        """The attacked model under the trigger that the defense found, sampled as clean inputs are: who found it knows
        no attacker's own process."""
        sampler = self.sampler(cell, "clean")
        spec = {
            "model": cell.model, "attacked": attack, "defended": None, "sampler": sampler, "n": cell.n,
            "found_by": defend,
        }  # fmt: skip
        numbers = {
            "model": self.model_identity(cell.model),
            "sampler": self.identity("samplers", sampler),
            "found": [attack, defend],
            "n": cell.n,
        }
        label = f"sample inputs with the trigger that {self._defended(cell)} found on {self._whose(cell, attack)}"
        shares = _shared(cell, attack, None)
        return self.job("sample", label, [k for k in (attack, defend) if k], spec, numbers, shares)

    def sample(self, cell: Cell, of: tuple[str | None, str | None], stamps: Sequence[str | None], given: str) -> str:
        attack, defend = of
        sampler = self.sampler(cell, given)
        spec = {
            "model": cell.model, "attacked": attack, "defended": defend, "sampler": sampler, "stamps": stamps,
            "n": math.ceil(cell.n / len(stamps)),
        }  # fmt: skip
        numbers = {
            "model": self.model_identity(cell.model),
            "sampler": self.identity("samplers", sampler),
            "stamps": [None if stamp is None else self.identity("triggers", stamp) for stamp in stamps],
            "n": math.ceil(cell.n / len(stamps)),
        }
        who = f"{self._defended(cell)} on " if defend else ""
        label = f"sample {given} inputs, {who}{self._whose(cell, attack)}"
        needs = [k for k in (attack, defend) if k]
        # `inputs` is a set of keys, so which of them was attacked and which defended is said again
        numbers["of"] = [attack, defend]
        changed = "model" in delivers(self.registry.build("defenses", cell.defense))
        shares = _shared(cell, attack, defend if changed else None)
        return self.job("sample", label, needs, spec, numbers, shares)

    def sampler(self, cell: Cell, given: str) -> str:
        """The cell's sampler. One that is an attacker's own reverse process is for inputs with a trigger (wrong ones
        too); clean inputs are sampled by its vanilla form, whoever's model it is."""
        sampler = self.registry.build("samplers", cell.sampler)
        own = given == "clean" and hasattr(sampler, "vanilla")
        return spec_of(sampler.vanilla()) if own else cell.sampler

    def measure(self, cell: Cell, attack: str | None, defend: str | None, samples: dict[str, str]) -> str:
        spec = {
            "cell": asdict(cell), "attacked": attack, "defended": defend, "samples": samples,
            "metrics": list(self.metrics),
        }  # fmt: skip
        numbers = {
            "cell": asdict(cell),
            "model": self.model_identity(cell.model),
            "trigger": self.identity("triggers", cell.trigger),
            "target": self.identity("targets", cell.target),
            "metrics": self.metrics,
            "samples": samples,
        }
        needs = [k for k in dict.fromkeys([attack, defend, *samples.values()]) if k]
        label = f"measure {self._defended(cell)} on {self._whose(cell, attack)}"
        return self.job("measure", label, needs, spec, numbers)


def _shared(cell: Cell, attack: str | None, defend: str | None) -> str:
    """The name of the model that a sample job loads: the defended, else the attacked, else the clean one."""
    return f"{cell.model} {attack} {defend}"


def is_clean(cell: Cell) -> bool:
    """Whether the cell's model is without a backdoor: attack `none`, fine-tuned or not."""
    return parse_spec(cell.attack)[0] == "none"


# ---- executing ------------------------------------------------------------------------------------------------------


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
    found = None if done.trigger is None else done.trigger if isinstance(done.trigger, str) else done.trigger.tolist()
    features = dict(done.features or {})
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
    two share noise or seed, so that nothing but the trigger tells them apart."""
    import torch

    n, trigger = spec["screened"]["n"], registry.build("triggers", spec["screened"]["trigger"])
    inputs = evaluation_inputs(plugin, model, 2 * n)
    if trigger.stamps == "text":
        model.check_trigger(trigger, inputs.prompts)
    stamped = trigger.stamp(inputs)
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
    return {"clean": [scores[i] for i in range(n)], "triggered": [scores[i] for i in range(n, 2 * n)]}


def _sampler_spec(registry: Registry, defense: Any, sampler: Any) -> str | None:
    """What is stored of a defense's sampler: its spec, so that it has to be a registered one."""
    if sampler is None:
        return None
    if registry.classes("samplers").get(getattr(sampler, "name", "")) is not type(sampler):
        raise ValueError(f"defense '{defense.name}' delivers a sampler that is not registered: {sampler!r}")
    return spec_of(sampler)


def _knowledge(spec: Mapping[str, Any], registry: Registry, plugin: Any, needs: Sequence[str]) -> Knowledge:
    """Exactly what the defense's `needs` names, drawn with a generator that only the seed decides."""
    import torch

    rng = _rng(spec["seed"], "knowledge")
    known: dict[str, Any] = {}
    if "trigger" in needs:
        known["trigger"] = registry.build("triggers", spec["told"])
    if "data" in needs:
        data = plugin.data()
        share = min(len(data), max(KNOWN_LEAST, math.ceil(KNOWN_SHARE * len(data))))
        known["data"] = data.rows(torch.randperm(len(data), generator=rng)[:share])
    if "prompts" in needs:
        known["prompts"] = plugin.prompts("train", KNOWN_PROMPTS, rng)
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

    found = _pattern(json.loads((folder / "defended.json").read_text())["trigger"])
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

    from harness.evidence import Evidence, Verdict
    from harness.types import Backdoor

    cell = Cell(**spec["cell"])
    plugin = registry.build("models", cell.model)
    inverted, verdict = None, Verdict()
    if spec["defended"] is not None:
        document = json.loads((store.open_artifact(spec["defended"]) / "defended.json").read_text())
        if "trigger" not in registry.build("defenses", cell.defense).needs:  # who was told it found none
            inverted = _pattern(document["trigger"])
        verdict = Verdict(
            document["suspicion"], document["flag_above"], document["features"], document["screen_above"],
            {given: torch.tensor(scores, dtype=torch.float64) for given, scores in document["screened"].items()},
        )  # fmt: skip
    images = {tuple(name.split("/")): _Images(store, key) for name, key in spec["samples"].items()}
    costs = {part: _cost(store, spec[name]) for part, name in (("attack", "attacked"), ("defense", "defended"))}
    return Evidence(
        images,  # type: ignore[arg-type]
        reference=plugin.reference(),
        model=plugin,
        backdoor=Backdoor(registry.build("triggers", cell.trigger), registry.build("targets", cell.target)),
        attacked=not is_clean(cell),
        prompts=plugin.prompts("test", cell.n, _rng(0, EVALUATION)),
        costs=costs,
        inverted=inverted,
        verdict=verdict,
        wrong_triggers=WRONG,
    )


def _pattern(found: Any) -> Any:
    """A trigger as stored: text, or a pattern (C, H, W) whose values that were not finite are NaN; None for none."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(found, dtype=np.float32)) if isinstance(found, list) else found


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


# ---- records --------------------------------------------------------------------------------------------------------


def collect(plan: Plan, results: Mapping[str, Any], store: Store) -> list[dict[str, Any]]:
    """One record a cell, written to the store: its scores, or why there are none."""
    provenance = _provenance()
    return [_record(planned, plan, results, store, provenance) for planned in plan.cells]


def _record(
    planned: PlannedCell, plan: Plan, results: Mapping[str, Any], store: Store, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    result = results[planned.key]
    failed = None if result.ok else _first_failure(planned, results) or result.error
    scores: dict[str, Any] = {}
    sheet = None
    if result.ok:
        folder = store.open_artifact(planned.key)
        scores, sheet = json.loads((folder / "scores.json").read_text()), str(folder / "sheet.png")
    behind = {
        key: {"kind": plan.jobs[key].kind, "label": plan.jobs[key].label, "attempts": results[key].attempts}
        for key in planned.behind
    }
    defended = next((key for key in planned.behind if plan.jobs[key].kind == "defend"), None)
    record = {
        "key": planned.key,
        "cell": asdict(planned.cell),
        "scores": scores,
        "warnings": sorted({f"{name}: {s['warning']}" for name, s in scores.items() if s["warning"]}),
        "error": failed,
        "attempts": [{"job": key, **dict(each)} for key, job in behind.items() for each in job["attempts"]],
        "knowledge": list(planned.needs),
        "provenance": {
            **provenance,
            "jobs": {key: {"kind": job["kind"], "label": job["label"]} for key, job in behind.items()},
            "short": planned.short,
            "track": planned.track,
            "delivers": list(planned.delivers),
            "metrics": list(plan.jobs[planned.key].spec["metrics"]),
            "nfe": _nfe(planned, plan, store),
            "sampled": _sampled(planned, plan, store),
            "accelerators": _accelerators(planned, store),
            **(_said(plan.jobs[planned.key].spec["defended"], store) if result.ok else {"notes": {}}),
            "unchanged": result.ok and defended is not None and _unchanged(planned, plan, store),
        },
        "sheet": sheet,
    }
    record = plain(record)
    store.write_record(planned.key, record)
    return record


def _first_failure(planned: PlannedCell, results: Mapping[str, Any]) -> str | None:
    """The error of the earliest job behind the cell that itself failed."""
    return next((results[k].error for k in planned.behind if results[k].status == "failed"), None)


def _nfe(planned: PlannedCell, plan: Plan, store: Store) -> int | None:
    """Network evaluations for one image."""
    for key in planned.behind:
        if plan.jobs[key].kind == "sample" and store.has(key):
            return store.manifest(key)["facts"]["nfe"]
    return None


def _said(defended: str | None, store: Store) -> dict[str, Any]:
    """What the defense says of its own work: notes (losses, norms, realised shares, seconds; six digits, curves
    thinned), and found_trigger where it names a text."""
    path = None if defended is None else store.open_artifact(defended) / "defended.json"
    if path is None or not path.is_file():
        return {"notes": {}}
    document = json.loads(path.read_text())
    named = {"found_trigger": document["trigger"]} if isinstance(document["trigger"], str) else {}
    return {"notes": _thinned(document["notes"]), **named}


def _thinned(value: Any, most: int = 50) -> Any:
    if isinstance(value, Mapping):
        return {name: _thinned(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_thinned(inner) for inner in value[:: math.ceil(len(value) / most) or 1]]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _accelerators(planned: PlannedCell, store: Store) -> list[str]:
    """Names of the GPUs that the cell's jobs computed on; none where all ran on a CPU."""
    keys = [key for key in planned.behind if store.has(key)]
    return sorted({name for key in keys if (name := store.manifest(key)["facts"].get("accelerator"))})


def _sampled(planned: PlannedCell, plan: Plan, store: Store) -> dict[str, Any]:
    """For each image set the sampler that made it and its network evaluations for one image."""
    sets: Mapping[str, str] = plan.jobs[planned.key].spec["samples"]
    facts = {name: store.manifest(key)["facts"] for name, key in sets.items() if store.has(key)}
    return {name: {"sampler": fact.get("sampler"), "nfe": fact["nfe"]} for name, fact in facts.items()}


def _unchanged(planned: PlannedCell, plan: Plan, store: Store) -> bool:
    """Whether the defense returned the very weights it was given (by the files' digests)."""
    spec = plan.jobs[planned.key].spec
    defended, attacked = spec["defended"], spec["attacked"]
    if defended is None or attacked is None:
        return False

    def weights(key: str) -> dict[str, str]:
        files = store.manifest(key)["files"]
        return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}

    mine = weights(defended)
    return bool(mine) and mine == weights(attacked)


def _provenance() -> dict[str, Any]:
    names = ("diffusion-defense-bench", "torch", "diffusers", "transformers", "torch-fidelity", "open_clip_torch")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": platform.machine(),
        "processor": _processor(),
        "platform": sys.platform,
        **_commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> dict[str, Any]:
    """Commit and cleanness of the checkout that the harness runs from; None for an installed copy."""
    import subprocess

    def git(*words: str) -> str | None:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--", "harness", "plugins") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def plain(value: Any) -> Any:
    """Dataclasses, tuples and NaN as plain JSON: NaN and infinities become null."""
    if isinstance(value, Score):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
