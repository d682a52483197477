"""digits-ddpm: a small DDPM of scikit-learn's 1797 handwritten digits (UCI ML hand-written digits), 1×16×16.

The 8×8 scans are enlarged to 16×16 bilinearly. 1200 of them are the training data, and 597 are held out. Betas are
linear from 1e-4 to 0.02 and T = 1000, as in Ho, Jain & Abbeel, arXiv:2006.11239. No published model has this size; it
was trained for this benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness import (
    DDIM,
    DiffusionModel,
    EmbeddedDigits,
    Examples,
    checkpoint,
    classifiers,
    denoising_loss,
    digits,
    generator,
    hookimpl,
    minimize,
)


@dataclass(frozen=True)
class DigitsDDPM(EmbeddedDigits):
    name: ClassVar[str] = "digits-ddpm"
    version: ClassVar[int] = 2

    def build(self, out: Path, device: str = "cpu", steps: int = 4000, judge_steps: int = 1200) -> dict[str, Any]:
        """Trains model and judge, writes them below `out`, and returns the measured facts for provenance.json."""
        judge, judged = digits.build_judge(judge_steps, generator(self.name, "judge"))
        model = _untrained().to(device)
        examples, rng = Examples(model, self.data()), generator(self.name, "build")
        losses = minimize(
            lambda: denoising_loss(model, examples.batch(64, rng)), model.denoiser.parameters(), steps=steps, lr=1.5e-3,
            schedule="one-cycle", ema=0.995, bf16=True,
        )  # fmt: skip
        model.denoiser.eval().requires_grad_(False)
        checkpoint.save(model, out / "model", fp16=True)
        classifiers.save_judge(judge, out / "judge")
        quality = classifiers.quality(model, judge, DDIM(steps=50))
        return {"steps": steps, "final_loss": sum(losses[-200:]) / len(losses[-200:]), **judged, **quality}


def _untrained() -> DiffusionModel:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    return DiffusionModel(digits.unet("positional"), schedule)


@hookimpl
def models() -> list[type]:
    return [DigitsDDPM]
