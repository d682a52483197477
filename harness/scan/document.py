"""The report of `bench scan` as data: what JSON, SARIF, HTML and text are made from, and its JSON Schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

FORMAT = 1
Outcome = Literal["suspicious", "nothing found", "undecided", "not scanned"]
WORST_FIRST: tuple[Outcome, ...] = ("suspicious", "not scanned", "undecided", "nothing found")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class FindingRow(_Part):
    """What one detector found in one model. It has the fields of `harness.scan.verdict.Finding`, without the trigger
    itself."""

    detector: str = Field(description="Spec of the detector.")
    suspicion: float | None = Field(description="Detection score; higher is more suspicious. null: it failed.")
    flag_above: float | None = Field(description="The detector's own threshold.")
    clean: tuple[float, ...] = Field(description="Scores of clean models; empty where none are known.")
    chance: float | None = Field(description="Probability that a clean model is at least as suspicious.")
    flagged: bool | None = Field(description="Whether the detector flags the model. null: it cannot judge.")
    features: dict[str, float | None]
    alike: float | None = Field(
        description="Pairwise distance of images with the recovered trigger, divided by that of images without it. "
        "Near 0, all images are the same."
    )
    alike_shuffled: float | None = Field(
        description="The same for the recovered pattern with its pixels at random places; null for text."
    )
    far: float | None = Field(
        description="Distance of images with the recovered trigger to the nearest image without it, divided by that of "
        "images without it to each other. Near 1, the trigger gives usual images."
    )
    seconds: float
    error: str | None = Field(description="Why the detector failed.")
    says: str = Field(description="`flagged` or `error` in words.")
    trigger_text: str | None = Field(description="The recovered trigger, if it is text.")


class FalseAlarms(_Part):
    """How often a clean model is flagged, as far as a population of clean models states it."""

    level: float = Field(description="Probability with which the compared detectors together flag a clean model.")
    compared: tuple[str, ...] = Field(description="Detectors that are compared with clean models.")
    own_threshold: tuple[str, ...] = Field(description="Detectors with an unknown rate: they have only a threshold.")
    flagged: int | None = Field(description="Clean models that are flagged if each is compared with the others.")
    models: int | None = Field(description="Clean models of the population; null: too few to leave one out.")
    interval: tuple[float, float] | None = Field(description="Wilson interval (95 %) of flagged / models.")
    says: str


class Published(_Part):
    """What is published about a model of `leaderboard/known_backdoored.toml`."""

    name: str
    attack: str
    paper: str
    source: str


class LayerChange(_Part):
    """How the tensors of one layer differ from those of the base."""

    layer: str
    tensors: int = Field(description="Tensors of the layer that differ.")
    relative: float = Field(description="Norm of the change, divided by the norm of the base's tensors.")


class MovedText(_Part):
    """How far a text moves between the base's text encoder and the model's."""

    text: str
    moved: float = Field(description="1 minus the mean cosine of the embeddings.")
    z: float = Field(description="(moved - median) / spread of all texts of its kind.")


class MovedTexts(_Part):
    """How far texts of a kind move, and those that move farthest."""

    kind: Literal["words", "look-alikes", "sentences"] = Field(
        description="Single words; letters in sentences replaced by characters that look like them; whole sentences."
    )
    count: int = Field(description="Texts that were compared.")
    of: int = Field(description="Texts that there are.")
    median: float
    spread: float = Field(description="1.4826 times the median absolute deviation, and at least 0.0001.")
    farthest: tuple[MovedText, ...]


class PartChange(_Part):
    """How one network of the model differs from that of the base."""

    part: str = Field(description="Name in the pipeline, such as text_encoder or unet.")
    compared: bool
    because: str | None = Field(description="Why it was not compared.")
    tensors: int
    changed: int = Field(description="Tensors that differ by more than rounding to half precision.")
    rounded: int = Field(description="Tensors that are equal only after rounding to half precision.")
    relative: float | None = Field(description="Norm of the change, divided by the norm of the base's tensors.")
    layers: tuple[LayerChange, ...] = Field(description="Layers with the largest relative changes.")
    layers_changed: int
    texts: tuple[MovedTexts, ...] = Field(description="Of a text encoder that differs.")


class Comparison(_Part):
    """The model beside the base that `--base` names. It changes no verdict."""

    base: str = Field(description="The path or hub id, as it was given.")
    parts: tuple[PartChange, ...]
    tokenizers: tuple[str, ...] = Field(description="Tokenizers whose tokens are not those of the base.")
    says: tuple[str, ...]


class AdapterLayer(_Part):
    """The change that an adapter makes to one layer of its base."""

    layer: str
    rank: int
    norm: float = Field(description="Frobenius norm of the change.")
    relative: float = Field(description="The same, divided by the norm of the base's layer.")
    spectral: float = Field(description="Largest singular value of the change.")
    z: float = Field(description="Robust z of the logarithm of `relative` among the adapter's layers.")


class AdapterFacts(_Part):
    """The low-rank adapter that was scanned with its base. It changes no verdict."""

    file: str
    layers: int
    parts: dict[str, int] = Field(description="Part of the pipeline → number of its layers that change.")
    ranks: tuple[int, int] = Field(description="Least and largest rank of a layer's change.")
    largest: tuple[AdapterLayer, ...] = Field(description="Layers with the largest relative changes.")
    says: tuple[str, ...]


class NearWord(_Part):
    """A word of the vocabulary near a vector."""

    word: str
    cosine: float


class EmbeddingVector(_Part):
    """One vector of an embedding beside the vocabulary of its text encoder."""

    part: str = Field(description="Name of the text encoder in the pipeline.")
    place: int = Field(description="Place among the vectors of the word, from 0.")
    norm: float
    norm_z: float = Field(description="Robust z of the norm among those of the vocabulary.")
    nearest: tuple[NearWord, ...] = Field(description="The nearest words.")
    nearest_z: float = Field(description="Robust z of the first cosine among those of words to their nearest other.")


class WordEffect(_Part):
    """How the word of an embedding moves the predictions of prompts, beside words of the vocabulary."""

    prompts: int = Field(description="Prompts before which the word was put.")
    words: int = Field(description="Words of the vocabulary that were put there too.")
    moved: float = Field(description="Norm of the mean change of the prediction.")
    moved_z: float = Field(description="Robust z of `moved` among the words.")
    kept: float = Field(description="Spread of the predictions over the prompts, divided by that without the word.")
    kept_z: float = Field(description="Robust z of `kept` among the words.")


class EmbeddingFacts(_Part):
    """The textual-inversion embedding that was scanned with its base. It changes no verdict."""

    file: str
    word: str = Field(description="What a prompt says for it.")
    vectors: tuple[EmbeddingVector, ...]
    effect: WordEffect
    says: tuple[str, ...]


class Unseen(_Part):
    """A family of backdoors that no detector asked here can see, by what the detectors state."""

    family: str
    what: str = Field(description="The family in words.")
    not_stated: tuple[str, ...] = Field(
        description="Detectors that do not state which families they see; empty: it is stated that none sees it."
    )


class Report(_Part):
    """The outcome for one model."""

    model: str = Field(description="The path or hub id, as it was given.")
    verdict: Outcome
    because: str
    exit_code: int = Field(description="The exit code of a scan of this model alone.")
    error: str | None = Field(description="Why the model was not scanned.")
    seed: int
    commit: str | None = Field(description="The commit of a model from the hub.")
    digests: dict[str, str] = Field(description="File → sha256 of each weights file that was read.")
    false_alarms: FalseAlarms | None
    findings: tuple[FindingRow, ...]
    base: Comparison | None = Field(None, description="The comparison with the base; null: no --base was given.")
    adapter: AdapterFacts | None = Field(None, description="The adapter; null: a whole model was scanned.")
    embedding: EmbeddingFacts | None = Field(None, description="The embedding; null: none was scanned.")
    unseen: tuple[Unseen, ...] = Field((), description="Families of backdoors that no detector asked here can see.")
    limits: tuple[str, ...] = Field(description="What the scan cannot know.")
    not_examined: tuple[str, ...] = Field(description="Files in the directory that were not read.")
    next_steps: tuple[str, ...]
    facts: dict[str, JsonValue]
    published: Published | None


class Scan(_Part):
    """One call of `bench scan`: a report for each model."""

    format: Literal[1] = FORMAT
    tool: Literal["bench scan"] = "bench scan"
    version: str = Field(description="Version of diffusion-defense-bench.")
    started: str = Field(description="UTC, ISO 8601.")
    ended: str = Field(description="UTC, ISO 8601.")
    seed: int
    fail_on: Literal["suspicious", "undecided"]
    exit_code: int
    reports: tuple[Report, ...]


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of what `--format json` prints, a Scan, and of what `--json` prints for one model, a
    Report."""
    made = TypeAdapter(Scan | Report).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bench scan",
        "description": "A scan of one or several models, or the report of one model.",
        **made,
    }
