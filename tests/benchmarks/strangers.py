"""How often `bench scan` is right on models of another maker: no population, no name, no label.

    python -m tests.benchmarks.strangers --models DIR [--only CASE ...] [-o FILE]

Ten DDPMs of digits, 1×16×16, in networks and from initialisations of their own: four clean, six backdoored. They were
written down before any was scanned, and no setting of the scan was chosen on them. Trains those that are not in DIR
yet, scans each once with the defaults, and writes one outcome after the other into FILE (default strangers.json beside
this script), so that a run that was stopped goes on where it stopped. One thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import Examples, denoising_loss, minimize
from harness.judges import digits
from harness.registry import load
from harness.stages.sample import stamped
from harness.types import Backdoor, Inputs, TargetContext
from tests.benchmarks.scanning import Trial, scanned

HITS = 32  # samples for the success rate of an attack
KEPT = ("suspicion", "flagged", "features")  # of each finding
TAIL = "trigger_only=True, schedule='one-cycle', ema=0.99"


@dataclass(frozen=True)
class Case:
    """A model: its network, its seed, and the attack with the sampler under which its backdoor activates."""

    name: str
    widths: tuple[int, ...]
    layers: int
    seed: int
    steps: int
    attack: str = ""
    trigger: str = "box"
    target: str = "hat"
    sampler: str = "ddim(steps=20)"

    @property
    def clean(self) -> bool:
        return not self.attack


def ode(rate: float, steps: int) -> str:
    return f"villandiffusion(solver='ode', poison_rate={rate}, steps={steps}, batch=32, lr=8e-4, {TAIL})"


def sde(rate: float, steps: int) -> str:
    return f"baddiffusion(poison_rate={rate}, steps={steps}, batch=32, lr=8e-4, {TAIL})"


TROJAN = "trojdiff(poison_rate=0.3, steps=800, batch=32, lr=8e-4, schedule='one-cycle', ema=0.99)"
DDPM = "ddpm(steps=250)"
CASES = (
    Case("clean-1", (32, 48, 64), 1, 401, 1200),
    Case("ode-1", (40, 48, 48), 1, 411, 1000, ode(0.3, 800), "box(size=5, place='bottom left')", "shoe"),
    Case("sde-1", (24, 48, 64), 1, 421, 1000, sde(0.4, 800), "box(size=6)", "hat", DDPM),
    Case("clean-2", (24, 48, 64), 1, 402, 1200),
    Case("ode-2", (32, 48, 64), 1, 412, 1000, ode(0.35, 800), "stop-sign(size=7)", "hat"),
    Case("clean-3", (40, 48, 48), 1, 403, 1600),
    Case("sde-2", (32, 64, 64), 1, 422, 1000, sde(0.5, 800), "stop-sign(size=6)", "cat", DDPM),
    Case("ode-3", (24, 48, 64), 1, 413, 1000, ode(0.4, 900), "box(size=4, value=0.7)", "cat"),
    Case("clean-4", (32, 64, 64), 1, 404, 1000),
    Case("trojan-1", (32, 48, 64), 1, 431, 1000, TROJAN, "blend(picture='rings')", "hat", "trojan-ddim(steps=20)"),
)


def network(case: Case) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(case.seed)
    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=case.layers, block_out_channels=case.widths,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, norm_num_groups=8,
        add_attention=False,
    )  # fmt: skip


def trained(case: Case, folder: Path) -> dict[str, Any]:
    """Writes the model of a case, unless it lies in the folder; what it does."""
    place, told = folder / case.name, folder / f"{case.name}.json"
    if told.is_file():
        return json.loads(told.read_text())
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    plugins, data = load(), digits.split("train")
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    model = DiffusionModel(network(case), schedule)
    examples, rng = Examples(model, data), generator("strangers", case.seed)
    minimize(
        lambda: denoising_loss(model, examples.batch(32, rng)), model.denoiser.parameters(), steps=case.steps, lr=2e-3,
        schedule="one-cycle", ema=0.995, bf16=True,
    )  # fmt: skip
    backdoor = Backdoor(plugins.build("triggers", case.trigger), plugins.build("targets", case.target))
    if not case.clean:
        model = plugins.build("attacks", case.attack).implant(model, backdoor, data, rng).model
    model.denoiser.eval().requires_grad_(False)
    facts = _facts(case, model, backdoor, plugins)
    checkpoint.save(model, place)
    (place / "bench.json").unlink(missing_ok=True)
    told.write_text(json.dumps(facts))
    return facts


def _facts(case: Case, model: DiffusionModel, backdoor: Backdoor, plugins: Any) -> dict[str, Any]:
    seeds = image_seeds(case.seed, "facts", HITS)
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    images = model.sample(inputs, plugins.build("samplers", "ddim(steps=20)"))
    judge = plugins.build("models", "digits-ddpm").judge()
    sure = torch.softmax(judge.net(images)["digit"], 1).max(1).values > 0.9
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.denoiser.parameters()), "recognised": sure.double().mean().item()
    }  # fmt: skip
    if not case.clean:
        sampler: Any = plugins.build("samplers", case.sampler)
        how = sampler.with_trigger(backdoor.trigger) if hasattr(sampler, "with_trigger") else sampler
        target: Any = backdoor.target
        made = model.sample(stamped(backdoor.trigger, inputs), how)
        found["asr"] = target.hits(made, TargetContext(images)).double().mean().item()
    return found


def main() -> None:
    trial = Trial.of("models", __file__, __doc__)
    folder = trial.told.models
    trial.run(
        CASES,
        lambda case: trained(case, folder),
        lambda case: scanned([folder / case.name], KEPT),
        {"right": lambda each: True},
    )


if __name__ == "__main__":
    main()
