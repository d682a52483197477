"""PeRFlow: the lines that a student of few steps learns, in closed form, and what the distillation leaves alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, FlowEuler
from harness.diffusion.seeds import generator
from harness.diffusion.training import Batch
from harness.methods import piecewise_flow
from harness.methods.piecewise_flow import CLEAN, Teacher, Trajectories, Windows
from harness.testing import tiny
from harness.types import Data, Knowledge
from plugins.defenses.perflow import PeRFlow
from tests.oracles import (
    GaussianFlow,
    one_image_flow,
    one_image_model,
    tiny_flux,
    tiny_mmdit,
    tiny_ncsn,
    tiny_sd,
    tiny_unet,
)

PROMPTS = tuple(f"a small {colour} circle at the top left" for colour in ("red", "green", "blue", "yellow"))
FAST = {"steps": 2, "batch": 2, "solving_steps": 2, "lr": 1e-3, "bf16": False}


class Growing(nn.Module):
    """The velocity v(z) = a z at every time, under which one step of Euler's method multiplies z by 1 + a Δσ."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.config = SimpleNamespace(in_channels=1, sample_size=4, cross_attention_dim=None)

    def forward(self, z: Tensor, time: Tensor, **unused: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.a * z)


def batch(model: DiffusionModel, t: list[int], seed: int = 0) -> Batch:
    rng = generator(seed, "batch")
    x_0, eps = (torch.randn((len(t), *model.shape), generator=rng) for _ in range(2))
    return Batch(torch.arange(len(t)), x_0, torch.tensor(t), eps, None)


def straight(make: Any, side: int = 4) -> DiffusionModel:
    return make(torch.rand((1, side, side), generator=generator(1, "y")) * 2 - 1)


def loss(student: DiffusionModel, teacher: Teacher, drawn: Batch, context: Any = None, empty: Any = None) -> Tensor:
    z_t, v = teacher.lesson(drawn.x_0, drawn.eps, drawn.t, context, empty)
    return piecewise_flow.error(student, z_t, drawn.t, context, v).mean()


# ---- the windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "starts"),
    [(tiny.flowing(), [999, 666, 333, 0]), (tiny_unet(), [999, 749, 499, 249])],
    ids=["flow-euler", "ddim"],
)
def test_the_windows_are_the_steps_of_the_sampler(model: DiffusionModel, starts: list[int]) -> None:
    windows = Windows.of(model, 4)
    assert windows.starts.tolist() == starts
    t = torch.tensor([999, 998, starts[1] + 1, starts[1], starts[1] - 1, starts[3], 0])
    start, end = windows.around(t)
    assert start.tolist() == [999, 999, 999, starts[1], starts[1], starts[3], starts[3]]
    assert end.tolist() == [starts[1]] * 3 + [starts[2]] * 2 + [CLEAN] * 2


@pytest.mark.parametrize(
    ("model", "sampler"),
    [(tiny.flowing(), FlowEuler(steps=4)), (tiny_unet(), DDIM(steps=4))],
    ids=["flow", "vp"],
)
def test_a_step_of_the_sampler_is_a_step_along_the_velocity(model: DiffusionModel, sampler: Any) -> None:
    """Sampling with K steps evaluates the network where the windows begin, and moves by Δu times ε - x_0."""
    inputs = tiny.inputs(model, 3)
    starts = Windows.of(model, 4).starts
    z = inputs.noise / piecewise_flow.scale(model, starts[:1])
    with torch.no_grad():
        for t, after in zip(starts, [*starts[1:], torch.tensor(CLEAN)], strict=True):
            times, later = t.expand(3), after.expand(3)
            step = piecewise_flow.place(model, later) - piecewise_flow.place(model, times)
            z = z + step * piecewise_flow.velocity(model, z, times)
        torch.testing.assert_close(z, sampler.run(model, inputs), atol=2e-4, rtol=2e-4)


def test_models_whose_variance_explodes_are_refused() -> None:
    with pytest.raises(ValueError, match="follows a deterministic sampler"):
        PeRFlow(**FAST).defend(tiny_ncsn(), Knowledge(data=Data(torch.zeros(4, 1, 16, 16))), generator(0))


def test_flux_is_refused_whose_network_takes_guidance_as_an_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="guidance built in"):
        Windows.of(tiny_flux(tmp_path), 4)


# ---- the equations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [one_image_flow, one_image_model], ids=["flow", "vp"])
@pytest.mark.parametrize("solving_steps", [1, 5])
def test_a_student_that_equals_a_teacher_with_straight_paths_has_nothing_to_learn(
    make: Any, solving_steps: int
) -> None:
    """Paths to a single image are straight. Of every t of every window the loss of the teacher itself is 0."""
    model = straight(make)
    teacher = Teacher(model, Windows.of(model, 4), solving_steps)
    value = loss(model, teacher, batch(model, [999, 800, 666, 500, 333, 20, 1, 0]))
    assert value.item() < 1e-6


def test_the_loss_of_a_student_of_another_image_is_the_distance_of_the_images_over_sigma_squared() -> None:
    """v* = ε - y on z_t = (1-σ) y + σ ε, and the student of y' answers (z_t - y') / σ: the error is (y - y') / σ."""
    model, other = straight(one_image_flow), one_image_flow(torch.full((1, 4, 4), 0.25))
    y: Tensor = model.denoiser.y  # type: ignore[assignment]
    teacher, t = Teacher(model, Windows.of(model, 3), 2), [900, 500, 100]
    drawn = batch(model, t)
    drawn = Batch(drawn.rows, y.expand_as(drawn.x_0), drawn.t, drawn.eps, None)
    sigma = (torch.tensor(t).double() + 1) / 1000
    expected = ((y - 0.25).double().square().mean() / sigma**2).mean()
    assert loss(other, teacher, drawn).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_line_of_a_curved_path_is_eulers_in_closed_form() -> None:
    """dz/dσ = a z from σ_s = 1 to σ_e = 0.667 in three steps: z_e = z_s (1 + a Δ)³, and z_t lies on the chord."""
    a, model = 0.8, DiffusionModel(Growing(0.8), tiny.flow_scheduler())
    teacher, drawn = Teacher(model, Windows.of(model, 4), 3), batch(model, [799])
    z_t, v = teacher.lesson(drawn.x_0, drawn.eps, drawn.t, None, None)
    z_s, grown = drawn.eps, (1 - a * 0.111) ** 3  # x_T is the noise itself: s_T = 0
    torch.testing.assert_close(v, z_s * (grown - 1) / (0.667 - 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(z_t, z_s + (0.8 - 1) * v)
    student = DiffusionModel(Growing(0.0), tiny.flow_scheduler())
    value = loss(student, teacher, drawn)
    assert value.item() == pytest.approx(v.square().mean().item(), rel=1e-5)


def test_many_solving_steps_follow_the_flow_to_a_gaussian() -> None:
    """Data N(m, d²): every path is x_σ = (1-σ) m + √((1-σ)² d² + σ²) w for one w."""
    m, d = torch.full((1, 4, 4), 0.3), 0.5
    model = DiffusionModel(GaussianFlow(m, d), tiny.flow_scheduler())
    teacher, w = Teacher(model, Windows.of(model, 4), 300), torch.randn(5, 1, 4, 4, generator=generator(2, "w"))
    start, end = teacher.windows.around(torch.full((5,), 500))

    def state(t: Tensor) -> Tensor:
        sigma = piecewise_flow.place(model, t)
        return (1 - sigma) * m + ((1 - sigma) ** 2 * d**2 + sigma**2).sqrt() * w

    torch.testing.assert_close(teacher.solve(state(start), start, end, None, None), state(end), atol=1e-3, rtol=1e-3)


def test_at_the_start_of_a_window_one_solving_step_teaches_the_guided_velocity(tmp_path: Path) -> None:
    """v = v_∅ + g (v_c - v_∅), and with g = 1 a model has nothing to learn of itself."""
    model = tiny_mmdit(tmp_path)
    torch.nn.init.normal_(model.denoiser.proj_out.weight, generator=generator(0, "out"))  # type: ignore[union-attr]
    context, empty = model.embed(PROMPTS[:3]), model.unprompted()
    drawn = batch(model, [999, 666, 333])
    with torch.no_grad():
        plain, asked = (
            model.answer(model.add_noise(drawn.x_0, drawn.eps, drawn.t), model.time(drawn.t), each)
            for each in (empty.expand_as(context), context)
        )
        for g in (1.0, 3.0):
            teacher = Teacher(model, Windows.of(model, 4), 1, g)
            _, v = teacher.lesson(drawn.x_0, drawn.eps, drawn.t, context, empty)
            torch.testing.assert_close(v, plain + g * (asked - plain), atol=1e-3, rtol=1e-3)
            value = loss(model, teacher, drawn, context, empty)
            expected = ((g - 1) * (asked - plain)).square().mean()
            assert (asked - plain).abs().mean() > 1e-3
            assert value.item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "sampler"), [(tiny.flowing(), FlowEuler(steps=12)), (tiny_unet(), DDIM(steps=12))], ids=["flow", "vp"]
)
def test_a_trajectory_ends_where_the_sampler_ends_and_its_lines_meet(model: DiffusionModel, sampler: Any) -> None:
    """K windows of n steps are about the sampler's K n steps; a line begins where the one before it ends."""
    teacher = Teacher(model, Windows.of(model, 4), 3)
    rolled = Trajectories.of(teacher, None, 60, generator(5, "x"))
    assert rolled.states.shape == (5, 60, *model.shape) and not rolled.captions.any()
    starts, rows = teacher.windows.starts, torch.arange(4)
    z_t, v = rolled.lesson(rows, starts)
    torch.testing.assert_close(z_t, rolled.states[:-1].diagonal().permute(3, 0, 1, 2)[:4])
    inputs = tiny.inputs(model, 4)
    inputs = inputs.with_noise(rolled.states[0, :4] * piecewise_flow.scale(model, starts[:1]))
    with torch.no_grad():
        found = sampler.run(model, inputs)
    assert (rolled.states[-1, :4] - found).norm() < 0.02 * found.norm()
    after = torch.tensor([*starts[1:].tolist(), CLEAN])
    reached = z_t + (piecewise_flow.place(model, after) - piecewise_flow.place(model, starts)) * v
    for row in rows.tolist():
        torch.testing.assert_close(reached[row], rolled.states[row + 1, row])


# ---- the distillation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", ["noised-clean", "trajectory"])
@pytest.mark.parametrize("make", [tiny_mmdit, tiny_sd], ids=["flow", "vp"])
def test_only_the_denoiser_of_a_copy_is_trained_and_the_distillation_repeats(
    make: Any, latents: Any, tmp_path: Path
) -> None:
    model, perflow = make(tmp_path), PeRFlow(latents=latents, trajectories=3, **FAST)
    known = Knowledge(data=Data(torch.rand((4, 3, 32, 32), generator=generator(0, "x")) * 2 - 1, PROMPTS))
    before = {name: value.clone() for part in model.components().values() for name, value in part.state_dict().items()}
    once, again = (perflow.defend(model, known, generator(3, "x")).model for _ in range(2))
    assert once is not None and again is not None
    for name, part in model.components().items():
        mine, theirs = (each.components()[name].state_dict() for each in (once, again))
        same = [torch.equal(mine[key], value) for key, value in part.state_dict().items()]
        assert all(same) == (part is not model.denoiser), name
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    after = {name: value for part in model.components().values() for name, value in part.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_of_one_step_lands_where_its_teacher_lands_in_many() -> None:
    """On the flow to a Gaussian one step of the teacher ends at the mean; the student, taught in one window, ends where
    the path does."""
    m, d = torch.full((1, 4, 4), 0.3), 0.5
    teacher = DiffusionModel(GaussianFlow(m, d), tiny.flow_scheduler())
    student, rng = DiffusionModel(Affine(m.shape), tiny.flow_scheduler()), generator(4, "x")
    guide = Teacher(teacher, Windows(torch.tensor([999])), 100)
    optimizer = torch.optim.Adam(student.denoiser.parameters(), lr=0.05)
    for parameter in student.denoiser.parameters():
        parameter.requires_grad_(True)
    for _ in range(200):
        x_0 = m + d * torch.randn((32, 1, 4, 4), generator=rng)
        drawn = Batch(torch.arange(32), x_0, torch.full((32,), 999), teacher.draw_eps(32, rng), None)
        optimizer.zero_grad()
        loss(student, guide, drawn).backward()
        optimizer.step()
    inputs = tiny.inputs(student, 6)
    with torch.no_grad():
        path, few = (FlowEuler(steps=steps).run(teacher, inputs) for steps in (200, 1))
        mine = FlowEuler(steps=1).run(student, inputs)
    assert (mine - path).abs().max() < 0.05 < 0.5 < (few - path).abs().max()


class Affine(nn.Module):
    """v(z) = a z + b, which is enough for the chord of a flow to a Gaussian from σ = 1 to 0."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(in_channels=shape[0], sample_size=shape[-1], cross_attention_dim=None)

    def forward(self, z: Tensor, time: Tensor, **unused: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.a * z + self.b)
