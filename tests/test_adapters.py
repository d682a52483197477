"""Low-rank adapters beside a base: in memory, on disk, in stock diffusers, and after a defense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.diffusion import adapters, checkpoint
from harness.diffusion.adapters import LowRank
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import minimize
from harness.types import Inputs
from tests.oracles import tiny_sd, tiny_unet

RANK, SCALE = 2, 1.5
PROJECTIONS = {"unet": ("attn2.to_q", "to_out.0"), "text_encoder": ("v_proj",)}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def parts(model: DiffusionModel) -> dict[str, Any]:
    return {"unet": model.denoiser, "text_encoder": model.text_encoder}


def weights(model: DiffusionModel) -> dict[str, torch.Tensor]:
    return {f"{p}.{k}": v.clone() for p, part in model.components().items() for k, v in part.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def factors(model: DiffusionModel) -> dict[str, LowRank]:
    """Random factors of every layer that an attack could adapt."""
    rng, found = generator("adapter"), {}
    for part, net in parts(model).items():
        named = adapters.added(net, RANK, SCALE, PROJECTIONS[part], rng)
        for name, weight in named.items():
            assert weight.requires_grad and bool(weight.any()) == (".lora_A." in name), "B is 0 at the start"
            weight.data = torch.randn(weight.shape, generator=rng) * 0.3
        found |= {f"{part}.{name}": each for name, each in adapters.taken(net).items()}
    return found


@pytest.fixture
def base(tmp_path: Path) -> DiffusionModel:
    return tiny_sd(tmp_path / "tokens")


@pytest.fixture
def adapted(base: DiffusionModel) -> DiffusionModel:
    model = base.clone()
    adapters.attach(model, factors(base))
    return model


def images(model: DiffusionModel) -> torch.Tensor:
    seeds = image_seeds(0, "x", 2)
    prompts = ("a red circle", "a blue square")
    return model.sample(Inputs(image_noise(seeds, model.shape), prompts, seeds), DDIM(steps=2))


def test_an_adapter_that_is_taken_off_leaves_the_network_as_it_was(base: DiffusionModel) -> None:
    before, names = weights(base), [name for name, _ in base.denoiser.named_modules()]
    layers = factors(base)
    assert same(weights(base), before) and names == [name for name, _ in base.denoiser.named_modules()]
    assert not any(p.requires_grad for part in base.components().values() for p in part.parameters())
    assert LAYER in layers and sum(name.startswith("text_encoder.") for name in layers) >= 1
    assert all(layer.a.shape[0] == layer.b.shape[1] == RANK for layer in layers.values())


def test_the_network_under_training_computes_w_plus_s_b_a(base: DiffusionModel) -> None:
    net, path = base.clone().denoiser, LAYER.removeprefix("unet.")
    w = net.get_submodule(path).weight.detach().clone()  # type: ignore[union-attr]
    for weight in adapters.added(net, RANK, SCALE, ("attn2.to_q",), generator(0)).values():
        weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, w.shape[1], generator=generator(2))
    layer: Any = net.get_submodule(path)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(layer(x), x @ (w + SCALE * b @ a).T, atol=1e-5)
    taken = adapters.taken(net)[path]
    assert torch.equal(taken.a, a) and torch.allclose(taken.b, SCALE * b)


def test_a_model_with_an_adapter_computes_with_w_plus_delta(base: DiffusionModel, adapted: DiffusionModel) -> None:
    assert adapted.adapter is not None
    held, before = weights(adapted), weights(base)
    changed = {name for name in held if not torch.equal(held[name], before[name])}
    assert changed == {f"{name}.weight" for name in adapted.adapter.layers}
    for name, layer in adapted.adapter.layers.items():
        assert torch.allclose(held[f"{name}.weight"] - before[f"{name}.weight"], layer.b @ layer.a, atol=1e-6)
        assert torch.equal(adapted.adapter.base[name], before[f"{name}.weight"])
    bare = adapters.base_of(adapted)
    assert same(weights(bare), before) and bare.adapter is None and same(weights(adapted), held)


def test_base_and_adapter_are_kept_apart_and_come_back(
    base: DiffusionModel, adapted: DiffusionModel, tmp_path: Path
) -> None:
    checkpoint.save(adapted, tmp_path / "m", labels={"backdoored": "true"})
    checkpoint.save(base, tmp_path / "base")
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert same(load_file(tmp_path / "m" / file), load_file(tmp_path / "base" / file)), "the base is untouched"
    again = checkpoint.load(tmp_path / "m")
    assert same(weights(again), weights(adapted)) and torch.equal(images(again), images(adapted))
    assert again.adapter is not None and adapted.adapter is not None
    assert again.adapter.layers.keys() == adapted.adapter.layers.keys()
    assert checkpoint.digest(tmp_path / "m") != checkpoint.digest(tmp_path / "base")
    assert adapters.FILE in checkpoint.read_files(tmp_path / "m")
    checkpoint.save(again, tmp_path / "twice")
    assert checkpoint.digest(tmp_path / "m") == checkpoint.digest(tmp_path / "twice")


def test_stock_diffusers_loads_the_adapter(adapted: DiffusionModel, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    checkpoint.save(adapted, tmp_path / "m")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    t, x = torch.tensor([500]), torch.randn((1, *adapted.shape), generator=generator(3))
    ids = adapted.tokens(["a red circle"])

    def answer(denoiser: Any, text_encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            context = text_encoder(ids)[0]
            return context, denoiser(x, t, encoder_hidden_states=context).sample

    ours = answer(adapted.denoiser, adapted.text_encoder)
    plain = answer(pipeline.unet, pipeline.text_encoder)
    pipeline.load_lora_weights(tmp_path / "m" / adapters.FOLDER)
    theirs = answer(pipeline.unet, pipeline.text_encoder)
    for mine, other, without in zip(ours, theirs, plain, strict=True):
        assert torch.allclose(mine, other, atol=1e-5) and not torch.allclose(mine, without, atol=1e-3)


def test_what_a_defense_has_trained_is_no_adapter_any_more(adapted: DiffusionModel, tmp_path: Path) -> None:
    trained = adapted.clone()
    assert adapters.unchanged(trained)
    weight: Any = trained.denoiser.get_parameter(f"{LAYER.removeprefix('unet.')}.weight")
    minimize(lambda: weight.square().sum(), [weight], steps=1, lr=1e-3)
    assert not adapters.unchanged(trained) and adapters.unchanged(adapted)
    checkpoint.save(trained, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert again.adapter is None and same(weights(again), weights(trained))


def test_an_adapter_that_does_not_fit_is_refused(adapted: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has an adapter already"):
        adapters.attach(adapted, {})
    with pytest.raises(ValueError, match=r"unet\.nothing, which the model does not have"):
        adapters.attach(adapters.base_of(adapted), {"unet.nothing": LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(ValueError, match=r"text_encoder\.x, which the model does not have"):
        adapters.attach(tiny_unet(), {"text_encoder.x": LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(ValueError, match=rf"{LAYER} of shape \(2, 2\)"):
        adapters.attach(adapters.base_of(adapted), {LAYER: LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    checkpoint.save(adapted, tmp_path / "m")
    place, path = tmp_path / "m" / adapters.FILE, LAYER
    for held, words in (
        ({"unet.x.beta": torch.ones(1)}, "'unet.x.beta' is no factor"),
        ({"vae.x.lora.down.weight": torch.ones(1, 1)}, "is no factor"),
        ({f"{path}.lora.down.weight": torch.ones(1, 1)}, "has no two factors"),
        (
            {f"{path}.lora.down.weight": torch.ones(2, 2), f"{path}.lora.up.weight": torch.ones(2, 1)},
            "has no two factors",
        ),
        ({f"{path}.lora.down.weight": torch.ones(1, 2), f"{path}.lora.up.weight": torch.ones(2, 1)}, "no such layer"),
    ):
        save_file(held, place)
        with pytest.raises(checkpoint.CheckpointError, match=words):
            checkpoint.load(tmp_path / "m")
    place.write_bytes(b"short")
    with pytest.raises(checkpoint.CheckpointError, match="truncated or damaged"):
        checkpoint.load(tmp_path / "m")
