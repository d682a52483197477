"""What benchmarks of attacked text-to-image models share: how often a trigger succeeds, and a command's options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges.evidence import counted, reachable
from harness.stages import inputs as evaluation
from harness.stages.sample import sample
from harness.types import Backdoor, Inputs, TargetContext


class Judged:
    """The success rate of a backdoor on any model, over the same n prompts and noises of `seed`."""

    def __init__(self, plugin: Any, clean: DiffusionModel, backdoor: Backdoor, sampler: Any, seed: int, n: int) -> None:
        told = evaluation.avoiding(plugin, backdoor.trigger)
        prompts, seeds = told.prompts("test", n, generator(seed, "evaluation")), image_seeds(seed, "evaluation", n)
        self.backdoor, self.sampler, self.judge = backdoor, sampler, plugin.judge()
        self.given = Inputs(image_noise(seeds, clean.shape), prompts, seeds)
        self.target = reachable(backdoor, prompts).target
        self.plain = sample(clean, self.given, sampler, [None])
        self.counts = counted(self.target, prompts, n)

    def rate(self, model: DiffusionModel) -> float:
        images = sample(model, self.given, self.sampler, [self.backdoor.trigger])
        hits = self.target.hits(images, TargetContext(self.plain, self.given.prompts or (), self.judge))
        return hits[self.counts].double().mean().item()


def options(doc: str | None, file: Path, only: str) -> argparse.Namespace:
    """--models, --only, --table and -o of a benchmark that keeps its models and writes outcomes into `file`."""
    words = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", type=Path, help="where the models are kept")
    words.add_argument("--only", action="append", help=only)
    words.add_argument("--table", action="store_true", help="write the table, and compute nothing")
    words.add_argument("-o", "--out", type=Path, default=file)
    return words.parse_args()
