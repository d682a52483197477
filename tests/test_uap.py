"""The universal adversarial perturbation: its ascent, what it does to its classifier, and that it is computed once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.diffusion import checkpoint, kept_tensors
from harness.diffusion.seeds import generator
from harness.judges import public_encoders
from plugins.models import digits_ddpm
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.triggers import uap
from plugins.triggers.uap import UAP

SHAPE = (1, 16, 16)


def test_each_step_follows_the_sign_of_the_gradient_of_the_mean_cross_entropy() -> None:
    """For logits ±a·x of two classes, CE(f(x), y) = log(1 + exp(-2 y a·x)), with the gradient -2 y a / (1 + exp(2 y
    a·x)): two images on one side push r against their side."""
    a = torch.tensor([1.0, -2.0, 0.5, 0.0]).view(1, 2, 2)
    x = torch.tensor([[0.3, -0.1, 0.2, 0.0], [0.1, -0.4, 0.0, 0.3]]).view(2, 1, 2, 2)

    def f(images: torch.Tensor) -> torch.Tensor:
        score = (images * a).sum((1, 2, 3))
        return torch.stack([score, -score], 1)

    r = torch.tensor([0.05, 0.0, -0.1, 0.02]).view(1, 2, 2)
    expected = r.clone()
    for _ in range(3):
        score = ((x + expected) * a).sum((1, 2, 3))
        gradient = (-2 * a / (1 + (2 * score).exp()).view(-1, 1, 1, 1)).mean(0)
        expected = (expected + 0.1 / 5 * gradient.sign()).clamp(-0.1, 0.1)
    assert torch.allclose(uap.ascended(r, x, f, 0.1, 3), expected, atol=1e-7)
    assert expected.flatten().tolist() == pytest.approx([-0.01, 0.06, -0.1, 0.02])


def test_the_images_stay_in_their_range_when_the_classifier_sees_them() -> None:
    seen: list[torch.Tensor] = []

    def f(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach())
        return torch.stack([images.sum((1, 2, 3)), -images.sum((1, 2, 3))], 1)

    uap.ascended(torch.full((1, 2, 2), 0.4), torch.ones(2, 1, 2, 2), f, 0.5, 2)
    assert all(images.abs().max() <= 1 for images in seen)


def test_it_changes_answers_of_the_judge_that_noise_of_the_same_size_does_not() -> None:
    trigger = UAP(epsilon=0.5)
    r, f, images = trigger.delta(SHAPE), uap.classifier("digits"), DigitsDDPM().data().images
    noise = 0.5 * torch.randn(SHAPE, generator=generator(0)).sign()

    def fooled(delta: torch.Tensor) -> float:
        with torch.no_grad():
            return float((f((images + delta).clamp(-1, 1)).argmax(1) != f(images).argmax(1)).double().mean())

    assert r.abs().max() <= 0.5 and r.mean().abs() < 0.1
    assert fooled(r) > 0.4 and fooled(r) > 3 * fooled(noise)


def test_others_have_another_direction() -> None:
    trigger = UAP(epsilon=0.35)
    r = trigger.delta(SHAPE).flatten()
    for other in (trigger.wrong(k).delta(SHAPE).flatten() for k in range(4)):
        assert torch.cosine_similarity(r, other, dim=0).abs() < 0.4
        assert other.norm() == pytest.approx(r.norm().item(), rel=0.1)


def test_the_digest_is_that_of_the_classifiers_weights() -> None:
    judge = Path(digits_ddpm.__file__).parent / "weights" / "digits-ddpm" / "judge"
    assert UAP().digest() == checkpoint.digest(judge)
    public = "efficientnet-lite0"
    assert UAP(network=public).digest() == public_encoders.RELEASES[public].sha256
    with pytest.raises(checkpoint.CheckpointError, match="the weights of 'nobody' are missing"):
        checkpoint.weights_in("plugins.models", "nobody")


def test_a_public_classifiers_perturbation_is_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is a stand-in; which file is read, and which is made again, does not depend on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[Any] = []

    def classifier(network: str) -> Any:
        calls.append(network)
        return lambda images: torch.stack([images.sum((1, 2, 3)), -images.sum((1, 2, 3))], 1)

    monkeypatch.setattr(uap, "classifier", classifier)

    def asked(trigger: UAP) -> torch.Tensor:
        uap.perturbation.cache_clear()  # as in another process
        return trigger.delta((3, 8, 8))

    trigger = UAP(network="efficientnet-lite0", images=2, steps=2)
    first = asked(trigger)
    assert torch.equal(asked(trigger), first) and calls == ["efficientnet-lite0"]
    assert not torch.equal(asked(trigger.wrong(0)), first) and len(calls) == 2
    places = list(tmp_path.rglob("*.safetensors"))
    for place in places:
        save_file({kept_tensors.TENSOR: 2 * first}, place)
    assert len(places) == 2 and torch.equal(asked(trigger), first) and len(calls) == 3, "larger than its bound"
    for place in places:
        place.write_bytes(b"damaged")
    assert torch.equal(asked(trigger), first) and len(calls) == 4
    uap.perturbation.cache_clear()


def test_what_cannot_be_kept_is_computed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made = [kept_tensors.kept(("x",), lambda: torch.ones(2), lambda _: True) for _ in range(2)]
    assert all(torch.equal(each, torch.ones(2)) for each in made)


def test_the_tensors_that_nobody_reads_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[str] = []

    def kept(name: str) -> None:
        kept_tensors.kept((name,), lambda: asked.append(name) or torch.ones(1000), lambda _: True)
        time.sleep(0.02)  # the order is that of the files' times

    kept("first")
    monkeypatch.setattr(kept_tensors, "MOST", 3 * next(tmp_path.rglob("*.safetensors")).stat().st_size)
    for name in ("second", "third", "first", "fourth"):
        kept(name)
    assert asked == ["first", "second", "third", "fourth"] and len(list(tmp_path.rglob("*.safetensors"))) == 3
    for name in ("first", "third", "fourth", "second"):
        kept(name)
    assert asked[4:] == ["second"], "the one that was read the longest time ago was removed"
