"""T2IShield. Wang, Zhang, Shan & Chen, "T2IShield: Defending Against Backdoors on Text-to-Image Diffusion Models", ECCV
2024, arXiv:2407.04215. In prompts with a trigger the cross-attention maps of all tokens come to look alike
("assimilation").

M_i is token i's map (mean over steps, heads and layers), divided by its largest value; i runs over words and EOS.

    FTT   F = mean_i ‖M_i - mean_j M_j‖_F                                    suspicious where F is small
    CDA   covariance of the tokens' maps in their 20 principal components, its logarithm (log-Euclidean metric), then a
          linear discriminant between benign and backdoored prompts          suspicious where it says so
    where a prompt is flagged, binary search: the half of the words whose image resembles the prompt's holds the trigger
    the words found are edited away: keys and values of the word become those of " " (closed form, weights of UCE)

Needs clean prompts, on which thresholds are calibrated; the published one of FTT holds for Stable Diffusion 1.4.
Returns a screen; with `mitigate` also a model. What it may learn from then are the known prompts with the trigger in
them, as a stream that was attacked, without being told which part of them is the trigger; only those that the screen
flags are searched, with a public image encoder. No model is returned where nothing is found.
BadT2I and textual inversion are known not to assimilate (Robin-WZQ/T2IShield#1): chance is to be expected there; on the
embedded model FTT sees BadT2I all the same.

Differs from the paper: its discriminant is trained on eight backdoored models of the authors' making, ours on
`surrogates` copies of the model whose text encoder is taught a random word for another prompt (Rickrolling's loss,
arXiv:2211.02408, with both terms of one weight and the gradient clipped at norm 1), since the defender has no other; it
learns from half of the prompts, the threshold comes from the other half. BackdoorDM's port of the mitigation takes from
the new value its projection on the old one; here, as in the paper, the word is replaced. Checked against
Robin-WZQ/T2IShield at b543ace and that port (read by others for our notes): theirs rounds maps to 8 bits, takes one
padding token into the mean, refits PCA for each prompt as we do, and localises at 0.8 with CLIP's or DINOv2's features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from harness.diffusion import DDIM, DiffusionModel
from harness.editing import edited, projections
from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Steps
from harness.prompts import Insertion
from harness.text_detection import MapRun, Share, benign, lengths, screened, threshold
from harness.training import draw, minimize
from harness.types import Defended, Inputs, Knowledge

FLOOR = 1e-6  # of a variance over the largest: padding tokens have all but equal maps
LETTERS = "bcdfghjklmnpqrstvwxz"
Weight = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class T2IShield(MapRun):
    name: ClassVar[str] = "t2ishield"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    method: Literal["ftt", "cda"] = "ftt"  # how prompts are told apart
    calibrate: bool = True  # FTT's threshold from clean prompts; False: the published one
    false_positives: Share = 0.05  # share of clean prompts that the calibrated threshold flags
    published: float = 2.5  # FTT flags below; 16×16 maps of Stable Diffusion 1.4
    components: Steps = 20  # of CDA's PCA; published
    surrogates: Steps = 4  # backdoored copies behind CDA's discriminant
    surrogate_steps: Steps = 100  # of each copy's text encoder; Rickrolling's
    surrogate_lr: LearningRate = 1e-4  # AdamW; Rickrolling's, small encoders need about 1e-3
    mitigate: bool = False  # localise and edit too
    likeness: float = 0.8  # cosine of image features above which a half holds the trigger; released
    search_steps: Steps = 25  # of DDIM in the search; released
    lam: Weight = 0.1  # weight of the old projection in the edit; BackdoorDM's
    erase: Weight = 0.1  # weight of the words found; BackdoorDM's
    preserve: Annotated[float, Ge(0)] = 0.1  # weight of the empty prompt; BackdoorDM's

    @property
    def needs(self) -> tuple[str, ...]:
        return ("prompts", "trigger", "encoder") if self.mitigate else ("prompts",)

    @property
    def delivers(self) -> tuple[str, ...]:
        return ("screen", "model") if self.mitigate else ("screen",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        prompts = held_out = list(knowledge.prompts or ())
        if self.method == "ftt":
            screen, notes = self.by_assimilation(model), {}
        else:  # the discriminant learns from one half, the threshold comes from the other
            half = len(prompts) // 2
            screen, notes = self.by_covariance(model, prompts[:half], rng)
            held_out = prompts[half:]
        scores = screened(screen, benign(model, held_out, rng))
        published = self.method == "ftt" and not self.calibrate
        above = -self.published if published else threshold(scores, self.false_positives)
        notes["clean_scores"] = scores.tolist()
        if not self.mitigate:
            return Defended(screen=screen, screen_above=above, notes=notes)
        trigger: Any = knowledge.trigger
        stream = benign(model, [trigger.apply(prompt) for prompt in prompts], rng)
        found = self.localised(model, stream, screened(screen, stream) > above, knowledge.encoder)
        notes["found"] = dict(found)
        word = found.most_common(1)[0][0] if found else None
        made = None if word is None else self.mitigated(model, list(found))
        return Defended(model=made, screen=screen, screen_above=above, trigger=word, notes=notes)

    # ---- detection ------------------------------------------------------------------------------------------------
    def token_maps(self, model: Any, inputs: Inputs) -> list[Tensor]:
        """For each prompt the maps (K, side, side) of its words and EOS, each with largest value 1."""
        assert inputs.prompts is not None, "t2ishield is for models that take prompts"
        runs = self.maps(model, inputs).mean(1)
        runs = runs / runs.amax((2, 3), keepdim=True).clamp_min(1e-12)
        return [maps[1:length] for maps, length in zip(runs, lengths(model, inputs.prompts), strict=True)]

    def by_assimilation(self, model: Any) -> Callable[[Inputs], Tensor]:
        return lambda inputs: torch.tensor([-assimilation(maps) for maps in self.token_maps(model, inputs)])

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
            bad = features(copy, benign(copy, [Insertion(word).apply(prompt) for prompt in some], rng))
            good = features(copy, benign(copy, some, rng))
            rows, labels = rows + good + bad, labels + [0] * len(good) + [1] * len(bad)
            losses.append(final)
        judge = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(rows, labels)
        return lambda inputs: torch.as_tensor(judge.decision_function(features(model, inputs))), {"surrogates": losses}

    def surrogate(self, model: Any, prompts: list[str], rng: torch.Generator) -> tuple[Any, str, float]:
        """A copy of `model` with a backdoor of ours (a random word in front gives another prompt's embedding), the
        word, and the final loss: cosine distances d(S(v), E(y)) + d(S(w), E(w)) of the flattened embeddings."""
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
        """How often each word was found by binary search in the flagged prompts."""
        assert stream.prompts is not None
        sampler = DDIM(steps=self.search_steps, guidance=self.guidance, bf16=self.bf16)
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
        """A copy whose keys and values of each word are those of " ", and of the empty prompt as they were."""
        copy = model.clone()
        old, new, empty = (copy.embed(texts).flatten(0, 1).double() for texts in (words, [" "] * len(words), [""]))
        e, p = self.erase**0.5, self.preserve**0.5
        k, goal = torch.cat([e * old, p * empty]), torch.cat([e * new, p * empty])
        for weight in projections(copy.denoiser):
            weight.copy_(edited(weight.double(), k, goal, self.lam))
        return copy


def assimilation(maps: Tensor) -> float:
    """FTT's F of maps (K, side, side)."""
    return (maps - maps.mean(0)).flatten(1).norm(dim=1).mean().item()


def log_covariance(maps: Tensor, components: int) -> Tensor:
    """(D,) diagonal of the logarithm of the covariance of the K tokens' maps (K, P) in their first D = min(components,
    K - 1, P) principal components. Those are uncorrelated, so nothing else of that matrix differs from 0. A variance
    counts as at least FLOOR of the largest."""
    from sklearn.decomposition import PCA

    fitted = PCA(min(components, len(maps) - 1, maps.shape[1]), svd_solver="full").fit(maps.double().numpy())
    variances = torch.tensor(fitted.explained_variance_)
    return variances.clamp_min(FLOOR * variances[0]).log()


def searched(words: list[str], image: Callable[[str], Tensor], likeness: float) -> str | None:
    """The word that alone makes an image like that of all `words`, by halves; None where neither half does.

    image: text → features (1, D)."""
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
