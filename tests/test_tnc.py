"""tnc: changes of the prediction along a run, their z-values, and what the screen flags."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.types import Inputs, Knowledge
from plugins.defenses.tnc import TNC
from plugins.triggers.box import Box
from plugins.triggers.text import Text
from tests.oracles import one_image_flow, one_image_model, scheduler, tiny_ncsn, tiny_sd, tiny_unet

PROMPTS = tuple(f"a small {colour} circle at the top left" for colour in ("red", "green", "blue", "yellow"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> DiffusionModel:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


def noises(n: int, name: str = "clean") -> Inputs:
    seeds = image_seeds(0, name, n)
    return Inputs(image_noise(seeds, (1, 16, 16)), None, seeds)


def prompted(sd: DiffusionModel, prompts: tuple[str, ...] = PROMPTS) -> Inputs:
    seeds = image_seeds(3, "queries", len(prompts))
    return Inputs(image_noise(seeds, sd.shape), prompts, seeds)


class Answering(nn.Module):
    """A denoiser that answers t / 1000 everywhere, plus `jump` below t = 500 to an input that was dark at the start."""

    def __init__(self, jump: float = 0.0) -> None:
        super().__init__()
        self.jump, self.dark, self.unused = jump, torch.zeros(0), nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=1, sample_size=16, cross_attention_dim=None)

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> SimpleNamespace:
        when = t.reshape(-1).float().expand(len(x_t))
        if when[0] > 990:
            self.dark = x_t.mean((1, 2, 3)) < -0.3
        spread = 0.01 * x_t.std((1, 2, 3))
        value = when / 1000 * (1 + spread) + self.jump * (self.dark & (when < 500))
        return SimpleNamespace(sample=value.view(-1, 1, 1, 1).expand_as(x_t))


def test_changes_are_mean_squares_of_the_differences_between_adjacent_steps() -> None:
    """t = 999, 749, 499, 249 and an answer of t / 1000: every change is 0.25 squared."""
    still = DiffusionModel(Answering(), scheduler())
    still.denoiser.forward = lambda x_t, t: SimpleNamespace(sample=(t / 1000 * torch.ones_like(x_t)))  # type: ignore[method-assign,assignment]
    found = TNC(sampling_steps=4, segment=2).changes(still, noises(2))
    assert found.shape == (2, 3) and torch.allclose(found, torch.full((2, 3), 0.0625, dtype=torch.float64))


def test_changes_are_those_of_the_guided_predictions(sd: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed from the network's answers: e = plain + 2 (asked - plain), and the mean square of e_s - e_s-1."""
    answers, original = [], DiffusionModel.answer

    def answer(self: DiffusionModel, *given: Any) -> Tensor:
        answers.append(original(self, *given))
        return answers[-1]

    monkeypatch.setattr(DiffusionModel, "answer", answer)
    found = TNC(sampling_steps=3, segment=1, guidance=2.0).changes(sd, prompted(sd))
    e = [2 * each[4:] - each[:4] for each in answers]
    wanted = [[(e[s][i] - e[s - 1][i]).pow(2).mean().item() for s in (1, 2)] for i in range(4)]
    assert len(answers) == 3 and found.tolist() == [pytest.approx(row, rel=1e-4) for row in wanted]


def test_segments_are_running_means_of_k_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = torch.tensor([[1.0, 2.0, 6.0, 4.0, 0.0], [0.0, 0.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    monkeypatch.setattr(TNC, "changes", lambda self, model, inputs: changes)
    found = TNC(segment=3).segments(None, noises(2))
    assert found.tolist() == [[3.0, 4.0, pytest.approx(10 / 3)], [1.0, 2.0, 3.0]]
    assert TNC(segment=9).segments(None, noises(2)).tolist() == [[pytest.approx(2.6)], [pytest.approx(1.8)]]


def test_the_score_is_the_largest_z_over_segments() -> None:
    clean = [[1.0, 5.0], [2.0, 7.0], [3.0, 12.0], [6.0, 8.0]]
    query = [[2.5, -9.0], [9.0, 8.0]]
    mean = [statistics.mean(row[j] for row in clean) for j in (0, 1)]
    spread = [statistics.stdev(row[j] for row in clean) for j in (0, 1)]
    z = [[(row[j] - mean[j]) / spread[j] for j in (0, 1)] for row in query]
    given = torch.tensor(query), torch.tensor(clean)
    assert TNC().score(*given).tolist() == pytest.approx([max(row) for row in z])
    both = [max(abs(one) for one in row) for row in z]
    assert TNC(sides="both").score(*given).tolist() == pytest.approx(both)
    assert TNC().score(*given)[0] < 0 < both[0]


def test_a_clean_input_is_compared_with_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1, 2, 3 and 10 the last is (10 - 2) / 1 deviations above the others; with itself among them it were 1.5."""
    values = torch.tensor([[1.0], [2.0], [3.0], [10.0]])
    monkeypatch.setattr(TNC, "segments", lambda self, model, inputs: values)
    done = TNC(noises=4, false_positives=0.25).defend(tiny_unet(), Knowledge(), generator(0, "x"))
    assert done.notes["clean_scores"][3] == pytest.approx(8)
    wanted = [(one - statistics.mean(rest)) / statistics.stdev(rest) for one, rest in OTHERS]
    assert done.notes["clean_scores"] == pytest.approx(wanted)
    assert done.screen_above is not None and sum(one > done.screen_above for one in wanted) == 1


OTHERS = [(one, [each for each in (1.0, 2.0, 3.0, 10.0) if each != one]) for one in (1.0, 2.0, 3.0, 10.0)]


def test_along_the_ode_the_exact_noise_of_one_image_does_not_change() -> None:
    """On the oracle of one image, DDIM keeps its noise from the first step to the last; DDPM's own noise changes it."""
    model = one_image_model(torch.full((1, 16, 16), 0.3))
    still, moved = (TNC(sampling_steps=10, eta=eta).changes(model, noises(3)) for eta in (0.0, 1.0))
    assert still.max() < 1e-6 and moved.min() > 1e-3
    flow = one_image_flow(torch.full((1, 16, 16), 0.3))
    assert TNC(sampling_steps=10).changes(flow, noises(3)).max() < 1e-6


def test_inputs_whose_predictions_jump_are_flagged_and_few_clean_ones_are() -> None:
    model = DiffusionModel(Answering(jump=0.5), scheduler())
    done = TNC(sampling_steps=20, noises=40).defend(model, Knowledge(), generator(0, "x"))
    assert done.screen is not None and done.screen_above is not None
    assert (done.screen(Box().stamp(noises(20, "other"))) > done.screen_above).all()
    assert (done.screen(noises(100, "other")) > done.screen_above).double().mean() < 0.15


@pytest.mark.parametrize("spec", [TNC(sampling_steps=6, segment=2, noises=5), TNC(sampling_steps=6, eta=1.0, noises=5)])
def test_it_judges_each_noise_by_itself(spec: TNC) -> None:
    done, again = (spec.defend(tiny_unet(), Knowledge(), generator(0, "x")) for _ in range(2))
    assert done.screen is not None and again.screen is not None
    given = noises(5)
    together = done.screen(given)
    assert together.shape == (5,) and torch.equal(together, again.screen(given))
    apart = torch.cat([done.screen(given[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_it_judges_each_prompt_by_itself_and_flags_one_benign_prompt_of_four(sd: DiffusionModel) -> None:
    spec = TNC(sampling_steps=6, segment=2, guidance=3.0)
    done = spec.defend(sd, Knowledge(prompts=PROMPTS), generator(0, "x"))
    given = Text().stamp(prompted(sd))
    assert done.screen is not None and done.screen_above is not None
    together = done.screen(given)
    apart = torch.cat([done.screen(given[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-2, atol=1e-2)
    assert len(set(together.tolist())) == 4
    assert (torch.tensor(done.notes["clean_scores"]) > done.screen_above).sum() == 1


def test_what_it_cannot_do_it_says(sd: DiffusionModel) -> None:
    flow = one_image_flow(torch.zeros(1, 16, 16))
    for spec, model, words in (
        (TNC(sampling_steps=1), tiny_unet(), r"use tnc\(sampling_steps=2\)"),
        (TNC(), tiny_ncsn(), r"use ufid\(sampler='ve-pc'\)"),
        (TNC(eta=1.0), flow, r"use tnc\(eta=0\)"),
        (TNC(), sd, "at least 3 clean prompts to compare with, and has 2"),
    ):
        with pytest.raises(ValueError, match=words):
            spec.defend(model, Knowledge(prompts=PROMPTS[:2]), generator(0, "x"))
