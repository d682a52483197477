"""Input-level detection for text-to-image models: cross-attention maps of a generation, benign queries, thresholds.

A screen gives each prompt a score that depends only on its own input; higher = more suspicious. Thresholds are
calibrated on held-out benign prompts: `threshold` is the quantile of their scores above which a given share is flagged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import normalize

from harness.diffusion import attention
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import usual
from harness.diffusion.seeds import image_noise, image_seeds
from harness.methods.parameters import PositiveInt
from harness.types import Inputs

Share = Annotated[float, Gt(0), Lt(1)]
Guide = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class MapRun:
    """A generation during which cross-attention is recorded."""

    sampling_steps: PositiveInt = 50  # steps of DDIM, or of flow-euler; published: 50
    guidance: Guide = 7.5  # classifier-free guidance scale; published: 7.5
    side: PositiveInt = 16  # side of the maps that are used; published: 16
    bf16: bool = False  # autocast of the network

    @torch.no_grad()
    def maps(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        """(B, S, L, side, side): the attention of the conditional half for every sampling step and token.

        It is the mean over heads and over the layers of that side but those in the middle of a UNet. Raises ValueError
        if no layer has that side.
        """
        return self.maps_in_graph(model, inputs).cpu()

    def maps_in_graph(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        """The same on the model's device, with gradients through all sampling steps to whatever requires them."""
        sampler = usual(model, self.sampling_steps, guidance=self.guidance)
        scheduler = sampler.scheduler(model.scheduler.config)
        predict = sampler.predictor(model, inputs)
        x_t, found = inputs.noise.to(model.device), []
        with attention.capture(model.denoiser) as maps:
            for t in scheduler.timesteps:
                with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
                    out = predict(x_t, t).float()
                found.append(self._mean(maps, len(inputs)))
                x_t = scheduler.step(out, t, x_t).prev_sample
        return torch.stack(found, 1)

    def _mean(self, maps: attention.Maps, rows: int) -> Tensor:
        kept = [
            probabilities[-rows:].float().mean(1).transpose(1, 2)
            for name, probabilities in maps.items()
            if not name.startswith("mid_block") and probabilities.shape[2] == self.side**2
        ]
        if not kept:
            sides = sorted({round(probabilities.shape[2] ** 0.5) for probabilities in maps.values()})
            raise ValueError(
                f"no cross-attention layer on the way down or up has maps of side {self.side}; use {sides}"
            )
        return torch.stack(kept).mean(0).unflatten(2, (self.side, self.side))


def lengths(model: DiffusionModel, prompts: Sequence[str]) -> list[int]:
    """Number of tokens of each prompt with BOS and the first EOS."""
    assert model.tokenizer is not None, "an unconditional model has no tokenizer"
    return [len(model.tokenizer(prompt).input_ids) for prompt in prompts]


def benign(model: DiffusionModel, prompts: Sequence[str], rng: torch.Generator) -> Inputs:
    """Queries of benign prompts with their own noises."""
    seeds = image_seeds(int(torch.randint(2**62, (), generator=rng)), "benign", len(prompts))
    return Inputs(image_noise(seeds, model.shape).to(model.device), tuple(prompts), seeds)


def screened(screen: Callable[[Inputs], Tensor], inputs: Inputs, batch: int = 50) -> Tensor:
    """The scores (N,) of the screen for any number of inputs."""
    return torch.cat([screen(inputs[start : start + batch]) for start in range(0, len(inputs), batch)])


def assimilation(maps: Tensor) -> float:
    """F of maps (K, side, side), of FTT in T2IShield (arXiv:2407.04215): small where the tokens' maps are alike."""
    return (maps - maps.mean(0)).flatten(1).norm(dim=1).mean().item()


def threshold(scores: Tensor, false_positives: float) -> float:
    """The score above which the share `false_positives` of benign `scores` (N,) lies."""
    return scores.double().quantile(1 - false_positives).item()


def density(features: Tensor) -> Tensor:
    """(B,) mean cosine over the pairs of each row's K features (B, K, D), K at least 2: UFID's graph density."""
    unit = normalize(features, dim=2)
    k = features.shape[1]
    return ((unit @ unit.transpose(1, 2)).sum((1, 2)) - k) / (k * (k - 1))
