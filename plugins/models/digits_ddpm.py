"""digits-ddpm: a small DDPM of scikit-learn's 1797 handwritten digits (UCI ML hand-written digits), 1×16×16.

The 8×8 scans are enlarged to 16×16 bilinearly. Linear betas 1e-4..0.02, T = 1000, as in Ho, Jain & Abbeel,
arXiv:2006.11239. No published model has this size; it is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import checkpoint
from harness.diffusion import DDIM, DiffusionModel
from harness.features import AttributeCNN, CNNJudge, train_judge
from harness.hookspecs import hookimpl
from harness.seeds import generator, image_noise, image_seeds
from harness.training import draw, minimize
from harness.types import Data, Inputs, Stamps

SIDE = 16


@dataclass(frozen=True)
class DigitsDDPM:
    name: ClassVar[str] = "digits-ddpm"
    version: ClassVar[int] = 1
    stamps: ClassVar[Stamps] = "noise"
    conditional: ClassVar[bool] = False

    def load(self) -> DiffusionModel:
        return checkpoint.load(checkpoint.embedded(self, self.name) / "model")

    def digest(self) -> str:
        return checkpoint.digest(checkpoint.embedded(self, self.name))

    def data(self) -> Data:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        small = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        images = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return Data(images, labels=torch.tensor(bunch.target, dtype=torch.int64))

    def reference(self) -> Tensor:
        return self.data().images

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> None:
        return None

    def attributes(self, prompt: str) -> Mapping[str, int]:
        return {}

    def words(self) -> tuple[str, ...]:
        return ()

    def judge(self) -> CNNJudge:
        return checkpoint.load_judge(checkpoint.embedded(self, self.name) / "judge")

    def scorer(self) -> None:
        return None

    def build(self, out: Path, steps: int = 4000, judge_steps: int = 1200) -> dict[str, Any]:
        """Train model and judge, write them below `out`, and return the measured facts for provenance.json."""
        judge, judged = self._build_judge(judge_steps)
        model = _untrained()
        data, rng = self.data(), generator(self.name, "build")

        def loss() -> Tensor:
            x_0 = data.images[draw(64, len(data), rng)]
            t, eps = model.draw_t(64, rng), model.draw_eps(64, rng)
            return (model.eps(model.add_noise(x_0, eps, t), t) - eps).square().mean()

        losses = minimize(
            loss, model.denoiser.parameters(), steps=steps, lr=1.5e-3, schedule="one-cycle", ema=0.995, bf16=True
        )
        model.denoiser.eval().requires_grad_(False)
        checkpoint.save(model, out / "model", fp16=True)
        checkpoint.save_judge(judge, out / "judge")
        return {"steps": steps, "final_loss": sum(losses[-200:]) / 200, **judged, **_quality(model, judge)}

    def _build_judge(self, steps: int) -> tuple[CNNJudge, dict[str, float]]:
        """A digit classifier trained on four fifths of the digits, with its accuracy on the rest."""
        data, rng = self.data(), generator(self.name, "judge")
        assert data.labels is not None
        order = torch.randperm(len(data), generator=rng)
        train, test = data.rows(order[len(data) // 5 :]), data.rows(order[: len(data) // 5])
        assert train.labels is not None and test.labels is not None
        labels = train.labels
        net = AttributeCNN(1, SIDE, {"digit": 10}, width=32, dim=32)

        def batch(rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            rows = draw(64, len(train), rng)
            shift = torch.randint(-1, 2, (2,), generator=rng).tolist()
            noise = 0.1 * torch.randn((64, 1, SIDE, SIDE), generator=rng)
            return train.images[rows].roll(shift, (2, 3)) + noise, {"digit": labels[rows]}

        train_judge(net, batch, rng, steps=steps)
        judge = CNNJudge("digits-cnn", net.eval())
        right = judge.attributes(test.images)["digit"] == test.labels
        return judge, {"judge_accuracy": right.double().mean().item(), "judge_held_out": len(right)}


def _untrained() -> DiffusionModel:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)  # diffusers initialises from the global state; only this recipe does so
    unet = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    return DiffusionModel(unet, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False))


def _quality(model: DiffusionModel, judge: CNNJudge, n: int = 500) -> dict[str, Any]:
    """How well the judge recognises samples, and how balanced their classes are."""
    seeds = image_seeds(0, "quality", n)
    images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), DDIM(steps=50))
    probabilities = torch.softmax(judge.net(images)["digit"], 1).max(1).values
    counts = torch.bincount(judge.attributes(images)["digit"], minlength=10)
    return {
        "samples": n,
        "share_recognised_above_0.9": (probabilities > 0.9).double().mean().item(),
        "class_counts": counts.tolist(),
    }


@hookimpl
def models() -> list[type]:
    return [DigitsDDPM]
