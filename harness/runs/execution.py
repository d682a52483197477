"""A job in its process: from a spec and a store to one artifact, by a stage of harness.stages."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness.registry import Registry, load, spec_of
from harness.runs.job import AttackSpec, ControlSpec, DefendSpec, JobSpec, MeasureSpec, SampleSpec
from harness.runs.jsonable import to_jsonable
from harness.runs.store import Store
from harness.types import Backdoor

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from harness.diffusion.model import DiffusionModel
    from harness.stages.findings import Findings
    from harness.types import Attack, Backdoored, Data, Model

LIBRARIES = (
    "diffusion-defense-bench", "torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "scikit-learn",
    "torch-fidelity", "torchmetrics", "torch-pruning", "open_clip_torch", "timm", "peft",
)  # fmt: skip
MODEL, FINDINGS, IMAGES, SCORES, SHEET = "model", "defended.json", "images.safetensors", "scores.json", "sheet.png"
CONTROL, TRIGGER = "control.json", "trigger"


def execute(spec: JobSpec | Mapping[str, Any], store: Store, out: Path) -> dict[str, Any]:
    """Do one job: fill the directory `out` and return facts for its manifest."""
    asked = parsed(spec)
    registry = load([Path(file) for file in asked.plugin_files])
    return {**_done(asked, registry, store, out), "versions": versions()}


def _done(asked: JobSpec, registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    match asked:
        case AttackSpec():
            return _attack(asked, registry, out)
        case ControlSpec():
            return _control(asked, registry, store, out)
        case DefendSpec():
            return _defend(asked, registry, store, out)
        case SampleSpec():
            return _sample(asked, registry, store, out)
        case MeasureSpec():
            return _measure(asked, registry, store, out)


@cache
def versions() -> dict[str, str | None]:
    """Of the libraries that compute, as installed here; None for one that is not."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def parsed(spec: JobSpec | Mapping[str, Any]) -> JobSpec:
    """The spec as planned, also after it crossed to another process as JSON."""
    if isinstance(spec, Mapping):
        return _adapter().validate_python(spec)
    return spec


@cache
def _adapter() -> Any:
    from typing import Annotated

    from pydantic import Field, TypeAdapter

    return TypeAdapter(Annotated[JobSpec, Field(discriminator="kind")])


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Remembering:
    """An attack that remembers the backdoor that it returned; the stage passes on the model alone."""

    def __init__(self, method: Attack, backdoor: Backdoor) -> None:
        self.method, self.backdoor = method, backdoor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def implant(self, model: DiffusionModel, backdoor: Backdoor, data: Data, rng: Generator) -> Backdoored:
        done = self.method.implant(model, backdoor, data, rng)
        self.backdoor = done.backdoor
        return done


def _attack(spec: AttackSpec, registry: Registry, out: Path) -> dict[str, Any]:
    from harness.diffusion import checkpoint
    from harness.methods import learned_triggers
    from harness.stages.attack import attack

    backdoor = Backdoor(registry.build("triggers", spec.trigger), registry.build("targets", spec.target))
    method = _Remembering(registry.build("attacks", spec.attack), backdoor)
    model = attack(registry.build("models", spec.model), cast(Any, method), backdoor, spec.seed, device())
    pattern = learned_triggers.pattern_of(method, method.backdoor.trigger, model.shape)
    if pattern is not None:
        learned_triggers.save(pattern, out / TRIGGER)
    parts = {part: str(getattr(spec, part)) for part in ("model", "attack", "trigger", "target", "seed")}
    checkpoint.save(model, out / MODEL, {"backdoored": str(method.name != "none").lower(), **parts})
    return {}


def trigger_of(spec: str, learned_by: str | None, registry: Registry, store: Store) -> Any:
    """The trigger of a spec; a learned one with the pattern of the attack job `learned_by`."""
    from harness.capabilities import offers
    from harness.methods import learned_triggers

    trigger = registry.build("triggers", spec)
    if learned_by is None or not offers(trigger, learned_triggers.LearnedTrigger):
        return trigger
    return learned_triggers.read(store.open_artifact(learned_by) / TRIGGER, trigger)


def _control(spec: ControlSpec, registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    from harness.stages.control import choose
    from harness.stages.inputs import avoiding, evaluation_inputs

    sampler = registry.build("samplers", spec.sampler)
    trigger = trigger_of(spec.trigger, spec.learned_by, registry, store)
    backdoor = Backdoor(trigger, registry.build("targets", spec.target))
    plugin = avoiding(registry.build("models", spec.model), backdoor.trigger)
    model = attacked_model(plugin, spec.attacked, store)
    inputs = evaluation_inputs(plugin, model, spec.n, spec.evaluation_seed)
    clean = stored_images(store, spec.clean)()[: spec.n]
    choice = choose(plugin, model, backdoor, sampler, spec.given, spec.seed, inputs, clean)
    (out / CONTROL).write_text(json.dumps(to_jsonable(choice), sort_keys=True))
    return {}


def control_of(store: Store, key: str) -> dict[str, Any]:
    """What control job `key` chose, as `harness.stages.control.Choice` in JSON types."""
    return json.loads((store.open_artifact(key) / CONTROL).read_text())


def given_trigger(spec: DefendSpec, registry: Registry, store: Store) -> Any:
    """The trigger that the defender is given, None where it is given none."""
    from harness.methods.decoys import ladder

    if spec.trigger is None:
        return None
    trigger = trigger_of(spec.trigger, spec.learned_by, registry, store)
    if spec.control is None:
        return trigger
    choice = control_of(store, spec.control)
    return ladder(trigger, choice["given"], spec.seed)[choice["chosen"]][1]


def _defend(spec: DefendSpec, registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    from harness.diffusion import checkpoint
    from harness.stages import knowledge
    from harness.stages.defend import Screening, defend

    plugin, defense = _plugin(spec, registry), registry.build("defenses", spec.defense)
    model = attacked_model(plugin, spec.attacked, store)
    trigger = given_trigger(spec, registry, store)
    known = knowledge.draw(defense.needs, plugin, spec.seed, knowledge.Given(trigger=trigger), device())
    screening = (
        None
        if spec.screened is None
        else Screening(trigger_of(spec.screened, spec.learned_by, registry, store), spec.n, spec.evaluation_seed)
    )
    purified, findings, facts = defend(
        plugin, model, defense, known, spec.seed, screening, lambda sampler: _sampler_spec(registry, defense, sampler)
    )
    if purified is not None:
        labels = {"purified_by": spec.defense, "seed": str(spec.seed)}
        if spec.attacked is not None:
            labels["backdoored"] = "was; the purification may have failed"
        checkpoint.save(purified, out / MODEL, labels)
    (out / FINDINGS).write_text(json.dumps(to_jsonable(findings), sort_keys=True))
    return facts


def _plugin(spec: DefendSpec | SampleSpec, registry: Registry) -> Model:
    """The model plugin of a job, whose captions and prompts do not carry the trigger that the job avoids."""
    from harness.stages.inputs import avoiding

    avoided = None if spec.avoided is None else registry.build("triggers", spec.avoided)
    return avoiding(registry.build("models", spec.model), avoided)


def _sampler_spec(registry: Registry, defense: Any, sampler: Any) -> str | None:
    """What is stored of a defense's sampler: its spec, so that it has to be a registered one."""
    if sampler is None:
        return None
    if registry.classes("samplers").get(getattr(sampler, "name", "")) is not type(sampler):
        raise ValueError(f"defense '{defense.name}' delivers a sampler that is not registered: {sampler!r}")
    return spec_of(sampler)


def attacked_model(plugin: Model, attacked: str | None, store: Store) -> DiffusionModel:
    """The attacked model, or the clean one where nothing was attacked, on the job's device."""
    from harness.diffusion import checkpoint

    model = plugin.load() if attacked is None else checkpoint.load(store.open_artifact(attacked) / MODEL)
    return model.to(device())


def findings_of(store: Store, key: str) -> Findings:
    """What the defense of job `key` said."""
    from harness.stages.findings import Findings

    return Findings(**json.loads((store.open_artifact(key) / FINDINGS).read_text()))


def _sample(spec: SampleSpec, registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from harness.diffusion.images import to_uint8
    from harness.runs import same_inputs
    from harness.stages.findings import found
    from harness.stages.inputs import evaluation_inputs
    from harness.stages.sample import PART, sample, sample_found, wrapped

    plugin, unguarded = _plugin(spec, registry), registry.build("samplers", spec.sampler)
    sampler, purified, label = unguarded, False, spec_of(unguarded)
    if spec.defended is not None:
        purified = (store.open_artifact(spec.defended) / MODEL).is_dir()
        delivered = findings_of(store, spec.defended).sampler
        own = None if delivered is None else registry.build("samplers", delivered)
        guarded = wrapped(sampler, own)
        if guarded is not sampler:
            label = str(delivered) if guarded is own else f"{delivered} around {spec_of(sampler)}"
        sampler = guarded
    model = model_to_sample(spec, spec.defended if purified else None, plugin, store)
    inputs = evaluation_inputs(plugin, model, spec.n, spec.evaluation_seed, spec.stream)

    def trigger(stamp: str | None) -> Any:
        return None if stamp is None else trigger_of(stamp, spec.learned_by, registry, store)

    facts = {"nfe": sampler.nfe, "sampler": label, "model_changed": purified}
    beside = () if purified else spec.beside
    same = same_inputs.found(beside, store.has, sampler, unguarded, model, inputs, spec.stamps, trigger)
    if same is not None:
        shutil.copyfile(store.open_artifact(same) / IMAGES, out / IMAGES)
        return {"n": len(inputs) * len(spec.stamps), **facts}
    if spec.found_by is not None:
        images = sample_found(model, inputs, sampler, found(findings_of(store, spec.found_by).trigger))
    else:
        images = sample(model, inputs, sampler, [trigger(stamp) for stamp in spec.stamps])
    parts = [to_uint8(part) for part in images.split(PART)]
    save_file({"images": torch.cat(parts)}, out / IMAGES)
    return {"n": len(images), **facts}


# ---- the model that this process sampled last -----------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The model that this process samples. of: its spec, the attacked and the defended artifact. state: of torch's
    random generators once it was loaded. seal: of the model, None where it cannot be sealed."""

    of: tuple[str, str | None, str | None]
    model: DiffusionModel
    state: Any
    seal: str | None


_loaded: Loaded | None = None


def model_to_sample(spec: SampleSpec, defended: str | None, plugin: Model, store: Store) -> DiffusionModel:
    """The defended, else the attacked, else the clean model: the one that this process sampled last, if it is the same
    and has not changed since. Whoever samples it finds the random state of a process that has just loaded it."""
    global _loaded
    of = (spec.model, spec.attacked, defended)
    if _loaded is None or _loaded.of != of or _loaded.seal is None or _loaded.seal != _seal(_loaded.model):
        _loaded = None  # before another takes its memory
        found = attacked_model(plugin, spec.attacked if defended is None else defended, store)
        _loaded = Loaded(of, found, _random_state(), _seal(found))
    else:
        _set_random_state(_loaded.state)
    return _loaded.model


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


# ---- measure --------------------------------------------------------------------------------------------------------


def _measure(spec: MeasureSpec, registry: Registry, store: Store, out: Path) -> dict[str, Any]:
    from harness.diffusion.images import save_png
    from harness.judges.evidence import contact_sheet
    from harness.runs.planning import is_clean
    from harness.stages import measure as stage

    cell = spec.cell
    images: Any = {tuple(name.split("/")): stored_images(store, key) for name, key in spec.samples.items()}
    seen = stage.evidence(
        registry.build("models", cell.model),
        Backdoor(trigger_of(cell.trigger, spec.learned_by, registry, store), registry.build("targets", cell.target)),
        images,
        n=cell.n,
        evaluation_seed=cell.evaluation_seed,
        attacked=not is_clean(cell),
        findings=None if spec.defended is None else findings_of(store, spec.defended),
        given_trigger="trigger" in registry.build("defenses", cell.defense).needs,
        costs={"attack": _cost(store, spec.attacked), "defense": _cost(store, spec.defended)},
    )
    scores = stage.measure({name: registry.build("metrics", name) for name in spec.metrics}, seen)
    (out / SCORES).write_text(json.dumps(to_jsonable(scores), sort_keys=True))
    save_png(contact_sheet(seen), out / SHEET)
    return {}


def stored_images(store: Store, key: str) -> Callable[[], Tensor]:
    """The call that reads an image set of the store."""

    def read() -> Tensor:
        from safetensors.torch import load_file

        from harness.diffusion.images import from_uint8

        return from_uint8(load_file(store.open_artifact(key) / IMAGES)["images"])

    return read


def _cost(store: Store, key: str | None) -> dict[str, float | None] | None:
    """What the job behind an artifact cost, as Evidence names it; None where none ran.

    The cost of a defense leaves out the evaluation of its screen, which is as long as the benchmark's sample: screen_s
    says what the screen takes for one input.
    """
    facts = {} if key is None else store.manifest(key)["facts"]
    if facts.get("cost") is None:
        return None
    cost = {"cuda_bytes" if name == "cuda_peak_bytes" else name: value for name, value in facts["cost"].items()}
    if "screen_s" not in facts:
        return cost
    own = {name: cost[name] - facts[f"screening_{name}"] for name in ("wall_s", "cpu_s") if cost.get(name) is not None}
    return cost | own | {"screen_s": facts["screen_s"]}
