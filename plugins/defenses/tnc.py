"""Detects inputs with a trigger by the change of the predicted noise from one sampling step to the next.

TNC-Defense, the detection in it. Wang et al., "Backdoor Sentinel: Detecting and Detoxifying Backdoors in Diffusion
Models via Temporal Noise Consistency", arXiv:2602.01765. Along a sampling run, a clean input changes the prediction
steadily. An input with a trigger disrupts it in some segment of the run.

e_s is the prediction at sampling step s = 0..S-1, with guidance. D_j is the mean change over a segment of k steps:

    d_s = mean_CHW (e_s - e_s-1)²,  s = 1..S-1            D_j = (d_j + ... + d_j+k-1) / k,  j = 1..S-k
    z_j = (D_j - m_j) / v_j                                score = max_j z_j

m_j and v_j are mean and standard deviation of D_j over clean inputs. With sides='both' the score is max_j |z_j|. The
threshold is a quantile of the scores of the clean inputs, each of which is compared with the others alone.

The defense needs clean prompts. For an unconditional model it needs nothing and draws `noises` clean noises. It returns
a screen. It costs one sampling per query, which is the one that draws the image if the sampler is the same. Raises
ValueError for a run of one step, for a model whose variance explodes, and for `eta` on a flow.

Differs from the paper: it was written after the abstract, because text and code were not available. The paper's rule of
decision ("naive" or "dynamic-k" in its code) is not known. The segments, their length, the z-values, the quantile and
the sampler are ours.
The mean square as a measure of change, and the comparison of adjacent steps, are those of the abstract and of the
code's description. For networks that predict a velocity, e_s is that velocity. The detoxification is not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from harness import (
    DDIM,
    Defended,
    FlowEuler,
    Guide,
    Inputs,
    Knowledge,
    PositiveInt,
    Share,
    generator,
    hookimpl,
    image_noise,
    image_seeds,
    prompt_screening,
)

LEAST = 3  # clean inputs: each of them is compared with the deviation of the others


@dataclass(frozen=True)
class TNC:
    name: ClassVar[str] = "tnc"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    segment: PositiveInt = 5  # k, steps per segment; our choice
    sides: Literal["above", "both"] = "above"  # which deviations count: larger changes, or smaller ones too
    sampling_steps: PositiveInt = 50  # steps of DDIM, or of flow-euler
    guidance: Guide = 7.5  # classifier-free guidance scale; text-to-image only, 1 = off
    eta: Annotated[float, Ge(0), Le(1)] = 0.0  # share of DDPM's noise added back each step; 1 activates the backdoors
    # that only an ancestral sampler activates
    bf16: bool = False  # autocast of the network
    noises: Annotated[int, Ge(LEAST)] = 100  # clean noises drawn for an unconditional model
    false_positives: Share = 0.05  # share of clean inputs that the threshold flags

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        self.check(model)
        clean = self.segments(model, self.clean(model, knowledge, rng))

        def screen(inputs: Inputs) -> Tensor:
            return self.score(self.segments(model, inputs), clean)

        scores = torch.stack(
            [self.score(clean[i : i + 1], torch.cat([clean[:i], clean[i + 1 :]]))[0] for i in range(len(clean))]
        )
        above = prompt_screening.threshold(scores, self.false_positives)
        return Defended(screen=screen, screen_above=above, notes={"clean_scores": scores.tolist()})

    def check(self, model: Any) -> None:
        if self.sampling_steps < 2:
            raise ValueError("tnc compares adjacent steps; use tnc(sampling_steps=2) or more")
        if model.family == "ve":
            raise ValueError("tnc follows the runs of ddim and of flow-euler; for this model use ufid(sampler='ve-pc')")
        if model.family == "flow" and self.eta:
            raise ValueError("flow-euler adds no noise; use tnc(eta=0)")

    def clean(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Inputs:
        """Queries of the known prompts, or clean noises. Raises ValueError for fewer than three prompts."""
        if not model.conditional:
            seeds = image_seeds(int(torch.randint(2**62, (), generator=rng)), "tnc", self.noises)
            return Inputs(image_noise(seeds, model.shape).to(model.device), None, seeds)
        prompts = knowledge.prompts or ()
        if len(prompts) < LEAST:
            raise ValueError(f"tnc needs at least {LEAST} clean prompts to compare with, and has {len(prompts)}")
        return prompt_screening.benign(model, prompts, rng)

    def segments(self, model: Any, inputs: Inputs) -> Tensor:
        """D (B, S - k) float64 of any number of inputs; a run of k steps or fewer is one segment, (B, 1)."""
        changes = prompt_screening.screened(lambda part: self.changes(model, part), inputs)
        return changes.unfold(1, min(self.segment, changes.shape[1]), 1).mean(2)

    @torch.no_grad()
    def changes(self, model: Any, inputs: Inputs) -> Tensor:
        """d (B, S - 1) float64: the mean squared changes of the prediction between adjacent steps."""
        options: Any = {"steps": self.sampling_steps, "guidance": self.guidance}
        sampler = FlowEuler(**options) if model.family == "flow" else DDIM(eta=self.eta, **options)
        scheduler = sampler.scheduler(model.scheduler.config)
        predict = sampler.predictor(model, inputs)
        rngs = [generator(seed, "steps") for seed in inputs.seeds]
        x_t, before, found = inputs.noise.to(model.device), None, []
        for t in scheduler.timesteps:
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
                now = predict(x_t, t).float()
            if before is not None:
                found.append((now - before).double().square().flatten(1).mean(1).cpu())
            before = now
            x_t = scheduler.step(now, t, x_t, **sampler.step_options(rngs)).prev_sample
        return torch.stack(found, 1)

    def score(self, segments: Tensor, clean: Tensor) -> Tensor:
        """(B,) max z of segments (B, J) against those of clean inputs (N, J)."""
        z = (segments - clean.mean(0)) / clean.std(0).clamp_min(1e-12)
        return (z.abs() if self.sides == "both" else z).amax(1)


@hookimpl
def defenses() -> list[type]:
    return [TNC]
