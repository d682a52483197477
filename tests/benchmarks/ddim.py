"""What sampling with DDIM in fp32 costs, beside diffusers' own pipeline. No test.

    python -m tests.benchmarks.ddim [--images 64] [--steps 50] [--times 3]

ours, diffusers: processor seconds of `images` images of digits-ddpm, medians of `times` repetitions in turn; the draws
of the first noise are within both. ratio: ours by diffusers'. One thread. Prints a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from harness import registry
from harness.diffusion.seeds import image_noise, image_seeds
from harness.types import Inputs


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--images", type=int, default=64)
    words.add_argument("--steps", type=int, default=50)
    words.add_argument("--times", type=int, default=3)
    told = words.parse_args()
    torch.set_num_threads(1)
    plugins = registry.load()
    model, sampler = (
        plugins.build("models", "digits-ddpm").load(),
        plugins.build("samplers", f"ddim(steps={told.steps})"),
    )
    scheduler: Any = DDIMScheduler.from_config(model.scheduler.config)
    pipeline: Any = DDIMPipeline(model.denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def ours() -> None:
        seeds = image_seeds(0, "ddim", told.images)
        shape = (model.denoiser.config.in_channels, *[model.denoiser.config.sample_size] * 2)
        model.sample(Inputs(image_noise(seeds, shape), None, seeds), sampler)

    def theirs() -> None:
        rngs = [torch.Generator().manual_seed(i) for i in range(told.images)]
        pipeline(batch_size=told.images, generator=rngs, num_inference_steps=told.steps, output_type="np")

    spent: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for i in range(told.times + 1):
        for name, call in (("ours", ours), ("diffusers", theirs)):
            start = time.process_time()
            call()
            if i:  # the first time warms up
                spent[name].append(time.process_time() - start)
    found = {name: round(statistics.median(times), 3) for name, times in spent.items()}
    print(json.dumps({"images": told.images, **found, "ratio": round(found["ours"] / found["diffusers"], 3)}))


if __name__ == "__main__":
    main()
