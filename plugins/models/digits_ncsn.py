"""digits-ncsn: a small variance-exploding score model of scikit-learn's handwritten digits, 1×16×16.

x_t = x_0 + σ_t ε with σ_t geometric from 0.01 to 50, and T = 1000. The network takes x_t and log σ_t and returns the
score -ε/σ_t, as in NCSN++ (Song et al., arXiv:2011.13456). It runs on diffusers' own UNet2DModel and
ScoreSdeVePipeline. Data, judge and network size are those of digits-ddpm. No published model has this size; it was
trained for this benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness import (
    DiffusionModel,
    EmbeddedDigits,
    Examples,
    Family,
    PredictorCorrector,
    checkpoint,
    classifiers,
    denoising_loss,
    digits,
    generator,
    hookimpl,
    minimize,
)

SIGMA_MIN, SIGMA_MAX, LEVELS = 0.01, 50.0, 1000


@dataclass(frozen=True)
class DigitsNCSN(EmbeddedDigits):
    name: ClassVar[str] = "digits-ncsn"
    version: ClassVar[int] = 2
    family: ClassVar[Family] = "ve"

    def build(
        self, out: Path, device: str = "cpu", steps: int = 12000, batch: int = 128, sampling_steps: int = 500
    ) -> dict[str, Any]:
        """Trains the model, writes it and a copy of digits-ddpm's judge below `out`, and returns the measured facts."""
        judge = classifiers.load_judge(checkpoint.embedded(self, "digits-ddpm") / "judge")
        model = _untrained().to(device)
        examples, rng = Examples(model, self.data()), generator(self.name, "build")
        losses = minimize(
            lambda: denoising_loss(model, examples.batch(batch, rng)), model.denoiser.parameters(), steps=steps,
            lr=1.5e-3, schedule="one-cycle", ema=0.995,
        )  # fmt: skip
        model.denoiser.eval().requires_grad_(False)
        quality = classifiers.quality(model, judge, PredictorCorrector(steps=sampling_steps), batch=500)
        checkpoint.save(model.to("cpu"), out / "model", fp16=True)
        classifiers.save_judge(judge, out / "judge")
        return {"steps": steps, "final_loss": sum(losses[-200:]) / len(losses[-200:]), **quality}


def _untrained() -> DiffusionModel:
    from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler

    unet = digits.unet("fourier")
    # NCSN++ draws the frequencies of log σ from N(0, 16²). These are lower, so that neighbouring levels learn from each
    # other. They are exact in float16, because the weights are shipped in float16.
    unet.time_proj.weight.data.div_(32).copy_(unet.time_proj.weight.half())
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=LEVELS, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, snr=0.075)
    return DiffusionModel(unet, scheduler)


@hookimpl
def models() -> list[type]:
    return [DigitsNCSN]
