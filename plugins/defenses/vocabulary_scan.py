"""Finds an unknown text trigger by testing every word of the tokenizer; a detector of our own.

A trigger changes the denoiser's prediction in the same way for every prompt. The scan has three rounds:

    1. every candidate v:    score(v) = ‖ mean over rows of ε(z, t, τ(v+p)) - ε(z, t, τ(p)) ‖
    2. the best of them, and ordered pairs of the very best, again with more rows
    3. the best of those, single words and pairs, by images of p and v+p from the same noise: AUROC of separating the
       two by pixels, by colours or by the encoder's features, whichever is largest; each prompt is judged by a linear
       discriminant that was fitted on the others

z are states of the model's own denoising of p at medium t, where a colour or a corner can still change. The mean keeps
what all rows share, so a word that only disturbs the prediction has a low score. Candidates are all tokens that can be
typed as a word (decoding and tokenising again gives the same token), put in front of the prompt, and look-alikes of
Latin letters, put in the place of a letter. Words that clean captions use are left out unless they are known to be
neutral. They are supposed to change the image, and no scan can distinguish "negative" from a trigger.

The candidates of the first round take at most `budget` network evaluations. If there are more candidates than that
allows, as in CLIP's vocabulary, or if `keep` is below 1, tokens are searched by clusters of their embeddings in the
first text encoder, coarse to fine, by the rules of harness.methods.coarse_to_fine; a rough score has `rough_rows` rows,
those of the middle t. Look-alikes are all judged.

A trigger that replaces an object gives prompts that ask for the new object anyway the images that they have without it.
The AUROC over all prompts then stays below 1 however well the trigger works. With `without_a_word`, round 3 also
separates the images by the encoder's features on the prompts that lack a word, for each word of a quarter to a half of
the prompts. Pairs are judged by all prompts alone: on a harmless adapter, two pairs of neutral words had an AUROC above
0.9 on such a part of the prompts.

The detector needs clean prompts, captions of clean data (their images are not used), neutral words and an image
encoder. It returns the suspicion, which is the largest AUROC of round 3, and the trigger if the suspicion is above
`flag_above`. Of several triggers it returns the strongest of round 2; of a pair it returns one word if that word alone
is above `flag_above` too. With `purify` it also returns the model that SKD-CAG (arXiv:2508.18235) makes when it is
given the found trigger, with the same random draws as `skd-cag` under that seed, or no model if no trigger was found.

The scan cannot find triggers that work only at another position in the prompt, triggers of more than two tokens, and
triggers that are ordinary content words. If the captions do not cover the vocabulary, it also flags ordinary nouns that
they lack. Differs from soft-prompt inversion: the result is text that can be typed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness import (
    LOOK_ALIKES,
    Defended,
    Fraction,
    Goal,
    GuidedDistillation,
    Inputs,
    Insertion,
    Knowledge,
    LearningRate,
    PositiveInt,
    Substitution,
    coarse_to_fine,
    distillation,
    generator,
    hookimpl,
    image_encoders,
    image_noise,
    image_seeds,
    kept_scores,
    progress,
    prompt_edits,
    usual,
)

Candidate = Insertion | Substitution
States = tuple[list[str], Tensor, Tensor]  # N prompts, z (N, C, H, W), t (N,)
FORWARD = 256  # rows of one forward pass
PLACES = 2**18  # of the noise, height times width, in one forward pass
FOLDS = 4  # of the prompts that the third round's discriminants are fitted on and judge
FLAT = 1e-4  # variance below which all colours count as one colour


@dataclass(frozen=True)
class VocabularyScan:
    name: ClassVar[str] = "vocabulary-scan"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    sees: ClassVar[tuple[str, ...]] = ("prompt-denoiser", "prompt-encoder", "adapter")

    rows: PositiveInt = 8  # prompts per score in the first round
    budget: Annotated[int, Ge(1000)] = 40_000  # network evaluations of the first round's candidates at most
    finalists: PositiveInt = 24  # candidates in the second round
    final_rows: PositiveInt = 32  # prompts per score in the second round
    pair_up: Annotated[int, Ge(0)] = 4  # number of best tokens whose ordered pairs join the second round
    from_t: Fraction = 0.35  # smallest t over T at which predictions are compared
    to_t: Fraction = 0.8  # largest t over T at which predictions are compared
    look_alikes: bool = True  # also test look-alikes in the place of letters
    rough_rows: PositiveInt = 1  # prompts per rough score, see `keep`
    keep: Annotated[float, Gt(0), Le(1)] = 1.0  # share of the words that get a score of `rows` prompts: below 1, the
    # best by a rough score. If the budget is too small for all, rough scores come first anyway
    verified: PositiveInt = 4  # single candidates in the third round, and half as many pairs
    images: Annotated[int, Ge(8)] = 64  # prompts from which the third round makes images, with and without the
    # candidate
    without_a_word: bool = False  # also judge single candidates by the prompts that lack a word, for each word of a
    # quarter to a half of them: a trigger that replaces an object changes little where the prompt asks for the new one
    sampling_steps: Annotated[int, Ge(4)] = 10  # steps of DDIM, for those images and for the states z
    guidance: Annotated[float, Gt(0)] = 3.0  # guidance scale for both
    flag_above: Fraction = 0.9  # AUROC above which a candidate is called a trigger
    purify: bool = False  # also return the model that SKD-CAG makes with the trigger found
    target: Goal = "gaussian"  # target map of SKD-CAG, see skd-cag; random_words is not available
    alpha: Fraction = 0.5  # of SKD-CAG, see skd-cag
    steps: PositiveInt = 7500  # optimizer steps of SKD-CAG
    batch: PositiveInt = 1  # prompts per step of SKD-CAG
    lr: LearningRate = 1e-6  # of SKD-CAG, see skd-cag
    bf16: bool = True  # autocast of the forward passes
    encoder: image_encoders.Choice = "given"  # the model's scorer (CLIP; shapes-clip for shapes-sd, which also scores
    # the defender), or efficientnet-lite0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("prompts", "data", "words", image_encoders.NEEDED[self.encoder])

    @property
    def delivers(self) -> tuple[str, ...]:
        return ("suspicion", "model") if self.purify else ("suspicion",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        prompts, data = list(knowledge.prompts or ()), knowledge.data
        encoder = image_encoders.chosen(knowledge, self.encoder)
        assert data is not None, "vocabulary-scan needs captions"
        tried = candidates(model, _content(knowledge), self.look_alikes)
        states = self.states(model, prompts, rng)
        kept = kept_scores.of(model, lambda: self.about(model, prompts, tried, encoder, rng))
        judged, first = self.first(model, tried, states, rng, kept)
        best = _best(judged, first.scores, self.finalists)
        best += pairs([c for c in best if isinstance(c, Insertion)][: self.pair_up])
        second = self.score(model, best, states, range(self.final_rows), kept)
        areas = self.verify(model, self.last(best, second), prompts, encoder, rng, kept)
        found = self.shortest(areas)
        if found is not None and " " in found.text:
            words: list[Candidate] = [Insertion(word) for word in found.text.split(" ")]
            areas |= self.verify(model, [c for c in words if c not in areas], prompts, encoder, rng, kept)
        top = max(areas, key=lambda c: areas[c])
        found = self.shortest(areas)
        purified = self.purified(model, prompts, found, rng) if self.purify and found is not None else None
        notes = {
            "candidates": len(tried),
            "judged": first.judged,
            "evaluations": first.evaluations,
            "median_score": first.scores.median().item(),
            "verified": [{"text": c.text, "kind": type(c).__name__.lower(), "auroc": areas[c]} for c in areas],
        }
        return Defended(
            model=purified, suspicion=areas[top], flag_above=self.flag_above,
            trigger=found.text if isinstance(found, Insertion) else found, notes=notes,
        )  # fmt: skip

    @torch.no_grad()
    def about(
        self, model: Any, prompts: Sequence[str], tried: Sequence[Candidate], encoder: Any, rng: Any
    ) -> dict[str, Any]:
        """What decides a score of the scan, beside the model; the encoder by its features of one pattern."""
        shape = model.decode(torch.zeros(1, *model.shape, device=model.device)).shape
        pattern = torch.linspace(-1, 1, shape.numel(), device=model.device).view(shape)
        features = encoder(pattern).double().flatten()
        return {
            "method": self.name, "settings": asdict(self), "seed": rng.initial_seed(), "prompts": list(prompts),
            "candidates": [_name(c) for c in tried], "encoder": [f"{v:.3g}" for v in features[:16].tolist()],
        }  # fmt: skip

    def first(
        self, model: Any, tried: Sequence[Candidate], states: States, rng: Any, kept: Any
    ) -> tuple[Sequence[Candidate], coarse_to_fine.Outcome]:
        """(candidates, the outcome of the first round for them): all of `tried` if the budget and `keep` allow,
        otherwise those that the search by clusters judged wholly."""
        rows = range(min(self.rows, len(states[0])))
        whole = len(rows) * len(tried)
        if whole <= self.budget and self.keep == 1:
            every = list(range(len(tried)))
            found = self.score(model, tried, states, rows, kept)
            return tried, coarse_to_fine.Outcome(every, found, len(tried), whole)
        others = [c for c in tried if not isinstance(c, Insertion)]
        words = [c for c in tried if isinstance(c, Insertion)]
        tokens = prompt_edits.typable(model.tokenizer)
        weight = model.text_encoder.get_input_embeddings().weight.detach()
        vectors = weight[torch.tensor([tokens[c.text] for c in words], device=weight.device)]
        few = min(self.rough_rows, len(rows))
        start = (len(rows) - few + 1) // 2
        middle = sorted(rows, key=lambda i: states[2][i].item())[start : start + few]

        def score(places: list[int], fully: bool) -> Tensor:
            return self.score(model, [words[i] for i in places], states, rows if fully else middle, kept)

        spent = len(rows) * len(others)
        if self.budget - spent < coarse_to_fine.least(len(rows), few):
            raise ValueError(
                f"a budget of {self.budget} evaluations is too small: look-alikes alone take {spent}; give a larger "
                "budget, fewer rows, or look_alikes=False"
            )
        clusters = generator(rng.initial_seed(), "clusters")
        budget = min(self.budget - spent, coarse_to_fine.enough(len(words), len(rows), few, self.keep))
        found = coarse_to_fine.searched(vectors, score, len(rows), budget, clusters, few)
        scores = torch.cat([found.scores, self.score(model, others, states, rows, kept)])
        return [*(words[i] for i in found.best), *others], coarse_to_fine.Outcome(
            found.best, scores, found.judged + len(others), found.evaluations + spent
        )

    def evaluations(self, model: Any, knowledge: Knowledge) -> int:
        """Network evaluations at most, with a pair among what is verified and without a purification."""
        prompts, most = len(knowledge.prompts or ()), max(self.rows, self.final_rows)
        rows, final = min(self.rows, prompts), min(self.final_rows, prompts)
        tried = candidates(model, _content(knowledge), self.look_alikes)
        words = sum(isinstance(c, Insertion) for c in tried)
        first = rows * len(tried)
        if self.keep < 1:
            enough = coarse_to_fine.enough(words, rows, min(self.rough_rows, rows), self.keep)
            first = rows * (len(tried) - words) + enough
        sampler = usual(model, self.sampling_steps, guidance=self.guidance, bf16=self.bf16)
        of_an_image = sampler.nfe * (1 if model.packed or self.guidance == 1 else 2)
        pairs_tried = self.pair_up * (self.pair_up - 1)
        search = min(self.budget, first) + final * (self.finalists + pairs_tried)
        plain = 2 * rows + final + 2 * min(self.rough_rows, rows)  # of the prompts as they are
        verified = self.verified + self.verified // 2 + (2 + 1 if pairs_tried else 0)
        images = min(prompts, most) + (1 + verified) * min(self.images, prompts)
        return search + plain + of_an_image * images

    def last(self, tried: list[Candidate], scores: Tensor) -> list[Candidate]:
        """The candidates of the third round: the best single ones and half as many of the best pairs."""
        ranked = _best(tried, scores, len(tried))
        double = [c for c in ranked if " " in c.text]
        return [c for c in ranked if " " not in c.text][: self.verified] + double[: self.verified // 2]

    def shortest(self, areas: Mapping[Candidate, float]) -> Candidate | None:
        """The candidate above `flag_above` with the fewest words; of several, the best of the second round (the first
        in `areas`).

        A word that resembles a trigger may activate the backdoor too, but it changes the prediction less.
        """
        above = [c for c in areas if areas[c] > self.flag_above]
        return min(above, key=lambda c: c.text.count(" "), default=None)

    def states(self, model: Any, prompts: list[str], rng: Any) -> States:
        """(prompts, z, t): for `final_rows` of the prompts one state each of their denoising, with the steps in turn.

        Raises ValueError if no step lies between `from_t` and `to_t`.
        """
        picks = torch.randperm(len(prompts), generator=rng)[: max(self.rows, self.final_rows)].tolist()
        texts = [prompts[i] for i in picks]
        seeds = image_seeds(rng.initial_seed(), "states", len(texts))
        inputs = Inputs(image_noise(seeds, model.shape).to(model.device), tuple(texts), seeds)
        times, states = distillation.trajectory(model, inputs, self.sampling_steps, self.guidance)
        middling = [i for i, t in enumerate(times.tolist()) if self.from_t * model.T <= t <= self.to_t * model.T]
        if not middling:
            raise ValueError(f"none of {self.sampling_steps} steps is between from_t and to_t; use more steps")
        step = torch.tensor([middling[i % len(middling)] for i in range(len(texts))])
        return texts, states[step, torch.arange(len(texts))], times[step].to(model.device)

    @torch.no_grad()
    def score(self, model: Any, tried: Sequence[Candidate], states: States, rows: Sequence[int], kept: Any) -> Tensor:
        """(len(tried),): norm of the mean change of the prediction over some rows of the states, those of `rows` that
        there are. Those in `kept` are not judged again."""
        rows = [i for i in rows if i < len(states[0])]
        texts, z, t = [states[0][i] for i in rows], states[1][rows], states[2][rows]
        at_once = min(FORWARD, PLACES // (z.shape[-2] * z.shape[-1]))
        group, names = max(1, at_once // len(texts)), [f"{rows[0]}+{len(rows)} {_name(c)}" for c in tried]
        left = [i for i, name in enumerate(names) if kept.find(name) is None]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            plain = model.eps(z, t, model.embed(texts)) if left else z
            for start in range(0, len(left), group):
                part = left[start : start + group]
                context = model.embed([tried[i].apply(text) for i in part for text in texts])
                moved = model.eps(z.repeat(len(part), 1, 1, 1), t.repeat(len(part)), context)
                change = moved.unflatten(0, (len(part), len(texts))) - plain
                found = change.mean(1).flatten(1).norm(dim=1).float().tolist()
                kept.add({names[i]: value for i, value in zip(part, found, strict=True)})
                progress("scan", min(start + group, len(left)), len(left))
        return torch.tensor([kept.find(name) for name in names])

    def verify(
        self, model: Any, tried: Sequence[Candidate], prompts: list[str], encoder: Any, rng: Any, kept: Any
    ) -> dict[Candidate, float]:
        """How well images with each candidate can be separated from images without it.

        The value is the largest AUROC of those by pixels, by colours and by the encoder, and with `without_a_word`, if
        the candidate is no pair, of those by the encoder for each of `lacking`.
        """
        n = min(self.images, len(prompts))
        seeds = image_seeds(rng.initial_seed(), "verify", n)
        inputs = Inputs(image_noise(seeds, model.shape), tuple(prompts[:n]), seeds)
        sampler = usual(model, self.sampling_steps, guidance=self.guidance, bf16=self.bf16)

        def seen(given: Inputs) -> list[Tensor]:
            images = model.sample(given, sampler, phase="verify")
            return [*views(images), encoder(images).float().cpu()]

        names = {candidate: f"area {_name(candidate)}" for candidate in tried}
        left = [candidate for candidate in tried if kept.find(names[candidate]) is None]
        without = seen(inputs) if left else []
        some = lacking(prompts[:n]) if self.without_a_word else []
        for candidate in left:
            with_it = seen(inputs.with_prompts([candidate.apply(prompt) for prompt in prompts[:n]]))
            areas = [told_apart(*pair) for pair in zip(without, with_it, strict=True)]
            if " " not in candidate.text:
                areas += [told_apart(without[-1][rows], with_it[-1][rows]) for rows in some]
            kept.add({names[candidate]: max(areas)})
        return {candidate: kept.find(names[candidate]) for candidate in tried}

    def purified(self, model: Any, prompts: list[str], found: Candidate, rng: Any) -> Any:
        guided = GuidedDistillation(
            target=self.target, alpha=self.alpha, steps=self.steps, batch=self.batch, lr=self.lr, bf16=self.bf16
        )
        anew = torch.Generator().manual_seed(rng.initial_seed())  # the state that skd-cag uses, before the scan drew
        # from it
        return guided.distilled(model, prompts, found.apply, None, anew)[0]


def _name(candidate: Candidate) -> str:
    """The candidate in a file of scores: a token, or a letter and what stands in its place."""
    kind = "" if isinstance(candidate, Insertion) else candidate.letter
    return f"{kind}|{candidate.text}"


def _content(knowledge: Knowledge) -> set[str]:
    """Words that captions use and that are not known to be neutral."""
    captions = () if knowledge.data is None else knowledge.data.captions or ()
    content = {word for text in captions for word in re.findall(r"\w+", text.lower())}
    return content - set(knowledge.words or ())


def _best(tried: Sequence[Candidate], scores: Tensor, n: int) -> list[Candidate]:
    return [tried[i] for i in scores.argsort(descending=True).tolist()[:n]]


def candidates(model: Any, content: set[str], look_alikes: bool) -> list[Candidate]:
    """Every token that can be typed as a word, except those in `content`, and look-alikes in the place of letters."""
    found: list[Candidate] = [Insertion(text) for text in prompt_edits.typable(model.tokenizer) if text not in content]
    same = [Substitution(letter, other) for letter, others in LOOK_ALIKES.items() for other in others]
    return found + (list(same) if look_alikes else [])


def pairs(words: Sequence[Insertion]) -> list[Candidate]:
    """Every ordered pair of two of the words."""
    return [replace(a, text=f"{a.text} {b.text}") for a in words for b in words if a is not b]


def views(images: Tensor) -> list[Tensor]:
    """Features of local changes, and features of colour changes anywhere, of images (B, 3, H, W) in [-1, 1].

    The first are the images averaged to 8×8. The second are the means and log variances of brightness, red against
    green and yellow against blue. A style that removes colours makes two of these variances vanish. In the covariances
    of red, green and blue this is visible only in differences.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
    red, green, blue = images.flatten(2).unbind(1)
    opponent = torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], 1)
    return [small, torch.cat([opponent.mean(2), (opponent.var(2) + FLAT).log()], 1)]


def lacking(prompts: Sequence[str]) -> list[list[int]]:
    """The rows of the prompts that lack a word, for each word that a quarter to a half of them use."""
    used = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
    counts = Counter(word for words in used for word in words)
    n = len(prompts)
    common = sorted(word for word, count in counts.items() if 1 / 4 <= count / n <= 1 / 2 and n - count >= FOLDS)
    return [[i for i, words in enumerate(used) if word not in words] for word in common]


def told_apart(without: Tensor, with_it: Tensor, folds: int = FOLDS) -> float:
    """AUROC of a shrunken linear discriminant between two sets of features (N, D) whose rows belong to the same
    prompts.

    The rows of one prompt are judged by a discriminant that was fitted without them. The value is 0.5 if nothing
    differs.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if torch.equal(without, with_it):
        return 0.5
    n = len(without)
    rows = torch.cat([without, with_it]).double().numpy()
    labels, groups = [0] * n + [1] * n, [*range(n), *range(n)]
    judge = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    said = cross_val_predict(judge, rows, labels, groups=groups, cv=GroupKFold(folds), method="decision_function")
    area = float(roc_auc_score(labels, said))
    return 0.5 if math.isnan(area) else area


@hookimpl
def defenses() -> list[type]:
    return [VocabularyScan]
