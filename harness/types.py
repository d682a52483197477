"""The values that flow through a run: only data, without behaviour that touches a device, a path or a random state.

Images are (B, C, H, W) in [-1, 1] and timesteps are (B,) int64 everywhere; only `harness.diffusion.images` rescales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.diffusion.model import DiffusionModel
    from harness.methods.prompt_edits import Substitution

WRONG = 4  # near triggers (`wrong`) for the false-trigger rate
Modality = Literal["noise", "text"]
Family = Literal["vp", "ve", "flow"]
TriggerGiven = str  # "true", or a control
INERT = 0.05  # largest share of hits of an inert control trigger
CONTROL = r"decoy(-[2-9])?|opposite|zero"  # names of controls: harness.methods.decoys
Stream = Literal["evaluation", "utility"]  # of random inputs: for rates and drift, for distances to real images


@dataclass(frozen=True)
class Inputs:
    """All inputs of a generator.

    noise: (B, C, H, W) unit-variance starting noise (latent shape for latent models), before `init_noise_sigma`.
    prompts: B texts for a text-to-image model, None for an unconditional one. seeds: B integers; a stochastic sampler
    draws the step noise of image i from seeds[i] alone, so that an image does not depend on its batch.
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
    """Training data: images (N, C, H, W) in [-1, 1].

    captions: N texts if the model is text-to-image. labels: (N,) int64 if classes are known.
    """

    images: Tensor
    captions: tuple[str, ...] | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> Data:
        """The examples at `index` (K,) int64, in that order."""
        captions = None if self.captions is None else tuple(self.captions[i] for i in index.tolist())
        return Data(self.images[index], captions, None if self.labels is None else self.labels[index])


@runtime_checkable
class Trigger(Protocol):
    """What an attacker adds to the inputs of a generator. A frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    version: ClassVar[int]
    modality: ClassVar[Modality]

    def stamp(self, inputs: Inputs) -> Inputs: ...

    def wrong(self, k: int) -> Trigger:
        """The k-th of several other triggers of the same kind and size, for the controls with decoy triggers."""
        ...


@runtime_checkable
class NoiseTrigger(Trigger, Protocol):
    def delta(self, shape: Sequence[int]) -> Tensor:
        """The pattern r, (C, H, W), that is added to unit noise. ValueError if it does not fit `shape`."""
        ...


@runtime_checkable
class TextTrigger(Trigger, Protocol):
    def apply(self, prompt: str) -> str: ...


class Target(Protocol):
    """What triggered inputs should give. `kind` decides which attacks accept it ("image", "patch", ...).

    Kind "class" is any image of a class: `image` returns None, and the target is an ExamplesTarget.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[str]
    hit_threshold: ClassVar[str]  # the threshold, one of `thresholds`, that defines a hit

    def image(self, shape: Sequence[int]) -> Tensor | None:
        """The target image (C, H, W) in [-1, 1], if it is one image."""
        ...

    def region(self, images: Tensor) -> Tensor:
        """The part of images (B, C, H, W) that the target prescribes."""
        ...

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        """(B,) float, at least 0, the quantity that is compared with a threshold; smaller is closer to the target."""
        ...

    def thresholds(self, context: TargetContext) -> Mapping[str, float]:
        """Named thresholds: an image is a hit if its distance is at most the threshold."""
        ...

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        """(B,) bool, whether each image shows the target at the hit threshold."""
        ...


@dataclass(frozen=True)
class TargetContext:
    """What a target's judge may use in addition to the images.

    clean: the clean model's images for the same prompts and seeds without the trigger, (B, C, H, W); thresholds are
    calibrated on them. prompts: the prompts without the trigger. judge: the model's classifier, if it has one.
    """

    clean: Tensor
    prompts: tuple[str, ...] | None = None
    judge: Judge | None = None


@dataclass(frozen=True)
class Backdoor:
    """Ground truth of an attack. No defense has access to it."""

    trigger: Trigger
    target: Target

    def __post_init__(self) -> None:
        from harness.capabilities import TriggerDependentTarget, offers

        if offers(self.target, TriggerDependentTarget):
            object.__setattr__(self, "target", self.target.of(self.trigger))


@dataclass(frozen=True)
class Backdoored:
    """The result of an attack. An attacker's own reverse process is a registered sampler, selected by the cell."""

    model: DiffusionModel
    backdoor: Backdoor


@dataclass(frozen=True)
class Knowledge:
    """What a defender may use. The harness fills the fields that the defense's `needs` names; all others are None.

    - trigger: the trigger that the defender is given (in a control with a decoy trigger: another one).
    - data: a share of clean training data (images, captions).
    - prompts: clean prompts, disjoint from those of the evaluation.
    - clean_model: the model before the attack.
    - words: neutral words of the model's language.
    - encoder: the image encoder at hand, images (B, C, H, W) in [-1, 1] → features (B, D): the model's CLIP-like scorer
      if it has one, otherwise the public encoder that the model names, otherwise the features of its judge. The scorer
      of shapes-sd and the judge of the digits were trained for this benchmark, and they also score the defender.
    - public_encoder: efficientnet-lite0 (harness.judges.public_encoders), which scores nothing that decides whether a
      backdoor is there.
    - judge: the model's judge, which names the attributes of an image. It also scores the defender.
    """

    trigger: Trigger | None = None
    data: Data | None = None
    prompts: tuple[str, ...] | None = None
    clean_model: DiffusionModel | None = None
    words: tuple[str, ...] | None = None
    encoder: Callable[[Tensor], Tensor] | None = None
    public_encoder: PerceptualEncoder | None = None
    judge: Judge | None = None


KNOWLEDGE = ("trigger", "data", "prompts", "clean_model", "words", "encoder", "public_encoder", "judge")
PUBLIC_ENCODERS = ("efficientnet-lite0", "efficientnet-lite2")  # names of image encoders that others trained
DELIVERS = ("model", "suspicion", "screen", "sampler")


@dataclass(frozen=True)
class Defended:
    """The result of a defense. Its class names the fields in `delivers` (default: the model alone); all others are
    None.

    - model: purified model.
    - suspicion: model-level score, higher = more likely backdoored. The defense itself flags a model above
      `flag_above`.
    - features: further model-level numbers.
    - screen: Inputs → (B,) scores, higher = more suspicious; each is a function of its own input alone. The defense
      itself flags inputs above `screen_above`.
    - sampler: an inference-time sampler (a registered one), used instead of the cell's. A WrappingSampler wraps
      the cell's sampler.
    - trigger: the inverted trigger: (C, H, W), or a text that is put before a prompt, or a Substitution
      (harness.methods.prompt_edits), a text that replaces a letter.
    - notes: numbers worth keeping (curves, norms).
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

    value: in base units; NaN if it could not be measured (with the reason in `warning`), never 0, never absent. n:
    number of samples. interval: 95 %, (low, high). per_sample: values from which `value` follows.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    value: float
    n: int
    higher_is_better: bool | None
    interval: tuple[float, float] | None = None
    per_sample: tuple[float, ...] | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Doubt:
    """A reason to doubt the numbers of a record. code: which one, for code to read (`harness.runs.doubts.DoubtCode`).
    text: the same with its figures, for people to read; no code reads it."""

    code: StrEnum
    text: str


@dataclass(frozen=True)
class Adaptive:
    """The attack that knows a defense, as a plugin's hook `adaptive` declares it.

    defense: the name of the defense. attack: a spec; "" if there is none. because: one sentence that says what the
    attack exploits, or why there is none. trigger, target: specs that belong to it; "" = any that the attack accepts.
    """

    defense: str
    attack: str
    because: str
    trigger: str = ""
    target: str = ""


@dataclass(frozen=True)
class Cell:
    """One experiment, as specs with all defaults filled in.

    trigger_given: the trigger for a defense that needs one: the true one or a control (harness.methods.decoys). n:
    evaluation inputs with and without the trigger. evaluation_seed: draws the noises and prompts of all evaluation
    inputs. utility_n, utility_sampler: the number of further clean inputs on which distances to real images are
    measured, and the sampler of their images; 0 and "" where the first n serve for these too.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    model: str
    attack: str
    trigger: str
    target: str
    defense: str
    sampler: str
    seed: int
    trigger_given: TriggerGiven = "true"
    n: int = 100
    evaluation_seed: int = 0
    utility_n: int = 0
    utility_sampler: str = ""


class ImageEncoder(Protocol):
    """What turns images into features; its name is in the names of its scores."""

    @property
    def name(self) -> str: ...

    def features(self, images: Tensor) -> Tensor:
        """(B, D) features of images in [-1, 1], for Fréchet and kernel distances."""
        ...


class PerceptualEncoder(ImageEncoder, Protocol):
    """One that also compares images by their feature maps."""

    def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
        """(B,) distances, at least 0, of images (B, C, H, W) in [-1, 1] to as many others, row by row."""
        ...


class Judge(ImageEncoder, Protocol):
    """A feature extractor and classifier for the data of a model; its name is in the names of its scores."""

    def attributes(self, images: Tensor) -> Mapping[str, Tensor]:
        """For each attribute the (B,) predicted class, e.g. {"digit": ...} or {"colour": ..., "shape": ...}."""
        ...


class TextImageScorer(Protocol):
    """A CLIP-like pair of encoders; its name is in the names of its scores."""

    @property
    def name(self) -> str: ...

    def image_features(self, images: Tensor) -> Tensor: ...

    def text_features(self, prompts: Sequence[str]) -> Tensor: ...


class Model(Protocol):
    """A model plugin: the clean model, its training data, and the judges for its images."""

    name: ClassVar[str]
    version: ClassVar[int]
    modality: ClassVar[Modality]  # the part of its inputs that can carry a trigger
    conditional: ClassVar[bool]  # text-to-image

    def load(self) -> DiffusionModel: ...

    def digest(self) -> str:
        """sha256 that identifies weights and data; part of every key."""
        ...

    def data(self) -> Data: ...

    def reference(self) -> Tensor:
        """Real images (M, C, H, W) of what the clean inputs of the evaluation ask for, for distances to them."""
        ...

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...] | None: ...

    def attributes(self, prompt: str) -> Mapping[str, int]:
        """The attribute classes that a prompt asks for, in the coding of the judge; {} if it asks for none."""
        ...

    def words(self) -> tuple[str, ...]: ...

    def judge(self) -> Judge | None: ...

    def scorer(self) -> TextImageScorer | None: ...


class Sampler(Protocol):
    """An algorithm from x_T to x_0. `nfe` is its number of network evaluations per image."""

    name: ClassVar[str]

    @property
    def nfe(self) -> int: ...

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        """x_0 (B, C, H, W) in the model's own space (latents for latent models), from unit noise `inputs.noise`."""
        ...


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
    """A metric of the evidence of a cell."""

    name: ClassVar[str]
    version: ClassVar[int]

    def measure(self, evidence: Any) -> Mapping[str, Score]: ...
