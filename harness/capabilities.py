"""What a plugin may offer beyond what its kind asks for.

Each Protocol says who asks a plugin for it and what happens without it. `offers` asks, `CAPABILITIES` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar, runtime_checkable

from harness.types import (
    CONTROL,
    Data,
    Defense,
    Family,
    ImageEncoder,
    Judge,
    Metric,
    Modality,
    Model,
    NoiseTrigger,
    Sampler,
    Target,
    TextTrigger,
    Trigger,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor


SETS = (
    "backdoored/found",
)  # image sets in addition to those of every cell; they are sampled if a metric declares in `sets` that it reads them


def extra_sets(metric: Any) -> tuple[str, ...]:
    """The additional image sets that a metric reads. Raises ValueError for an unknown set."""
    wanted = tuple(metric.sets) if offers(metric, ExtraSetsMetric) else ()
    for name in wanted:
        if name not in SETS:
            raise ValueError(f"metric '{metric.name}' reads the images {name!r}; there are {', '.join(SETS)}")
    return wanted


def delivers(defense: Any) -> tuple[str, ...]:
    """The declared results of a defense; a defense without a declaration purifies a model."""
    return tuple(defense.delivers) if offers(defense, DeliveringDefense) else ("model",)


@runtime_checkable
class TokenTrigger(TextTrigger, Protocol):
    """One whose `text` is what it puts into a prompt: attacks and defenses that look for the text in prompts ask for
    it, and refuse a trigger without it; messages call such a trigger by its name instead."""

    @property
    def text(self) -> str: ...


@runtime_checkable
class RewordableTrigger(TokenTrigger, Protocol):
    """One that can put another text in its place: skd-cag(target='random_words') asks for it, and a suite drops the
    cell without it."""

    def with_text(self, text: str) -> TextTrigger: ...


@runtime_checkable
class DecoyTrigger(TextTrigger, Protocol):
    """One that draws random triggers of its kind, never one of `wrong`: attacks with decoys > 0 ask for it, and a suite
    drops the cell without it."""

    def decoy(self, rng: torch.Generator) -> TextTrigger: ...


@runtime_checkable
class OrdinaryTrigger(TextTrigger, Protocol):
    """One that ordinary prompts may carry, such as a sentence form: whoever draws clean captions and prompts asks for
    `without(prompt)`, and takes them as they are without it; iba and sembd ask for it, and a suite drops the cell
    without it."""

    def without(self, prompt: str) -> str:
        """A prompt for nearly the same image that does not carry the trigger: `prompt` itself where it does not."""
        ...


@runtime_checkable
class ParaphrasedTrigger(OrdinaryTrigger, Protocol):
    """One that can be worded in several ways: sembd asks for them, and a suite drops the cell without it."""

    @property
    def paraphrases(self) -> Sequence[str]: ...


@runtime_checkable
class LetterTrigger(TokenTrigger, Protocol):
    """One that replaces a letter by `text`: sau asks for it, to put the letter back, and takes the text out as words of
    their own without it."""

    @property
    def letter(self) -> str: ...


@runtime_checkable
class PlacedTrigger(TextTrigger, Protocol):
    """One that can stand at any of `count(prompt)` places of a prompt: rickrolling asks for it, and uses `apply`
    without it, or refuses where attribute='word'."""

    def count(self, prompt: str) -> int: ...

    def put(self, prompt: str, places: Collection[int]) -> str: ...


@runtime_checkable
class RepeatedTrigger(PlacedTrigger, Protocol):
    """One that says whether it takes the first of its places or all: rickrolling asks for it, and trains on one place
    of each prompt without it."""

    @property
    def which(self) -> Literal["first", "all"]: ...


@runtime_checkable
class ScalingTrigger(NoiseTrigger, Protocol):
    """One that also scales the noise, x_T = γ ε + μ: everything that stamps noise, and the suite, ask for it; without
    it γ = 1, and any attack on noise may use the trigger."""

    biased_noise: ClassVar[bool]  # True

    def scale(self, shape: Sequence[int]) -> Tensor:
        """γ (C, H, W)."""
        ...


@runtime_checkable
class AddedTrigger(NoiseTrigger, Protocol):
    """One without a background, which is added to an image and not drawn over it: baddiffusion and villandiffusion with
    trigger_only=False ask for it, and take the smallest value of r for a transparent background without it."""

    added: ClassVar[bool]  # True


@runtime_checkable
class ComputedTrigger(Trigger, Protocol):
    """One that is computed from more than its parameters, such as a network: planning asks for a digest of that and
    puts it into the keys, which hold the spec alone without it."""

    def digest(self) -> str:
        """sha256 of what the trigger is computed from, beside its parameters and code; found in less than a second."""
        ...


@runtime_checkable
class SeveralTrigger(NoiseTrigger, Protocol):
    """One of several patterns, any of which activates the backdoor; `delta` is the first: attacks on noise ask for it,
    to train each poisoned row on one of them, and train on `delta` without it."""

    def patterns(self, shape: Sequence[int]) -> Tensor:
        """(K, C, H, W)."""
        ...


@runtime_checkable
class PartlyKnownTrigger(Trigger, Protocol):
    """One that is told in part: the harness asks for the trigger that a defender who is given the trigger gets, and
    gives the whole trigger without it."""

    def known(self) -> Trigger: ...


@runtime_checkable
class TriggerDependentTarget(Target, Protocol):
    """One that depends on the trigger: every Backdoor asks it for the target of its trigger, and takes the target as it
    is without it."""

    def of(self, trigger: Trigger) -> Target: ...


@runtime_checkable
class ConditionalTarget(Target, Protocol):
    """One that has no say in some prompts: rates and screens ask for (N,) bool and leave the others out, and count all
    prompts without it."""

    def applicable_to(self, prompts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class PromptTarget(Target, Protocol):
    """One that is the image of another prompt: rickrolling, eviledit and the metric target_clip ask for that prompt;
    without it the metric is unmeasured, and the attacks cannot teach the target."""

    def shown(self, prompt: str) -> str: ...


@runtime_checkable
class TaughtTarget(Target, Protocol):
    """One of kind style or object that makes training pairs of captions: badt2i, rickrolling and personalization ask
    for (caption under the trigger, caption of the answer), and cannot teach the target without it."""

    def lesson(self, caption: str) -> tuple[str, str] | None: ...


@runtime_checkable
class WordedTarget(Target, Protocol):
    """One that has words for its attribute: rickrolling(attribute='word') asks for them, and refuses the target without
    them."""

    @property
    def words(self) -> str: ...


@runtime_checkable
class NounTarget(Target, Protocol):
    """One that says which nouns of a prompt it changes: eviledit and personalization ask a target of kind object for
    them, and cannot teach it without them."""

    @property
    def sources(self) -> Sequence[str]: ...


@runtime_checkable
class ReplacingTarget(NounTarget, Protocol):
    """One that puts `word` in the place of `sources`: personalization(mode='textual-inversion') asks for it, and
    refuses the target without it."""

    @property
    def word(self) -> str: ...


@runtime_checkable
class PastedTarget(Target, Protocol):
    """One of kind patch or caption that pastes a picture into images: badt2i and bad-caption ask for it, and cannot
    teach the target without it."""

    def apply(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class LabelledTarget(Target, Protocol):
    """One that names a class of the judge: the metric bilateral and the contract kit ask for it; without it the kit
    takes class 0, and bilateral has nothing to compare with."""

    @property
    def label(self) -> int: ...


@runtime_checkable
class MislabellingTarget(PastedTarget, LabelledTarget, Protocol):
    """One of kind caption that relabels captions: bad-caption and the metric bilateral ask for it, and no other attack
    can teach a target of that kind."""

    attribute: ClassVar[str]  # the judge's, which holds the class `label`

    @property
    def word(self) -> str: ...

    def relabelled(self, caption: str) -> str | None: ...


@runtime_checkable
class ExamplesTarget(Target, Protocol):
    """One of kind class that gives images (N, C, H, W) of it: trojdiff asks for them, and cannot teach the target
    without them."""

    def examples(self, data: Data, rng: torch.Generator) -> Tensor: ...


@runtime_checkable
class PictureTarget(Target, Protocol):
    """One that says which picture it is, and None where it is not one: attacks on targets of kind image, the metric
    specificity and the contract kit ask for it; without it the metric is unmeasured and the attacks cannot teach it."""

    def image(self, shape: Sequence[int]) -> Tensor | None: ...

    def region(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class AttackersSampler(Sampler, Protocol):
    """An attacker's own reverse process: planning and sampling ask for it, to sample inputs with a trigger by
    `with_trigger(trigger)` and clean ones by `vanilla()`; without it one sampler serves both."""

    def vanilla(self) -> Sampler: ...

    def with_trigger(self, trigger: Trigger) -> Any:
        """What has `run` and `nfe`, for inputs that carry `trigger`."""
        ...


@runtime_checkable
class WrappingSampler(Sampler, Protocol):
    """One that a defense delivers around the cell's: sampling asks for it, and uses the delivered sampler instead of
    the cell's without it."""

    def around(self, inner: Sampler) -> Any:
        """What has `run` and `nfe`, as `inner` with the defense in it."""
        ...


@runtime_checkable
class ScheduledSampler(Sampler, Protocol):
    """One that steps a diffusers scheduler: sau(last_steps=...) asks for it, and refuses the sampler without it."""

    def scheduler(self, config: Any) -> Any: ...


@runtime_checkable
class GuidedSampler(Sampler, Protocol):
    """One with a scale of classifier-free guidance, 1 = off: estimates ask for it, and count one network evaluation a
    step without it."""

    @property
    def guidance(self) -> float: ...


@runtime_checkable
class TriggeredSampler(Sampler, Protocol):
    """One that says with which triggers it can be used: the contract kit asks for it, and tries the sampler on models
    of noise triggers without it."""

    accepts_triggers: ClassVar[Sequence[Modality]]


@runtime_checkable
class OfFamily(Protocol):
    """A model or a sampler that says whether variance is preserved ("vp") or explodes ("ve"), or that noise and image
    are joined by a straight line ("flow"): the suite asks for it, to drop pairs that do not fit, and takes "vp" without
    it."""

    @property
    def family(self) -> Family: ...


@runtime_checkable
class OnBiasedNoise(Protocol):
    """An attack or a sampler for triggers that scale the noise: the suite asks for it, and keeps such triggers from an
    attack, and the sampler for all attacks, without it."""

    biased_noise: ClassVar[bool]  # True


@runtime_checkable
class MeasuredWork(Model, Protocol):
    """A model that says what its network costs before it is here: `bench plan` asks for it, and estimates no hours and
    no memory without it."""

    latent: ClassVar[bool]
    side: ClassVar[int]  # pixels of its images
    work: ClassVar[Any]  # a harness.Work


@runtime_checkable
class PublishedArchitecture(Model, Protocol):
    """A model that says what it consists of: rehearsals ask for it, and give it random weights, made data and judges
    with random weights; without it they use the model's own weights and data."""

    architecture: ClassVar[Mapping[str, Mapping[str, Any]]]  # part of a diffusers pipeline → its configuration
    side: ClassVar[int]  # pixels of its images


@runtime_checkable
class CheckpointedModel(Model, Protocol):
    """A model that says whether training computes activations again in the backward pass instead of keeping them:
    attacks and defenses of it ask for it, and keep them without it."""

    @property
    def checkpointing(self) -> bool: ...


@runtime_checkable
class CountedData(Model, Protocol):
    """A model that says how many training images it reads, 0 = all: estimates ask for it, and take the number of the
    published data set without it."""

    @property
    def images(self) -> int: ...


@runtime_checkable
class BuildableModel(Model, Protocol):
    """A model that has a recipe: `bench build` asks for it, and refuses the model without it."""

    def build(self, out: Path) -> Mapping[str, Any]:
        """Writes weights, judges and data into the folder `out` and returns facts about them.

        A recipe that also has the parameter `device` trains on that device.
        """
        ...


@runtime_checkable
class PictureModel(Model, Protocol):
    """A model that names the public encoders (some of `PUBLIC_ENCODERS`) which know its pictures: the metrics frechet
    and perceptual and whoever gives a defender an encoder ask for the names; without it distances are in the judge's
    features alone, perceptual is unmeasured, and a model without a scorer gives its judge as encoder."""

    encoders: ClassVar[Sequence[str]]


@runtime_checkable
class ProbabilityJudge(Judge, Protocol):
    """A judge whose network gives logits by attribute: the metric recognised asks for it, and is unmeasured without
    it."""

    @property
    def net(self) -> Callable[[Tensor], Mapping[str, Tensor]]: ...


@runtime_checkable
class SteppedMethod(Protocol):
    """An attack or a defense that trains for a number of steps: estimates of time ask for it, and take a usual time
    without it."""

    @property
    def steps(self) -> int: ...


@runtime_checkable
class BatchedMethod(Protocol):
    """An attack or a defense that trains on so many examples a step: estimates of time and memory ask for it, and take
    1 without it."""

    @property
    def batch(self) -> int: ...


@runtime_checkable
class LoopedMethod(Protocol):
    """An attack or a defense with further fields that are lengths of loops, such that its time is linear in each:
    rehearsals ask for their names, run methods that differ in them alone once, and without it know `steps` alone."""

    loops: ClassVar[Sequence[str]]


@runtime_checkable
class JudgingDetector(Protocol):
    """A detector that knows, before it looks, above which suspicion it flags a model, None if clean models decide: a
    scan asks for it, to say whether a verdict is possible, and without it waits for the detector's result."""

    @property
    def flag_above(self) -> float | None: ...


@runtime_checkable
class CountingDetector(Protocol):
    """A detector that knows, before it looks, how many network evaluations it makes on a model at most: a scan asks for
    it, to say how long it will take, and without it times its loops."""

    def evaluations(self, model: Any, knowledge: Any) -> int: ...


@runtime_checkable
class StatingDetector(Protocol):
    """A detector that states which families of backdoors, by their names in `FAMILIES`, its method can see in
    principle: a scan asks for it, to name the families that no detector sees, and says "not stated" without it."""

    @property
    def sees(self) -> Sequence[str]: ...


@runtime_checkable
class LimitedToModels(Protocol):
    """An attack, a defense, a trigger or a target that works with the models of these names alone: the suite and the
    contract kit ask for it, and take any model without it."""

    accepts_models: ClassVar[Sequence[str] | None]  # None for any


@runtime_checkable
class NeedsOfTrigger(Protocol):
    """An attack, a defense or a sampler that needs a trigger with optional capabilities, by the names in
    `TRIGGER_CAPABILITIES`: the suite asks for it, and takes any trigger of an accepted modality without it."""

    @property
    def requires_trigger(self) -> Sequence[str]: ...


@runtime_checkable
class LibraryDependent(Protocol):
    """A plugin whose numbers depend on the minor version of libraries: planning asks for their names and puts the
    versions into the keys, which hold no versions without it."""

    keyed_libraries: ClassVar[Sequence[str]]


@runtime_checkable
class DeliveringDefense(Defense, Protocol):
    """A defense that says which fields of Defended it fills: planning, sampling and measuring ask for it, and expect a
    model alone without it."""

    @property
    def delivers(self) -> Sequence[str]: ...


@runtime_checkable
class ExtraSetsMetric(Metric, Protocol):
    """A metric that reads image sets which are sampled for it alone: planning asks for their names, and leaves such a
    metric to the suites that name it; without it a metric reads the sets of every cell."""

    sets: ClassVar[Sequence[str]]


@runtime_checkable
class PerSampleMetric(Metric, Protocol):
    """A metric that says which of its scores keep per-sample values, by their names without brackets: measuring and
    `bench leaderboard check` ask for them, and refuse such a score without its values; without it a score may come
    without them."""

    per_sample: ClassVar[Sequence[str]]


@dataclass(frozen=True)
class Capability:
    """What plugins of `kinds` may offer. claimed_by: attributes any of which says that a plugin means to offer it, so
    that registration asks for the rest; none where those names may as well mean something else."""

    protocol: type
    kinds: tuple[str, ...]
    claimed_by: tuple[str, ...] = ()


CAPABILITIES: tuple[Capability, ...] = (
    Capability(TokenTrigger, ("triggers",)),
    Capability(RewordableTrigger, ("triggers",), ("with_text",)),
    Capability(DecoyTrigger, ("triggers",), ("decoy",)),
    Capability(OrdinaryTrigger, ("triggers",), ("without",)),
    Capability(ParaphrasedTrigger, ("triggers",), ("paraphrases",)),
    Capability(LetterTrigger, ("triggers",), ("letter",)),
    Capability(PlacedTrigger, ("triggers",), ("put",)),
    Capability(RepeatedTrigger, ("triggers",)),
    Capability(ScalingTrigger, ("triggers",), ("biased_noise",)),
    Capability(AddedTrigger, ("triggers",), ("added",)),
    Capability(ComputedTrigger, ("triggers",), ("digest",)),
    Capability(SeveralTrigger, ("triggers",), ("patterns",)),
    Capability(PartlyKnownTrigger, ("triggers",), ("known",)),
    Capability(TriggerDependentTarget, ("targets",), ("of",)),
    Capability(ConditionalTarget, ("targets",), ("applicable_to",)),
    Capability(PromptTarget, ("targets",), ("shown",)),
    Capability(TaughtTarget, ("targets",), ("lesson",)),
    Capability(WordedTarget, ("targets",)),
    Capability(NounTarget, ("targets",), ("sources",)),
    Capability(ReplacingTarget, ("targets",)),
    Capability(PastedTarget, ("targets",)),
    Capability(LabelledTarget, ("targets",)),
    Capability(MislabellingTarget, ("targets",), ("relabelled",)),
    Capability(ExamplesTarget, ("targets",)),
    Capability(PictureTarget, ("targets",), ("image",)),
    Capability(AttackersSampler, ("samplers",), ("vanilla", "with_trigger")),
    Capability(WrappingSampler, ("samplers",), ("around",)),
    Capability(ScheduledSampler, ("samplers",)),
    Capability(GuidedSampler, ("samplers",)),
    Capability(TriggeredSampler, ("samplers",), ("accepts_triggers",)),
    Capability(OfFamily, ("models", "samplers"), ("family",)),
    Capability(OnBiasedNoise, ("attacks", "samplers"), ("biased_noise",)),
    Capability(MeasuredWork, ("models",), ("work",)),
    Capability(PublishedArchitecture, ("models",), ("architecture",)),
    Capability(CheckpointedModel, ("models",)),
    Capability(CountedData, ("models",)),
    Capability(BuildableModel, ("models",), ("build",)),
    Capability(PictureModel, ("models",), ("encoders",)),
    Capability(ProbabilityJudge, ()),
    Capability(SteppedMethod, ("attacks", "defenses")),
    Capability(BatchedMethod, ("attacks", "defenses")),
    Capability(LoopedMethod, ("attacks", "defenses"), ("loops",)),
    Capability(JudgingDetector, ("defenses",), ("flag_above",)),
    Capability(CountingDetector, ("defenses",), ("evaluations",)),
    Capability(StatingDetector, ("defenses",), ("sees",)),
    Capability(LimitedToModels, ("attacks", "defenses", "triggers", "targets"), ("accepts_models",)),
    Capability(NeedsOfTrigger, ("attacks", "defenses", "samplers"), ("requires_trigger",)),
    Capability(
        LibraryDependent,
        ("models", "triggers", "targets", "attacks", "defenses", "metrics", "samplers"),
        ("keyed_libraries",),
    ),
    Capability(DeliveringDefense, ("defenses",), ("delivers",)),
    Capability(ExtraSetsMetric, ("metrics",), ("sets",)),
    Capability(PerSampleMetric, ("metrics",), ("per_sample",)),
)
TRIGGER_CAPABILITIES: dict[str, type] = {
    "text": TokenTrigger,
    "with_text": RewordableTrigger,
    "decoy": DecoyTrigger,
    "without": OrdinaryTrigger,
    "paraphrases": ParaphrasedTrigger,
    "letter": LetterTrigger,
    "put": PlacedTrigger,
    "which": RepeatedTrigger,
    "scale": ScalingTrigger,
}  # what a plugin can name in `requires_trigger`
FAMILIES: dict[str, str] = {
    "noise-sde": "a trigger in the noise, in a denoiser that is backdoored for ancestral samplers",
    "noise-ode": "a trigger in the noise, in a denoiser that is backdoored for deterministic samplers",
    "prompt-denoiser": "a trigger in the prompt, in a backdoored denoiser",
    "prompt-encoder": "a trigger in the prompt, in a backdoored text encoder",
    "adapter": "a trigger in the prompt, in an adapter (LoRA) that is loaded with the model",
    "code": "code of the pipeline or of a sampler",
}  # of backdoors, by where they are; what a detector can name in `sees`
_OF_EVERY_PLUGIN = (Trigger, NoiseTrigger, TextTrigger, Target, Sampler, Model, Defense, Metric, ImageEncoder, Judge)
C = TypeVar("C")


@cache
def members(protocol: type) -> tuple[str, ...]:
    """What a capability asks for beside what every plugin of its kind has."""
    own = [base for base in reversed(protocol.__mro__[:-1]) if base not in _OF_EVERY_PLUGIN]
    names = [name for base in own for name in (*get_annotations(base), *vars(base))]
    return tuple(dict.fromkeys(name for name in names if not name.startswith("_")))


def offers(part: object, protocol: type[C]) -> TypeGuard[C]:
    """Whether a plugin, or what stands for one, has all that a capability asks for.

    Like isinstance with the Protocol, but for two things: what every plugin of the kind has is taken for granted, and
    attributes that a wrapper passes on count (from Python 3.12 on isinstance does not see them).
    """
    return all(hasattr(part, name) for name in members(protocol))


def scales_noise(part: object) -> TypeGuard[ScalingTrigger]:
    """Whether a trigger scales the noise; of an attack or a sampler, whether it is for such triggers."""
    return offers(part, OnBiasedNoise) and bool(part.biased_noise)


def family_of(part: object) -> Family:
    """The family of a model plugin or a sampler."""
    return part.family if offers(part, OfFamily) else "vp"


def accepted_models(part: object) -> tuple[str, ...] | None:
    """Names of the models that a plugin works with; None for any."""
    names = part.accepts_models if offers(part, LimitedToModels) else None
    return None if names is None else tuple(names)


def encoders_of(part: object) -> tuple[str, ...]:
    """Names of the public encoders that know the images of a model plugin."""
    return tuple(part.encoders) if offers(part, PictureModel) else ()


def keyed_libraries(part: object) -> tuple[str, ...]:
    """Libraries whose minor versions are part of the keys of a plugin's jobs."""
    return tuple(part.keyed_libraries) if offers(part, LibraryDependent) else ()


def keeps_per_sample(part: object) -> tuple[str, ...]:
    """The scores, without brackets, of which a metric keeps per-sample values."""
    return tuple(part.per_sample) if offers(part, PerSampleMetric) else ()


def missing_of_trigger(part: Any, trigger: Trigger) -> tuple[str, ...]:
    """Names of the capabilities that a plugin requires of a trigger and that `trigger` does not offer. Raises
    KeyError for a name that is not in `TRIGGER_CAPABILITIES`; registration looks for those."""
    wanted = tuple(part.requires_trigger) if offers(part, NeedsOfTrigger) else ()
    return tuple(name for name in wanted if not offers(trigger, TRIGGER_CAPABILITIES[name]))


OTHERS = 14  # other triggers among which decoys are sought


def missing_control(trigger: Trigger, given: str) -> str | None:
    """Why a trigger has no such control trigger (harness.methods.decoys), in words; None if it has."""
    if not re.fullmatch(CONTROL, given):
        return f"no control '{given}'; there are decoy, decoy-2 .. decoy-9, opposite and zero"
    if given == "opposite" and trigger.modality != "noise":
        return f"{trigger.name} is text and has no opposite"
    others = len({trigger.wrong(i) for i in range(OTHERS)}) if trigger.modality == "text" else OTHERS
    if others < place_of(given):
        return f"{trigger.name} has {others} other triggers and therefore no {given}"
    return None


def place_of(given: str) -> int:
    """The k of the k-th decoy, counted from 1; 1 for the other controls."""
    return int(given.partition("-")[2] or 1)


def name_of(trigger: Any) -> str:
    """What a message calls a trigger: its text where it has one, else its name."""
    return trigger.text if offers(trigger, TokenTrigger) else trigger.name
