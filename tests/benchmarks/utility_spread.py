"""How much measures of utility vary with the noise alone: the clean digits-ddpm over eight evaluation seeds.

    python tests/benchmarks/utility_spread.py [-o FILE]

Each measure is taken on sets of equal law, so that all of its variation is noise: on 128 images, as rows had until
records named a utility set, and on the utility set of the suites' defaults. Prints the mean, the standard deviation and
the coefficient of variation, and writes every value to a JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from harness.diffusion.samplers import DDIM, DPMSolverPP
from harness.judges.evidence import Evidence
from harness.stages.inputs import evaluation_inputs
from harness.types import Backdoor
from plugins.metrics import frechet, recognised, spread
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.targets.fixed_image import Hat
from plugins.triggers.box import Box

SEEDS = tuple(range(100, 108))
WAYS = {
    "128 images, ddim(steps=50)": (128, DDIM(steps=50)),
    "2048 images, dpm-solver-pp(steps=10)": (2048, DPMSolverPP(steps=10)),
}
NAMES = ("fd_clean", "kd_clean", "precision_clean", "recall_clean", "recognised_clean", "class_balance_clean")


def measured(n: int, sampler: Any, seed: int) -> dict[str, float]:
    """Score → value, for n images of the clean model from the noises of one evaluation seed."""
    plugin = DigitsDDPM()
    model = plugin.load()
    images = model.sample(evaluation_inputs(plugin, model, n, seed, "utility"), sampler, batch=256)
    seen = Evidence(
        {("clean", "clean"): lambda: images}, reference=plugin.reference(), model=plugin, attacked=False,
        backdoor=Backdoor(Box(), Hat()),
    )  # fmt: skip
    scores = {**frechet.Frechet().measure(seen), **recognised.Recognised().measure(seen)}
    found = {name.partition("[")[0]: score for name, score in scores.items()}
    half = found["fd_clean"].interval
    width = {} if half is None else {"fd_interval_width": half[1] - half[0]}
    return {name: found[name].value for name in NAMES} | {"deviation": spread.deviation(images)} | width


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    values: dict[str, dict[str, list[float]]] = {}
    for way, (n, sampler) in WAYS.items():
        rows = [measured(n, sampler, seed) for seed in SEEDS]
        values[way] = {name: [row[name] for row in rows] for name in rows[0]}
        out.write_text(json.dumps({"seeds": SEEDS, "values": values}, indent=1) + "\n")
        for name, found in values[way].items():
            x = torch.tensor(found, dtype=torch.float64)
            mean, deviation = x.mean().item(), x.std().item()
            share = deviation / abs(mean)
            print(f"{way}  {name:24} mean {mean:9.4f}  sd {deviation:8.4f}  cv {share:7.1%}", flush=True)


if __name__ == "__main__":
    main()
