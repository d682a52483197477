"""What the public encoders know of our images, and what they cost.

    python -m tests.benchmarks.public_encoder [-o FILE]

- probe: accuracy of a linear probe (ridge regression of the classes) of each attribute, fitted on 250 drawings of
  shapes-sd and tested on 150 others, and of the digit, on the features and on the pixels.
- cosines: between the features of different images; median, and the share above 0.9, the κ of Diff-Cleanse.
- cost: processor seconds of 2048 images on one thread, and how far bf16 is from fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.diffusion.seeds import generator
from harness.judges import digits, public_encoders, shapes
from harness.methods.inversion import cosines
from harness.types import PUBLIC_ENCODERS

FITTED, TESTED = 250, 150
IMAGES = 2048
RIDGE = 10.0  # of the probe


def drawings(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    """n drawings (n, 3, 32, 32) in [-1, 1] and the class of each attribute; -1 for the colour of what is black and
    white."""
    rng = generator("public encoder", "drawings")
    drawn = shapes.scenes(n, "train", rng)
    labels = {name: torch.tensor([getattr(scene, name) for scene in drawn]) for name in shapes.ATTRIBUTES}
    labels["colour"][labels["style"] == 1] = -1
    return shapes.draw(drawn, rng), labels


def probes(features: Tensor, labels: Mapping[str, Tensor], fitted: int) -> dict[str, float]:
    """Accuracy of a linear probe of each attribute on the rows of features (N, D) after the first `fitted`. Rows of
    class -1 do not count."""
    from sklearn.linear_model import RidgeClassifier

    found, first = {}, torch.arange(len(features)) < fitted
    for name, values in labels.items():
        (x, y), (unseen, truth) = (
            (features[rows].double().numpy(), values[rows].numpy())
            for rows in (first & (values >= 0), ~first & (values >= 0))
        )
        found[name] = float(RidgeClassifier(alpha=RIDGE).fit(x, y).score(unseen, truth))
    return found


def alike(features: Tensor) -> dict[str, float]:
    """Of the cosines between different rows of features (N, D): the median, and the share above 0.9."""
    between = cosines(features.double())[~torch.eye(len(features), dtype=torch.bool)]
    return {"median": between.median().item(), "above_0.9": (between > 0.9).double().mean().item()}


def cost(encoder: public_encoders.PublicEncoder, images: Tensor) -> dict[str, float]:
    """Processor seconds of these images, and the relative distance of bf16 features."""
    began = time.process_time()
    features = encoder.features(images)
    seconds = time.process_time() - began
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.features(images[:64]).float()
    apart = (half - features[:64]).norm() / features[:64].norm()
    return {"images": len(images), "cpu_s": seconds, "bf16_apart": apart.item()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    images, labels = drawings(FITTED + TESTED)
    written, target = digits.split("train").images[: len(images)], digits.split("train").labels
    assert target is not None
    digit = {"digit": target[: len(written)]}
    found: dict[str, Any] = {
        "fitted": FITTED, "tested": TESTED,
        "pixels": {"probe": {**probes(images.flatten(1), labels, FITTED), **probes(written.flatten(1), digit, FITTED)}},
    }  # fmt: skip
    for name in PUBLIC_ENCODERS:
        encoder = public_encoders.load(name)
        drawn, seen = encoder.features(images), encoder.features(written)
        found[name] = {
            "probe": {**probes(drawn, labels, FITTED), **probes(seen, digit, FITTED)},
            "cosines": {"drawings": alike(drawn), "digits": alike(seen)},
        }
    first = PUBLIC_ENCODERS[0]
    found[first]["cost"] = cost(public_encoders.load(first), images.repeat(6, 1, 1, 1)[:IMAGES])
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
