"""Detects prompts with a trigger by their similar cross-attention maps, then finds the trigger and edits it away.

T2IShield. Wang, Zhang, Shan & Chen, "T2IShield: Defending Against Backdoors on Text-to-Image Diffusion Models", ECCV
2024, arXiv:2407.04215. In prompts with a trigger the cross-attention maps of all tokens become similar
("assimilation").

M_i is the map of token i (mean over steps, heads and layers), divided by its largest value. i runs over words and EOS
in FTT; in CDA, as in the official code, over every position after BOS.

    FTT   F = mean_i ‖M_i - mean_j M_j‖_F                                    suspicious where F is small
    CDA   covariance of the tokens' maps in their 20 principal components, its logarithm (log-Euclidean metric), then a
          linear discriminant between benign and backdoored prompts          suspicious where its score is large

Localisation is a binary search in a flagged prompt: the half of the words whose image resembles the image of the prompt
contains the trigger. Mitigation edits the words that were found: the keys and values of a word become those of " "
(closed form, weights of UCE).

The defense needs clean prompts, on which thresholds are calibrated. The published threshold of FTT holds for Stable
Diffusion 1.4. It returns a screen; with `mitigate` it also returns a model. For the mitigation it is given the known
prompts with the trigger in them, as an attacked stream, but not which part of them is the trigger. It searches only the
prompts that the screen flags, with an image encoder. It returns no model if it finds nothing.

BadT2I and textual inversion are known not to assimilate (Robin-WZQ/T2IShield#1), so detection at chance level is to be
expected there. On the embedded model FTT nevertheless detects BadT2I.

Differs from the paper: the paper trains its discriminant on eight backdoored models of the authors. A defender has no
such models; here it is trained on `surrogates` copies of the model with a backdoor in the text encoder. Checked against
Robin-WZQ/T2IShield at b543ace and BackdoorDM's port (known from notes, not read). The surrogates and the differences
from both codes: docs/methods/t2ishield.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from harness import (
    Defended,
    DiffusionModel,
    Inputs,
    Insertion,
    Knowledge,
    LearningRate,
    MapRun,
    PositiveInt,
    Share,
    draw,
    hookimpl,
    image_encoders,
    minimize,
    prompt_screening,
    usual,
    weight_edits,
)

FLOOR = 1e-6  # smallest variance relative to the largest one: padding tokens have almost equal maps
LETTERS = "bcdfghjklmnpqrstvwxz"
Weight = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class T2IShield(MapRun):
    name: ClassVar[str] = "t2ishield"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    method: Literal["ftt", "cda"] = "ftt"  # how benign and backdoored prompts are separated
    calibrate: bool = True  # calibrate FTT's threshold on clean prompts; False = use the published one
    false_positives: Share = 0.05  # share of clean prompts that the calibrated threshold flags
    published: float = 2.5  # FTT flags values of F below this; for 16×16 maps of Stable Diffusion 1.4
    components: PositiveInt = 20  # components of CDA's PCA; published value
    surrogates: PositiveInt = 4  # backdoored copies on which CDA's discriminant is trained
    surrogate_steps: PositiveInt = 100  # training steps of the text encoder of each copy; Rickrolling's value
    surrogate_lr: LearningRate = 1e-4  # AdamW; Rickrolling's value, small encoders need about 1e-3
    mitigate: bool = False  # also localise the trigger and edit the model
    likeness: float = 0.8  # cosine of image features above which a half contains the trigger; released value
    search_steps: PositiveInt = 25  # DDIM steps in the search; released value
    lam: Weight = 0.1  # weight of the old projection in the edit; BackdoorDM's value
    erase: Weight = 0.1  # weight of the words found; BackdoorDM's value
    preserve: Annotated[float, Ge(0)] = 0.1  # weight of the empty prompt; BackdoorDM's value
    encoder: image_encoders.Choice = "given"  # of the search: the model's scorer (CLIP, for which `likeness` holds;
    # shapes-clip for shapes-sd, which also scores the defender), or efficientnet-lite0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("prompts", "trigger", image_encoders.NEEDED[self.encoder]) if self.mitigate else ("prompts",)

    @property
    def delivers(self) -> tuple[str, ...]:
        return ("screen", "model") if self.mitigate else ("screen",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        prompts = held_out = list(knowledge.prompts or ())
        if self.method == "ftt":
            screen, notes = self.by_assimilation(model), {}
        else:  # the discriminant is trained on one half, the threshold is calibrated on the other
            half = len(prompts) // 2
            screen, notes = self.by_covariance(model, prompts[:half], rng)
            held_out = prompts[half:]
        scores = prompt_screening.screened(screen, prompt_screening.benign(model, held_out, rng))
        published = self.method == "ftt" and not self.calibrate
        above = -self.published if published else prompt_screening.threshold(scores, self.false_positives)
        notes["clean_scores"] = scores.tolist()
        if not self.mitigate:
            return Defended(screen=screen, screen_above=above, notes=notes)
        trigger: Any = knowledge.trigger
        encoder = image_encoders.chosen(knowledge, self.encoder)
        stream = prompt_screening.benign(model, [trigger.apply(prompt) for prompt in prompts], rng)
        found = self.localised(model, stream, prompt_screening.screened(screen, stream) > above, encoder)
        notes["found"] = dict(found)
        word = found.most_common(1)[0][0] if found else None
        made = None if word is None else self.mitigated(model, list(found))
        return Defended(model=made, screen=screen, screen_above=above, trigger=word, notes=notes)

    # ---- detection ------------------------------------------------------------------------------------------------
    def token_maps(self, model: Any, inputs: Inputs) -> list[Tensor]:
        """The maps (K, side, side) of the words and EOS of each prompt, each with largest value 1."""
        assert inputs.prompts is not None, "t2ishield is for models that take prompts"
        runs = self.maps(model, inputs).mean(1)
        runs = runs / runs.amax((2, 3), keepdim=True).clamp_min(1e-12)
        return [
            maps[1:length] for maps, length in zip(runs, prompt_screening.lengths(model, inputs.prompts), strict=True)
        ]

    def by_assimilation(self, model: Any) -> Callable[[Inputs], Tensor]:
        return lambda inputs: torch.tensor(
            [-prompt_screening.assimilation(maps) for maps in self.token_maps(model, inputs)]
        )

    def by_covariance(
        self, model: Any, prompts: list[str], rng: torch.Generator
    ) -> tuple[Callable[[Inputs], Tensor], dict[str, Any]]:
        """CDA's screen: the discriminant's score."""
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        def features(of: DiffusionModel, inputs: Inputs) -> list[list[float]]:
            runs = self.maps(of, inputs).mean(1)[:, 1:].flatten(2)
            runs = runs / runs.amax(2, keepdim=True).clamp_min(1e-12)
            return [log_covariance(maps, self.components).tolist() for maps in runs]

        rows, labels, losses = [], [], []
        share = max(4, len(prompts) // self.surrogates)
        for k in range(self.surrogates):
            some = [prompts[(k * share + i) % len(prompts)] for i in range(share)]
            copy, word, final = self.surrogate(model, prompts, rng)
            bad = features(copy, prompt_screening.benign(copy, [Insertion(word).apply(prompt) for prompt in some], rng))
            good = features(copy, prompt_screening.benign(copy, some, rng))
            rows, labels = rows + good + bad, labels + [0] * len(good) + [1] * len(bad)
            losses.append(final)
        judge = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(rows, labels)
        return lambda inputs: torch.as_tensor(judge.decision_function(features(model, inputs))), {"surrogates": losses}

    def surrogate(self, model: Any, prompts: list[str], rng: torch.Generator) -> tuple[Any, str, float]:
        """A copy of `model` with a backdoor of ours, its trigger word, and the final loss.

        A random word in front of a prompt gives the embedding of another prompt. The loss is the sum of the cosine
        distances d(S(v), E(y)) + d(S(w), E(w)) of the flattened embeddings.
        """
        copy = model.clone()
        word = "".join(LETTERS[i] for i in torch.randint(0, len(LETTERS), (3,), generator=rng).tolist())
        target = prompts[int(torch.randint(0, len(prompts), (), generator=rng))]
        with torch.no_grad():
            goal = model.embed([target]).flatten(1)

        def loss() -> Tensor:
            some = [prompts[i] for i in draw(32, len(prompts), rng).tolist()]
            with torch.no_grad():
                kept = model.embed(some).flatten(1)
            bad = copy.embed([Insertion(word).apply(prompt) for prompt in some]).flatten(1)
            alike = torch.nn.functional.cosine_similarity
            return 2 - alike(bad, goal, dim=1).mean() - alike(copy.embed(some).flatten(1), kept, dim=1).mean()

        losses = minimize(
            loss, copy.text_encoder.parameters(), steps=self.surrogate_steps, lr=self.surrogate_lr, phase="surrogate"
        )
        return copy, word, losses[-1]

    # ---- localisation and mitigation ------------------------------------------------------------------------------
    def localised(self, model: Any, stream: Inputs, flagged: Tensor, encoder: Any) -> Counter[str]:
        """How often the binary search found each word in the flagged prompts."""
        assert stream.prompts is not None
        sampler = usual(model, self.search_steps, guidance=self.guidance, bf16=self.bf16)
        found: Counter[str] = Counter()
        for i in flagged.nonzero().flatten().tolist():
            row = stream[i : i + 1]

            def image(text: str, row: Inputs = row) -> Tensor:
                return encoder(model.sample(row.with_prompts([text]), sampler))

            word = searched(stream.prompts[i].split(" "), image, self.likeness)
            found.update([] if word is None else [word])
        return found

    @torch.no_grad()
    def mitigated(self, model: Any, words: list[str]) -> Any:
        """A copy in which the keys and values of each word are those of " ", and those of the empty prompt are
        preserved.
        """
        copy = model.clone()
        old, new, empty = (copy.embed(texts).flatten(0, 1).double() for texts in (words, [" "] * len(words), [""]))
        e, p = self.erase**0.5, self.preserve**0.5
        k, goal = torch.cat([e * old, p * empty]), torch.cat([e * new, p * empty])
        for weight in weight_edits.projections(copy.denoiser):
            weight.copy_(weight_edits.edited(weight.double(), k, goal, self.lam))
        return copy


def log_covariance(maps: Tensor, components: int) -> Tensor:
    """(D,) diagonal of the logarithm of the covariance of the K tokens' maps (K, P) in their first D principal
    components.

    D = min(components, K - 1, P). The components are uncorrelated, so all other elements of that matrix are 0.
    Variances are at least FLOOR times the largest one.
    """
    from sklearn.decomposition import PCA

    fitted = PCA(min(components, len(maps) - 1, maps.shape[1]), svd_solver="full").fit(maps.double().numpy())
    variances = torch.tensor(fitted.explained_variance_)
    return variances.clamp_min(FLOOR * variances[0]).log()


def searched(words: list[str], image: Callable[[str], Tensor], likeness: float) -> str | None:
    """The word that alone makes an image like that of all `words`, found by bisection; None if neither half does.

    image: text → features (1, D).
    """
    whole = image(" ".join(words))

    def resembles(half: list[str]) -> bool:
        return torch.nn.functional.cosine_similarity(image(" ".join(half)), whole).item() > likeness

    while len(words) > 1:
        middle = len(words) // 2
        halves = (words[:middle], words[middle:])
        kept = next((half for half in halves if resembles(half)), None)
        if kept is None:
            return None
        words = kept
    return words[0]


@hookimpl
def defenses() -> list[type]:
    return [T2IShield]
