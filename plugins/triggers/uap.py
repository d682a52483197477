"""A universal adversarial perturbation, added to the starting noise.

UIBDiffusion. Han et al., "UIBDiffusion: Universal Imperceptible Backdoor Attack for Diffusion Models", CVPR 2025,
arXiv:2412.11441. The attack is VillanDiffusion's with this trigger.

The perturbation r (C, H, W) changes the answer of an image classifier f on many images x at once, within a bound in the
images' range [-1, 1]:

    max over r of  mean over x of  CE(f(clip(x + r)), argmax f(x))        subject to ‖r‖∞ ≤ ε

It is found by ascent along the sign of the gradient, r ← clip(r + ε/5 · sign ∇, ±ε), from uniform noise (Shafahi et
al., arXiv:1811.11304; the idea is that of Moosavi-Dezfooli et al., arXiv:1610.08401). `seed` draws the images and the
start. Its pixels have about the mean 0, and there is no background. In an attack with trigger_only=False, r is added to
the clean image of a row.

network `digits` is the judge of digits-ddpm on its training digits, the others are public ImageNet classifiers on drawn
shapes. Each takes images of all sizes, which it resizes. The public networks need more than a second, so their
perturbations are kept in the cache directory. The keys hold a digest of the network.

Differs from the paper: its full text was not at hand. The bound ε is a parameter; the official code
(TheLaoLab/UIBDiffusion at 85b1322, read there) ships its perturbation as a picture whose pixels are nearly all -1 or 1,
without the code that made it. In training the code adds 0.1 times the picture to the clean image (a comment says 0.05),
or takes the whole picture for r with trigger_only. At inference it adds the whole picture to the noise. Here r is the
same in both. An image of fewer pixels needs a larger ε, because unit noise hides a pattern by its norm: ε = 0.35 on
1×16×16 pixels has the norm of ε = 0.1 on 3×32×32. The optimiser, its images and the networks are choices of this
benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from harness import (
    CNNJudge,
    Inputs,
    Modality,
    PositiveInt,
    as_rgb,
    checkpoint,
    classifiers,
    digits,
    generator,
    hookimpl,
    kept_tensors,
    public_encoders,
    shapes,
    trigger_placement,
)

JUDGE = "plugins.models", "digits-ddpm"  # the package with the weights of the judge, and its model
LOGITS = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UAP:
    name: ClassVar[str] = "uap"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"
    added: ClassVar[bool] = True

    network: Literal["digits", "efficientnet-lite0", "efficientnet-lite2"] = "digits"  # f, the classifier
    epsilon: Annotated[float, Gt(0), Le(1)] = 0.1  # ε, bound of each pixel of r; the factor in the official code
    images: PositiveInt = 64  # x, how many images are perturbed at once
    steps: PositiveInt = 15  # steps of the ascent
    seed: int = 0  # draws the images and the start

    def delta(self, shape: Sequence[int]) -> Tensor:
        return perturbation(self, tuple(shape)).clone()

    def digest(self) -> str:
        """sha256 of the classifier's weights."""
        if self.network == "digits":
            return checkpoint.digest(checkpoint.weights_in(*JUDGE) / "judge")
        return public_encoders.RELEASES[self.network].sha256

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> UAP:
        """A perturbation of the same network from other images and another start."""
        return replace(self, seed=self.seed + 1 + k)


@cache
def perturbation(of: UAP, shape: tuple[int, ...]) -> Tensor:
    """r (C, H, W), computed once in a process, and once on a machine where it takes more than a second."""
    if of.network == "digits":
        return computed(of, shape)
    bound = of.epsilon * (1 + 1e-6)
    return kept_tensors.kept(
        (of, of.version, of.digest(), shape, torch.__version__),
        lambda: computed(of, shape),
        lambda r: tuple(r.shape) == shape and bool((r.abs() <= bound).all()),
    )


def computed(of: UAP, shape: Sequence[int]) -> Tensor:
    rng = generator("uap", of.seed)
    x, f = examples(of, shape, rng), classifier(of.network)
    r = of.epsilon * (2 * torch.rand(tuple(shape), generator=rng) - 1)
    return ascended(r, x, f, of.epsilon, of.steps)


def ascended(r: Tensor, x: Tensor, f: LOGITS, epsilon: float, steps: int) -> Tensor:
    """r (C, H, W) after `steps` steps on images x (B, C, H, W); f gives logits (B, K)."""
    with torch.no_grad():
        answer = f(x).argmax(1)
    for _ in range(steps):
        r = r.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = cross_entropy(f((x + r).clamp(-1, 1)), answer)
        (gradient,) = torch.autograd.grad(loss, r)
        r = (r.detach() + epsilon / 5 * gradient.sign()).clamp(-epsilon, epsilon)
    return r.detach()


def examples(of: UAP, shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] on which the network answers, in the shape (C, H, W) of the trigger."""
    channels, height, width = shape
    if of.network == "digits":
        whole = digits.split("train").images
        found = whole[torch.randperm(len(whole), generator=rng)[: of.images]]
    else:
        found = shapes.draw(shapes.scenes(of.images, "train", rng), rng)
    found = interpolate(found, size=(height, width), mode="bilinear", antialias=True)
    return as_rgb(found) if channels == 3 else found.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def classifier(network: str) -> LOGITS:
    """Logits (B, K) of images (B, C, H, W) in [-1, 1] of any size."""
    if network != "digits":
        encoder = public_encoders.load(network, "cpu")
        return lambda x: encoder.logits(x if x.shape[1] == 3 else x.mean(1, keepdim=True))
    judge: CNNJudge = classifiers.load_judge(checkpoint.weights_in(*JUDGE) / "judge")
    size = (digits.SIDE, digits.SIDE)

    def logits(x: Tensor) -> Tensor:
        grey = x.mean(1, keepdim=True)
        sized = grey if grey.shape[2:] == size else interpolate(grey, size=size, mode="bilinear", antialias=True)
        return judge.net(sized)["digit"]

    return logits


@hookimpl
def triggers() -> list[type]:
    return [UAP]
