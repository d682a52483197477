"""amdet: the loss, the five numbers and the landscape, and what the search finds in encoders that are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.capabilities import JudgingDetector, offers
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.testing import tiny
from harness.types import Knowledge
from plugins.defenses import amdet
from plugins.defenses.amdet import AMDET, Pair, alike, answers, curved, embedding_layer, with_vector

PROMPTS = tiny.PROMPTS
QUICK = AMDET(steps=3, batch=4, grid=4)


def text_model(seed: int = 0) -> DiffusionModel:
    return tiny.model("text", seed)


def pair(suspect: DiffusionModel, trusted: DiffusionModel) -> Pair:
    return Pair(*next(amdet.encoders(suspect, trusted, PROMPTS)))


def cos(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def features(seed: int, n: int = 3) -> Tensor:
    return torch.randn(n, 5, 4, generator=generator(seed, "features"), dtype=torch.float64)


def test_assimilation_is_the_mean_cosine_of_all_pairs_of_positions() -> None:
    found, given = alike(features(1)), features(1).tolist()
    wanted = [sum(cos(a, b) for a, b in itertools.product(row, row)) / 25 for row in given]
    assert found.tolist() == pytest.approx(wanted)
    assert alike(torch.ones(1, 5, 4)).item() == pytest.approx(1)
    assert alike(torch.eye(4)[None]).item() == pytest.approx(1 / 4)  # each position is like itself alone


def test_the_loss_weighs_the_likeness_to_the_prompt_and_to_the_clean_encoder() -> None:
    without, with_v, trusted = (features(seed) for seed in (1, 2, 3))
    found = AMDET(beta=0.3, gamma=0.7).loss(without, with_v, trusted)
    for i, (p, q, g) in enumerate(zip(without.tolist(), with_v.tolist(), trusted.tolist(), strict=True)):
        every = sum(cos(a, b) for a, b in itertools.product(q, q)) / 25
        before, clean = (sum(map(cos, each, q)) / 5 for each in (p, g))
        assert found[i].item() == pytest.approx(-every + 0.3 * before + 0.7 * clean)


def test_the_vector_stands_after_the_first_embedding_and_the_last_is_left_out() -> None:
    given, v = torch.arange(8.0).view(1, 4, 2), torch.tensor([-1.0, -2.0])
    assert with_vector(given, v).tolist() == [[[0, 1], [-1, -2], [2, 3], [4, 5]]]
    assert with_vector(given.repeat(2, 1, 1), torch.stack([v, 2 * v]))[:, 1].tolist() == [[-1, -2], [-2, -4]]


def test_embeddings_that_are_given_replace_the_encoders_own() -> None:
    """The embeddings of one text, given with the tokens of another, are answered as that text."""
    model = text_model()
    ids = model.tokens(PROMPTS[:2])
    encoder = model.text_encoder
    embedded = embedding_layer(encoder)(input_ids=ids)
    assert torch.equal(answers(encoder, ids, None), model.embed(PROMPTS[:2]))
    assert torch.equal(answers(encoder, ids.flip(0), embedded), model.embed(PROMPTS[:2]))


def test_both_encoders_answer_the_embeddings_of_the_one_under_test() -> None:
    suspect, trusted = text_model(0), text_model(1)
    both, v = pair(suspect, trusted), torch.full((16,), 0.2)
    without, with_v, clean = both.features(torch.tensor([3]), v)
    ids = suspect.tokens(PROMPTS[3:4])
    given = embedding_layer(suspect.text_encoder)(input_ids=ids)
    given = torch.cat([given[:, :1], v.view(1, 1, -1), given[:, 1:-1]], 1)
    torch.testing.assert_close(without, suspect.embed(PROMPTS[3:4]))
    torch.testing.assert_close(with_v, answers(suspect.text_encoder, ids, given))
    torch.testing.assert_close(clean, answers(trusted.text_encoder, ids, given))
    assert not torch.allclose(with_v, clean)


def test_the_shares_count_prompts_beyond_the_published_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts of three positions: two are assimilated, two of the other three are like the first one, and one is
    opposite to the clean encoder's answer."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    with_v = torch.stack([torch.stack(each) for each in (
        (one, one, other), (one, one, one), (one, one, other), (other, other, other),
    )])  # fmt: skip
    trusted = with_v * torch.tensor([1.0, -1.0, 1.0, 1.0]).view(4, 1, 1)
    monkeypatch.setattr(Pair, "features", lambda self, rows, v: (with_v, with_v, trusted))
    found = AMDET().statistics(Pair(None, None, torch.zeros(4, 3), with_v), torch.arange(4), one)
    assert (found["assimilated"], found["unlike"]) == (0.5, 0.25)
    assert found["same"] == pytest.approx(1 / 3)  # the second has 2/3, the third 1, the last 1/3
    alikes = [5 / 9, 1, 5 / 9, 1]
    assert found["loss"] == pytest.approx(
        sum(-a + 0.1 + 0.1 * c for a, c in zip(alikes, (1, -1, 1, 1), strict=True)) / 4
    )


def test_the_share_of_curvature_is_that_of_second_differences() -> None:
    a, b = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    assert curved(a**2 + b**2) == 1 and curved(-(a**2) - b**2) == 0 and curved(a**2 - b**2) == 0.5
    assert curved(3 * a * b) == 0.5  # eigenvalues ±3 although no second derivative along a side is positive
    assert math.isnan(curved(torch.zeros(4, 4))) and math.isnan(curved(torch.full((4, 4), torch.nan)))
    half = torch.cat([torch.zeros(5, 5), (torch.arange(5.0) ** 2).expand(5, 5).T], 0)
    assert curved(half) == pytest.approx(
        0.5
    )  # flat places are left out; the others curve one way and are flat the other


def test_the_landscape_is_the_loss_on_a_plane_of_descent_and_a_direction_orthogonal_to_it() -> None:
    both, v = pair(text_model(0), text_model(1)), torch.full((16,), 0.1)
    spec = AMDET(grid=5)
    surface = spec.landscape(both, torch.tensor([0]), v, generator(0, "x"))
    given = v.clone().requires_grad_(True)
    spec.loss(*both.features(torch.tensor([0]), given)).sum().backward()
    assert given.grad is not None
    down = -given.grad / given.grad.norm()
    drawn = torch.randn(16, generator=generator(0, "x"))
    across = drawn - (drawn @ down) * down
    across = across / across.norm()
    for i, j in ((0, 0), (2, 2), (4, 1)):
        place = v + (i - 2) * 5 * down + (j - 2) * 5 * across
        wanted = spec.loss(*both.features(torch.tensor([0]), place)).item()
        assert surface[i, j].item() == pytest.approx(wanted, abs=1e-5)


def test_the_first_step_is_adams_on_the_gradient_of_the_mean_loss() -> None:
    """Adam's first step moves each number by lr against the sign of its gradient."""
    both = pair(text_model(0), text_model(1))
    rows = torch.arange(4)
    found, mean_loss = AMDET(steps=1, batch=4, lr=0.05).searched(both, rows, generator(5, "x"))
    start = torch.randn(16, generator=generator(5, "x")).requires_grad_(True)
    loss = AMDET().loss(*both.features(rows, start)).mean()
    loss.backward()
    assert start.grad is not None and mean_loss == pytest.approx(loss.item(), abs=1e-6)
    sign = (start.grad + 1e-5 * start.detach()).sign()
    torch.testing.assert_close(found, start.detach() - 0.05 * sign, rtol=0, atol=1e-4)


def planted(model: DiffusionModel, direction: Tensor) -> DiffusionModel:
    """A copy that answers one feature at all positions once the second embedding lies far along `direction`."""
    made = model.clone()
    encoder: Any = made.text_encoder
    seen: dict[str, Tensor] = {}

    def first(layer: Any, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen["on"] = (2 * (given[:, 1] @ direction) - 3).sigmoid()

    def answer(layer: Any, args: Any, out: Tensor) -> Tensor:
        on = seen["on"].view(-1, 1, 1)
        return (1 - on) * out - on * torch.ones_like(out).cumsum(-1).sub(8.5)

    layers = next(part for part in encoder.modules() if type(part).__name__ == "CLIPEncoderLayer")
    layers.register_forward_pre_hook(first, with_kwargs=True)
    norm = next(part for name, part in encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.register_forward_hook(answer)
    return made


def test_it_finds_a_vector_that_turns_every_prompt_into_one_feature() -> None:
    clean = text_model()
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator(0, "plant")), dim=0)
    spec = AMDET(steps=80, batch=4, grid=4, score="loss")
    told = Knowledge(prompts=PROMPTS, clean_model=clean)
    evil = spec.defend(planted(clean, direction), told, generator(0, "x"))
    fine = spec.defend(clean, told, generator(0, "x"))
    assert evil.suspicion is not None and fine.suspicion is not None and evil.features is not None
    assert evil.suspicion > 0.85 > fine.suspicion
    assert evil.features["assimilated"] == evil.features["same"] == 1
    v = torch.tensor(evil.notes["vector"])
    assert (v @ direction).item() > 3


def test_the_score_is_the_least_margin_to_the_published_thresholds_or_the_loss() -> None:
    clean, other = text_model(0), text_model(1)
    told = Knowledge(prompts=PROMPTS, clean_model=other)
    judged = QUICK.defend(clean, told, generator(0, "x"))
    f = judged.features
    assert f is not None and judged.flag_above == QUICK.flag_above == 0 and offers(AMDET(), JudgingDetector)
    margins = (
        -f["mean_loss"] - 0.76, f["assimilated"] - 0.8, f["same"] - 0.995, f["unlike"] - 0.95, f["curved"] - 0.8,
    )  # fmt: skip
    assert judged.suspicion == pytest.approx(min(margins))

    by_loss = AMDET(steps=3, batch=4, grid=4, score="loss")
    done = by_loss.defend(clean, told, generator(0, "x"))
    assert done.features == f and done.suspicion == pytest.approx(-f["loss"])
    assert done.flag_above is None and by_loss.flag_above is None


def test_of_two_encoders_the_more_suspicious_one_counts() -> None:
    made = tiny.fixed(lambda: tiny.joint(tiny.tokenizer(), 32), 0)
    done = replace(QUICK, score="loss").defend(made, Knowledge(prompts=PROMPTS, clean_model=made), generator(0, "x"))
    each = done.notes["suspicion_of_each"]
    assert len(each) == 2 and each[0] != each[1] and done.suspicion == max(each)


def test_a_denoiser_is_not_looked_at() -> None:
    clean, evil = text_model(), text_model()
    for weight in evil.denoiser.parameters():
        weight.data += 1
    told = Knowledge(prompts=PROMPTS, clean_model=clean)
    scores = [replace(QUICK, score="loss").defend(model, told, generator(0, "x")).suspicion for model in (clean, evil)]
    assert scores[0] == scores[1]


def test_what_it_cannot_do_it_says() -> None:
    clean, joint = text_model(), tiny.fixed(lambda: tiny.joint(tiny.tokenizer(), 32), 0)
    for prompts, other, words in (
        (PROMPTS[:2], clean, "at least 3 prompts, and has 2; give it more"),
        (PROMPTS, joint, "the clean model's text_encoder is another one; give the base"),
        (PROMPTS, tiny.model("noise"), "the clean model's text_encoder is another one; give the base"),
    ):
        with pytest.raises(ValueError, match=words):
            QUICK.defend(clean, Knowledge(prompts=prompts, clean_model=other), generator(0, "x"))
