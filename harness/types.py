"""The values that flow through a run: data only, no behaviour that touches a device, a path or a random state.

Images are (B, C, H, W) in [-1, 1] and timesteps (B,) int64 everywhere; only `harness.images` rescales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.diffusion import DiffusionModel
    from harness.prompts import Substitution

WRONG = 4  # wrong triggers behind the false-trigger rate; defenses are told the first
Stamps = Literal["noise", "text"]
Told = Literal["truth", "wrong-trigger"]


@dataclass(frozen=True)
class Inputs:
    """All that a generator is given.

    noise: (B, C, H, W) unit-variance starting noise (latent shape for latent models), before `init_noise_sigma`.
    prompts: B texts for a text-to-image model, None for an unconditional one.
    seeds: B integers; a stochastic sampler draws image i's step noise from seeds[i] alone, so that an image does not
        depend on its batch.
    """

    noise: Tensor
    prompts: tuple[str, ...] | None
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> Inputs:
        prompts = None if self.prompts is None else self.prompts[rows]
        return Inputs(self.noise[rows], prompts, self.seeds[rows])

    def pick(self, index: Sequence[int]) -> Inputs:
        """The rows at `index`, in that order."""
        prompts = None if self.prompts is None else tuple(self.prompts[i] for i in index)
        return Inputs(self.noise[list(index)], prompts, tuple(self.seeds[i] for i in index))

    def with_noise(self, noise: Tensor) -> Inputs:
        return replace(self, noise=noise)

    def with_prompts(self, prompts: Sequence[str]) -> Inputs:
        return replace(self, prompts=tuple(prompts))


@dataclass(frozen=True)
class Data:
    """Training data: images (N, C, H, W) in [-1, 1]; captions (N texts) where the model is text-to-image;
    labels (N,) int64 where classes are known."""

    images: Tensor
    captions: tuple[str, ...] | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> Data:
        """The examples at `index` (K,) int64, in that order."""
        captions = None if self.captions is None else tuple(self.captions[i] for i in index.tolist())
        return Data(self.images[index], captions, None if self.labels is None else self.labels[index])


class Trigger(Protocol):
    """What an attacker stamps on a generator's inputs. A frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    version: ClassVar[int]
    stamps: ClassVar[Stamps]

    def stamp(self, inputs: Inputs) -> Inputs: ...

    def wrong(self, k: int) -> Trigger:
        """The k-th of several other triggers of the same kind and size, for the wrong-trigger controls."""
        ...


class NoiseTrigger(Trigger, Protocol):
    def delta(self, shape: Sequence[int]) -> Tensor:
        """The pattern r, (C, H, W), that is added to unit noise. ValueError if it does not fit `shape`.

        One that also scales the noise declares `biased_noise = True` and has `scale(shape)`: see harness.stamping.
        """
        ...


class TextTrigger(Trigger, Protocol):
    def apply(self, prompt: str) -> str: ...


class Target(Protocol):
    """What triggered inputs should give. `kind` says which attacks can be asked for it ("image", "patch", ...).

    Kind "class" is any image of a class: `image` gives None and `examples(data, rng)` gives some, (N, C, H, W). A
    target that depends on the trigger has `of(trigger)`, which a Backdoor calls: the target for that trigger.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[str]
    gate: ClassVar[str]  # the threshold, one of `thresholds`, that decides a hit

    def image(self, shape: Sequence[int]) -> Tensor | None:
        """The target picture (C, H, W) in [-1, 1], where it is one picture."""
        ...

    def region(self, images: Tensor) -> Tensor:
        """The part of images (B, C, H, W) that the target prescribes."""
        ...

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        """(B,) float, the quantity that is compared with a threshold: smaller is closer to the target."""
        ...

    def thresholds(self, context: TargetContext) -> Mapping[str, float]:
        """Named thresholds: an image hits where its distance is at most that."""
        ...

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        """(B,) bool, whether each image shows the target at the gate threshold."""
        ...


@dataclass(frozen=True)
class TargetContext:
    """What a target's judge may look at besides the images.

    clean: the clean model's images for the same prompts and seeds without the trigger, (B, C, H, W); thresholds are
        calibrated on them.
    prompts: the prompts before stamping. judge: the model's classifier, where it has one.
    """

    clean: Tensor
    prompts: tuple[str, ...] | None = None
    judge: Judge | None = None


@dataclass(frozen=True)
class Backdoor:
    """Ground truth of an attack. No defense has a route to it."""

    trigger: Trigger
    target: Target

    def __post_init__(self) -> None:
        of = getattr(self.target, "of", None)
        if of is not None:
            object.__setattr__(self, "target", of(self.trigger))


@dataclass(frozen=True)
class Backdoored:
    """What an attack returns. A reverse process of the attacker's own is a registered sampler, chosen by the cell."""

    model: DiffusionModel
    backdoor: Backdoor


@dataclass(frozen=True)
class Knowledge:
    """What a defender may use. The harness fills what the defense's `needs` names; everything else stays None.

    trigger: the trigger the defender was told (in a wrong-trigger control: another one).
    data: a share of clean training data (images, captions).
    prompts: clean prompts, disjoint from those of the evaluation.
    clean_model: the model before the attack.
    words: neutral words of the model's language.
    encoder: a public image encoder, images (B, C, H, W) in [-1, 1] → features (B, D): the model's CLIP-like scorer
        where it has one, else its judge's features.
    """

    trigger: Trigger | None = None
    data: Data | None = None
    prompts: tuple[str, ...] | None = None
    clean_model: DiffusionModel | None = None
    words: tuple[str, ...] | None = None
    encoder: Callable[[Tensor], Tensor] | None = None


KNOWLEDGE = ("trigger", "data", "prompts", "clean_model", "words", "encoder")
DELIVERS = ("model", "suspicion", "screen", "sampler")


SETS = (
    "backdoored/found",
)  # image sets beyond every cell's own, sampled where a metric declares in `sets` to read them


def extra_sets(metric: Any) -> tuple[str, ...]:
    """The image sets beyond every cell's own that a metric reads. Raises ValueError for one that there is not."""
    wanted = tuple(getattr(metric, "sets", ()))
    for name in wanted:
        if name not in SETS:
            raise ValueError(f"metric '{metric.name}' reads the images {name!r}; there are {', '.join(SETS)}")
    return wanted


def delivers(defense: Any) -> tuple[str, ...]:
    """What a defense declares to deliver; one that declares nothing purifies a model."""
    return tuple(getattr(defense, "delivers", ("model",)))


@dataclass(frozen=True)
class Defended:
    """What a defense delivers; the rest stays None. Its class names these in `delivers` (default: the model alone).

    model: purified model. suspicion: model-level score, higher = more likely backdoored; the defense itself flags a
    model above `flag_above`. features: further model-level numbers. screen: Inputs → (B,) scores, higher = more
    suspicious, each a function of its own input alone; the defense itself flags inputs above `screen_above`. sampler:
    an inference-time sampler (a registered one), used instead of the cell's; one that has `around(inner)` wraps the
    cell's. trigger: the inverted trigger, (C, H, W), the text found, to be put before a prompt, or a Substitution
    (harness.prompts), a text found in the place of a letter. notes: numbers worth keeping (curves, norms).
    """

    model: DiffusionModel | None = None
    suspicion: float | None = None
    flag_above: float | None = None
    features: Mapping[str, float] | None = None
    screen: Callable[[Inputs], Tensor] | None = None
    screen_above: float | None = None
    sampler: Any | None = None
    trigger: Tensor | str | Substitution | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One measured number.

    value: in base units; NaN where it could not be measured (with `warning` saying why), never 0, never absent.
    n: number of samples behind it. interval: 95 %, (low, high). per_sample: values from which `value` follows.
    """

    value: float
    n: int
    higher_is_better: bool | None
    interval: tuple[float, float] | None = None
    per_sample: tuple[float, ...] | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Cell:
    """One experiment, as specs with all defaults filled in."""

    model: str
    attack: str
    trigger: str
    target: str
    defense: str
    sampler: str
    seed: int
    told: Told = "truth"
    n: int = 100


@dataclass(frozen=True)
class Record:
    """The outcome of a cell: plain JSON values only."""

    key: str
    cell: Cell
    scores: Mapping[str, Score]
    warnings: tuple[str, ...] = ()
    error: str | None = None
    attempts: tuple[Mapping[str, Any], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    knowledge: tuple[str, ...] = ()


class Judge(Protocol):
    """A feature extractor and classifier that belongs to a model's data, named for itself in every column."""

    @property
    def name(self) -> str: ...

    def features(self, images: Tensor) -> Tensor:
        """(B, D) features of images in [-1, 1], for Fréchet and kernel distances."""
        ...

    def attributes(self, images: Tensor) -> Mapping[str, Tensor]:
        """For each attribute the (B,) predicted class, e.g. {"digit": ...} or {"colour": ..., "shape": ...}."""
        ...


class TextImageScorer(Protocol):
    """A CLIP-like pair of encoders, named for itself."""

    @property
    def name(self) -> str: ...

    def image_features(self, images: Tensor) -> Tensor: ...

    def text_features(self, prompts: Sequence[str]) -> Tensor: ...


class Model(Protocol):
    """A model plugin: the clean model, the data it was made from and the judges that fit it."""

    name: ClassVar[str]
    version: ClassVar[int]
    stamps: ClassVar[Stamps]  # where its inputs can carry a trigger
    conditional: ClassVar[bool]  # text-to-image

    def load(self) -> DiffusionModel: ...

    def digest(self) -> str:
        """sha256 that identifies weights and data; part of every key."""
        ...

    def data(self) -> Data: ...

    def reference(self) -> Tensor:
        """Real images (M, C, H, W) of what the evaluation's clean inputs ask for, for distances to them."""
        ...

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...] | None: ...

    def attributes(self, prompt: str) -> Mapping[str, int]:
        """The attribute classes that a prompt asks for, in the judge's coding; {} where it asks for none."""
        ...

    def words(self) -> tuple[str, ...]: ...

    def judge(self) -> Judge | None: ...

    def scorer(self) -> TextImageScorer | None: ...


class Attack(Protocol):
    name: ClassVar[str]
    version: ClassVar[int]
    accepts_triggers: ClassVar[tuple[str, ...]]
    accepts_targets: ClassVar[tuple[str, ...]]

    def implant(self, model: DiffusionModel, backdoor: Backdoor, data: Data, rng: torch.Generator) -> Backdoored: ...


class Defense(Protocol):
    name: ClassVar[str]
    version: ClassVar[int]
    accepts_triggers: ClassVar[tuple[str, ...]]

    @property
    def needs(self) -> tuple[str, ...]: ...

    def defend(self, model: DiffusionModel, knowledge: Knowledge, rng: torch.Generator) -> Defended: ...


class Metric(Protocol):
    """One that also declares `sets = ("backdoored/found",)` reads image sets that are sampled for it alone, and is part
    of a suite only where the suite names it."""

    name: ClassVar[str]
    version: ClassVar[int]

    def measure(self, evidence: Any) -> Mapping[str, Score]: ...
