"""Structural pruning: which channels go, what stays whole, and the baselines built on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from harness.diffusion import checkpoint, events, pruned_shapes
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.judges import digits
from harness.methods import pruning
from harness.types import Data, Knowledge
from plugins.defenses.diff_pruning import DiffPruning
from plugins.defenses.magnitude_pruning import MagnitudePruning
from plugins.defenses.random_pruning import RandomPruning
from tests.oracles import scheduler, tiny_ncsn, tiny_unet

FAST: dict[str, Any] = {"ratio": 0.3, "steps": 2, "batch": 2, "bf16": False}


def norms(model: DiffusionModel) -> list[nn.GroupNorm]:
    return [m for m in model.denoiser.modules() if isinstance(m, nn.GroupNorm)]


def test_the_channels_with_the_smallest_scores_go_in_each_normalisation_group() -> None:
    score = torch.tensor([3.0, 1.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0])
    assert pruning.smallest(score, 2, 0.25, "up") == [1, 7]
    assert pruning.smallest(score, 1, 0.25, "up") == [1, 2]
    assert pruning.smallest(score, 2, 0.24, "down") == pruning.smallest(score, 2, 0.12, "released") == []
    assert pruning.smallest(score, 2, 0.24, "released") == [1, 7]  # 2 of the layer's 8, one of each run
    assert [len(pruning.smallest(torch.rand(c), 1, 0.02, "down")) for c in (64, 128, 256)] == [1, 2, 5]
    assert [len(pruning.smallest(torch.rand(c), 1, 0.02, "released")) for c in (64, 128, 256)] == [2, 3, 6]
    assert pruning.smallest(score, 2, 0.01, "up") == [1, 7]
    assert pruning.smallest(score, 2, 0.99, "up") == [0, 1, 2, 5, 6, 7]  # one of each group stays
    assert pruning.smallest(score, 3, 0.5, "up") == []


def test_a_pruned_network_of_the_digits_kind_runs_and_keeps_equal_normalisation_groups() -> None:
    model = DiffusionModel(digits.unet("positional"), scheduler())
    before = [(m.num_groups, m.num_channels) for m in norms(model)]
    with torch.random.fork_rng(devices=[]):
        done = pruning.prune(model, pruning.magnitude(), 0.25)
    for (groups, channels), norm in zip(before, norms(model), strict=True):
        assert norm.num_groups == groups and norm.num_channels == len(norm.weight) < channels
        assert norm.num_channels % groups == 0
    assert done["channels"] == pytest.approx(0.25, abs=0.01) and 0.4 < done["parameters"] < 0.46
    assert model.eps(torch.randn(2, 1, 16, 16), torch.tensor([3, 900])).shape == (2, 1, 16, 16)


SKIP: dict[str, Any] = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "block_out_channels": (32, 32, 64), "layers_per_block": 2,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "time scales and shifts": {"resnet_time_scale_shift": "scale_shift"},
    "resnets resize": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet blocks resize": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "improved DDPM": {
        "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
        "layers_per_block": 2,
    },
    "NCSN++": {
        **SKIP, "attention_head_dim": None, "center_input_sample": False, "freq_shift": 0, "norm_eps": 1e-6,
        "mid_block_scale_factor": 2**0.5, "norm_num_groups": None, "time_embedding_type": "fourier",
    },
    "NCSN++, time scales and shifts": {**SKIP, "resnet_time_scale_shift": "scale_shift"},
    "not square": {"sample_size": (16, 24)},
    "twice as wide as high": {"sample_size": (16, 32)},
    "higher than wide, one channel": {"sample_size": (24, 16), "in_channels": 1, "out_channels": 1},
    "Fourier features of the time": {"time_embedding_type": "fourier"},
    "learned embedding of the time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
}  # fmt: skip


FOURIER = LAYOUTS["Fourier features of the time"]


def layout(**changes: Any) -> UNet2DModel:
    plain: dict[str, Any] = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
        "norm_num_groups": 4, "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DModel(**{**plain, **changes}).eval()


@pytest.mark.parametrize("scope", ["all", "inner"])
@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_of_diffusers_runs_after_pruning_and_is_rebuilt_from_its_shapes(
    changes: dict[str, Any], scope: pruning.Scope
) -> None:
    with torch.random.fork_rng(devices=[]):
        model, empty = DiffusionModel(layout(**changes), scheduler()), layout(**changes)
        whole = {name: layer.weight.shape[0] for name, layer in convolutions(model.denoiser)}
        done = pruning.prune(model, pruning.magnitude(), 0.3, scope)
        x, t = torch.randn(2, *model.shape), torch.tensor([3, 900])
    assert done["parameters"] > 0.25
    inside = [name for name in whole if name.endswith(".conv1")]
    after = {name: layer.weight.shape[0] for name, layer in convolutions(model.denoiser)}
    assert inside and all(0.5 * whole[name] <= after[name] < whole[name] for name in inside)
    pruned_shapes.reshape(empty, pruned_shapes.reshaped(model.denoiser))
    empty.load_state_dict(model.denoiser.state_dict())
    again = DiffusionModel(empty, model.scheduler)
    assert torch.equal(again.eps(x, t), model.eps(x, t)) and model.eps(x, t).shape == x.shape


@pytest.mark.parametrize("make", [tiny_ncsn, lambda: DiffusionModel(layout(**FOURIER), scheduler())], ids=["ve", "vp"])
@pytest.mark.parametrize("scope", ["all", "inner", "time-attention"])
def test_the_frequencies_of_a_fourier_embedding_are_neither_pruned_nor_trained_nor_warned_of(
    make: Any, scope: pruning.Scope
) -> None:
    with torch.random.fork_rng(devices=[]):
        model = make()
        whole = model.denoiser.state_dict()["time_proj.weight"].clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = pruning.prune(model, pruning.magnitude(), 0.3, scope)
    assert done["parameters"] > 0 and "time_proj.weight" not in dict(model.denoiser.named_parameters())
    assert torch.equal(model.denoiser.state_dict()["time_proj.weight"], whole)
    assert "time_proj.weight" not in pruned_shapes.reshaped(model.denoiser)


def test_a_pruned_model_with_fourier_features_is_loaded_with_its_frequencies(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        model = DiffusionModel(layout(**FOURIER), scheduler())
        pruning.prune(model, pruning.magnitude(), 0.3)
        checkpoint.save(model, tmp_path / "m")
        again, x = checkpoint.load(tmp_path / "m"), torch.randn(2, *model.shape)
    assert torch.equal(model.eps(x, torch.tensor([3, 900])), again.eps(x, torch.tensor([3, 900])))


def test_a_channel_that_the_time_embedding_scales_and_shifts_goes_with_both_of_its_numbers() -> None:
    with torch.random.fork_rng(devices=[]):
        model = DiffusionModel(layout(resnet_time_scale_shift="scale_shift"), scheduler())
        net: Any = model.denoiser
        block = net.down_blocks[0].resnets[0]
        whole = block.time_emb_proj.weight.detach().clone()
        with torch.no_grad():
            block.conv1.weight[[0, 5, 10, 15]] *= 1e-3  # one channel of each of the four normalisation groups
            block.time_emb_proj.weight[[0, 5, 10, 15, 16, 21, 26, 31]] = 0.0
            block.norm2.weight[[0, 5, 10, 15]] = 0.0
            block.conv2.weight[:, [0, 5, 10, 15]] = 0.0
        pruning.prune(model, pruning.magnitude(), 0.25, "inner")
    kept = [i for i in range(16) if i not in (0, 5, 10, 15)]
    assert torch.equal(block.time_emb_proj.weight, whole[kept + [16 + i for i in kept]])


def convolutions(net: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]


def test_the_weights_that_stay_are_those_of_the_channels_with_the_larger_scores() -> None:
    model = tiny_unet()
    layer: Any = model.denoiser.get_submodule("mid_block.resnets.0.conv1")
    old = layer.weight.clone()
    order = torch.arange(8.0).flip(0)
    pruning.prune(model, lambda group: order[: len(group[0].idxs)], 0.5, scope="inner")
    # groups of two channels lose one each: the second, whose score is the smaller
    assert torch.equal(layer.weight, old[[0, 2, 4, 6]])


@pytest.mark.parametrize("make", [tiny_unet, tiny_ncsn], ids=["vp", "ve"])
def test_a_scope_leaves_other_layers_as_they_were(make) -> None:
    whole = {name: w.shape for name, w in make().denoiser.state_dict().items()}
    changed = {}
    for scope in ("inner", "time-attention"):
        model = make()
        pruning.prune(model, pruning.magnitude(), 0.5, scope=scope)
        changed[scope] = {name for name, w in model.denoiser.state_dict().items() if w.shape != whole[name]}
        assert set(pruned_shapes.reshaped(model.denoiser)) == changed[scope]
    assert all(any(part in name for part in ("conv1", "norm2", "conv2", "time_emb_proj")) for name in changed["inner"])
    assert all("time_emb" in name for name in changed["time-attention"])


def test_attention_keeps_its_heads_and_their_equal_sizes() -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    model = DiffusionModel(unet.eval().requires_grad_(False), scheduler())
    pruning.prune(model, pruning.magnitude(), 0.25)
    attention: list[Any] = [m for m in unet.modules() if type(m).__name__ == "Attention"]
    assert attention and all(m.heads == 2 and m.to_q.out_features == m.inner_dim == 12 for m in attention)
    assert model.eps(torch.randn(1, 1, 8, 8), torch.tensor([5])).isfinite().all()


def test_accumulated_gradients_are_those_of_the_sum_of_the_losses() -> None:
    model, x = tiny_unet(), torch.randn(2, 1, 16, 16, generator=generator(0, "x"))

    def loss(step: int) -> torch.Tensor:
        return (1 + step) * model.eps(x, torch.full((2,), step)).square().mean()

    total = pruning.accumulated(model, loss, range(3))
    model.denoiser.requires_grad_(True)
    sum(loss(step) for step in range(3)).backward()  # type: ignore[union-attr]
    for name, weight in model.denoiser.named_parameters():
        assert weight.grad is not None and torch.allclose(total[name], weight.grad, atol=1e-5), name


def test_diff_pruning_leaves_out_the_timesteps_after_the_first_with_a_small_loss() -> None:
    model, notes = tiny_unet(), {}
    model.eps = lambda x_t, t, context=None: x_t * 0 + t.view(-1, 1, 1, 1)  # type: ignore[method-assign]
    model.draw_eps = lambda n, rng: torch.full((n, *model.shape), 10.0)  # type: ignore[method-assign]
    model.denoiser.requires_grad_(True)

    def counted(model, loss, steps):
        return {"seen": [loss(t).item() for t in steps]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.methods.pruning.accumulated", counted)
        patch.setattr("harness.methods.pruning.taylor", lambda model, found: found)
        found = DiffPruning(least=0.05).importance(model, torch.zeros(2, 1, 16, 16), generator(0, "x"), notes)
    # (10 - t)² of 100 falls under 5 % at t = 8, which is the last that is looked at
    assert found == {"seen": [(10.0 - t) ** 2 for t in range(9)]} and notes["timesteps_scored"] == 9


@pytest.mark.parametrize("defense", [DiffPruning(**FAST, images=2), MagnitudePruning(**FAST), RandomPruning(**FAST)])
def test_pruning_defenses_leave_their_model_alone_repeat_and_say_what_they_removed(defense) -> None:
    schedule = DDPMScheduler(num_train_timesteps=8, beta_schedule="linear", clip_sample=False)
    model, known = (
        DiffusionModel(tiny_unet().denoiser, schedule),
        Knowledge(data=Data(torch.rand(8, 1, 16, 16) * 2 - 1)),
    )
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    once, again = (defense.defend(model, known, generator(3, "x")) for _ in range(2))
    assert all(torch.equal(before[k], v) for k, v in model.denoiser.state_dict().items())
    mine, theirs = (done.model.denoiser.state_dict() for done in (once, again))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert 0 < once.notes["pruned"]["parameters"] < 1 and len(once.notes["finetuning_loss"]) == 2
    assert not any(p.requires_grad for p in once.model.denoiser.parameters())


def test_the_scores_report_every_timestep_so_that_a_long_pass_is_no_silent_one() -> None:
    schedule = DDPMScheduler(num_train_timesteps=8, beta_schedule="linear", clip_sample=False)
    model, heard = DiffusionModel(tiny_unet().denoiser, schedule), []
    events.listen(heard.append)
    try:
        known = Knowledge(data=Data(torch.rand(4, 1, 16, 16) * 2 - 1))
        done = DiffPruning(**FAST, images=2, least=0).defend(model, known, generator(0, "x"))
    finally:
        events.listen(None)
    told = [(event["step"], event["total"]) for event in heard if event["phase"] == "scores"]
    assert told == [(i, 8) for i in range(1, 9)] and done.notes["timesteps_scored"] == 8


def test_another_seed_prunes_other_channels_at_random_and_none_by_magnitude() -> None:
    known = Knowledge(data=Data(torch.rand(8, 1, 16, 16) * 2 - 1))

    def first(defense, seed: int) -> torch.Tensor:
        return defense.defend(tiny_unet(), known, generator(seed, "x")).model.denoiser.conv_in.weight

    still = {**FAST, "steps": 0}
    assert torch.equal(first(MagnitudePruning(**still), 1), first(MagnitudePruning(**still), 2))
    assert not torch.equal(first(RandomPruning(**still), 1), first(RandomPruning(**still), 2))
