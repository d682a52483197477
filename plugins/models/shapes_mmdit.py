"""shapes-mmdit: a small Stable Diffusion 3 of drawn shapes, 3×32×32, with the data and captions of shapes-sd.

It is a StableDiffusion3Pipeline without T5 (Esser et al., arXiv:2403.03206): an SD3Transformer2DModel of four blocks on
4×16×16 latents in patches of 2 (64 tokens of the image beside 36 of the text), two CLIPTextModelWithProjection, and
flow matching with a shift of 1. Tokenizer, VAE, judge and CLIP are those of shapes-sd; with the neutral words they are
read from its folder. Of the first text encoder the embeddings and two layers begin as those of shapes-sd; the
second, narrower one begins at random. Both are trained on text alone and then frozen, as in Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import (
    CaptionedShapes,
    CNNJudge,
    Data,
    DiffusionModel,
    Family,
    FlowEuler,
    Inputs,
    captioned_shapes,
    checkpoint,
    draw,
    generator,
    hookimpl,
    image_noise,
    image_seeds,
    interrupted,
    minimize,
    shapes,
    training_recipes,
)

WIDTHS = (96, 64)  # of the text encoders and of their projections
LAYERS = (3, 2)  # of the text encoders; the denoiser reads the state before the last
HEADS, HEAD, BLOCKS = 4, 32, 4  # of the transformer
DRAWINGS = 12000  # of the training


@dataclass(frozen=True)
class ShapesMMDiT(CaptionedShapes):
    name: ClassVar[str] = "shapes-mmdit"
    version: ClassVar[int] = 1
    family: ClassVar[Family] = "flow"
    borrowed: ClassVar[Mapping[str, str]] = captioned_shapes.JOINT

    @property
    def parts(self) -> Path:
        return checkpoint.embedded(self, captioned_shapes.DRAWN)

    def build(
        self, out: Path, device: str = "cpu", steps: int = 4200, text_steps: int = 1200, batch: int = 128, n: int = 400
    ) -> dict[str, Any]:
        """Trains both text encoders and the transformer on `device`, writes the model below `out`, returns the facts.

        A build that was stopped goes on where it was. batch: drawings per step of the
        transformer. n: held-out captions on which the model is measured.
        """
        neutral, state = self.words(), out / interrupted.UNFINISHED
        model = untrained(checkpoint.load(self.parts / "model")).to(device)
        drawn = shapes.scenes(DRAWINGS, "train", generator(captioned_shapes.DRAWN, "data"))
        data = pictures(drawn, neutral)
        facts: dict[str, Any] = {"parts_of": checkpoint.digest(self.parts)}
        for place in (0, 1):
            facts |= train_text(model, place, data, text_steps, state)
        facts |= train_transformer(model, data.images, drawn, neutral, steps, batch, state)
        checkpoint.save(model.to("cpu"), out / "model", fp16=True)
        self.give_back(out / "model")
        return facts | sizes(model) | quality(model, self.judge(), neutral, n)


def pictures(drawn: Sequence[shapes.Scene], neutral: Sequence[str]) -> Data:
    """Drawings of the scenes, each with one of its captions."""
    rng = generator("shapes-mmdit", "data")
    captions = tuple(shapes.caption(scene, rng, neutral) for scene in drawn)
    return Data(shapes.draw(drawn, rng), captions)


def untrained(like: DiffusionModel) -> DiffusionModel:
    """The model with new weights but for tokenizer, VAE and the first layers of a text encoder, those of `like`.

    Modulations and the last layer are 0 at first, so that each block begins as the identity (DiT, arXiv:2212.09748).
    """
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only this recipe depends on it
    transformer: Any = SD3Transformer2DModel(
        sample_size=shapes.SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=BLOCKS,
        attention_head_dim=HEAD, num_attention_heads=HEADS, joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=HEADS * HEAD, pooled_projection_dim=sum(WIDTHS), pos_embed_max_size=shapes.SIDE // 4,
        qk_norm="rms_norm",
    )  # fmt: skip
    modulations = [norm.linear for b in transformer.transformer_blocks for norm in (b.norm1, b.norm1_context)]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    tokens, earlier = like.tokenizer, like.text_encoder
    assert like.vae is not None and earlier is not None
    first, second = (text_encoder(tokens, width, layers) for width, layers in zip(WIDTHS, LAYERS, strict=True))
    known = {"text_model." + name.removeprefix("text_model."): value for name, value in earlier.state_dict().items()}
    known = {name: value for name, value in known.items() if name in first.state_dict() and "final" not in name}
    first.load_state_dict(known, strict=False)
    like.vae.register_to_config(shift_factor=0.0)
    return DiffusionModel(transformer, FlowMatchEulerDiscreteScheduler(), like.vae, first, tokens, second, tokens)


def text_encoder(tokens: Any, width: int, layers: int) -> Any:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

    end = tokens.eos_token_id
    made: Any = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokens.model_max_length,
            projection_dim=width,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    torch.nn.init.normal_(made.get_input_embeddings().weight, std=0.3)  # as in shapes-sd
    return made


def train_text(model: DiffusionModel, place: int, data: Data, steps: int, state: Path) -> dict[str, float]:
    """Trains one text encoder (0 or 1) to keep the whole text; see `training_recipes.train_text`.

    What must be predicted from the state before the last must be predicted from the pooled projection instead, at every
    other position behind the end of the text. The pooled projection therefore says which tokens the text has.
    """
    encoder: Any = (model.text_encoder, model.text_encoder_2)[place]
    tokens: Any = model.tokenizer
    rng = generator("shapes-mmdit", "text", place)

    def states(rows: Tensor) -> Tensor:
        found = encoder(rows, output_hidden_states=True)
        behind = (rows == tokens.eos_token_id) & (torch.arange(rows.shape[1], device=rows.device) % 2 == 0)
        return torch.where(behind.unsqueeze(2), found.text_embeds.unsqueeze(1), found.hidden_states[-2])

    loss = training_recipes.train_text(
        states, encoder.parameters(), tokens, model.tokens(data.captions or ()).cpu(), rng, steps, width=WIDTHS[place],
        batch=64, device=model.device, kept=interrupted.Kept(state / f"text-{place}.safetensors", rng),
    )  # fmt: skip
    encoder.eval().requires_grad_(False)
    return {f"text_loss_{place + 1}": loss, "text_steps": steps}


def train_transformer(
    model: DiffusionModel, images: Tensor, drawn: Sequence[shapes.Scene], neutral: Sequence[str], steps: int,
    batch: int, state: Path, lr: float = 1.5e-3,
) -> dict[str, Any]:  # fmt: skip
    """Trains the transformer on ‖v - v_θ(x_σ, σ, τ(c))‖², with a tenth of the captions dropped.

    Every step writes new captions for its images. σ is the sigmoid of a standard normal number, as in SD3, and uniform
    in a fifth of the rows, so that its ends are seen as well.
    """
    rng = generator("shapes-mmdit", "transformer")
    z, empty = model.encode(images), captioned_shapes.contexts(model, [""])

    def loss() -> Tensor:
        rows = draw(batch, len(z), rng)
        dropped = (torch.rand(batch, 1, 1, generator=rng) < 0.1).to(model.device)
        uniform = torch.rand(batch, generator=rng)
        level = torch.randn(batch, generator=rng).sigmoid()
        level = torch.where(torch.rand(batch, generator=rng) < 0.2, uniform, level).to(model.device)
        eps, x_0 = model.draw_eps(batch, rng), z[rows]
        captions = [shapes.caption(drawn[i], rng, neutral) for i in rows.tolist()]
        context = torch.where(dropped, empty, captioned_shapes.contexts(model, captions))
        sigma = level.view(-1, 1, 1, 1)
        answer = model.answer((1 - sigma) * x_0 + sigma * eps, model.T * level, context)
        return (answer - (eps - x_0)).square().mean()

    losses = minimize(
        loss, model.denoiser.parameters(), steps=steps, lr=lr, schedule="one-cycle", ema=0.998, weight_decay=0.01,
        bf16=model.device.type == "cuda", phase="transformer",
        kept=interrupted.Kept(state / "transformer.safetensors", rng),
    )  # fmt: skip
    model.denoiser.eval().requires_grad_(False)
    return {"steps": steps, "batch": batch, "final_loss": sum(losses[-300:]) / len(losses[-300:])}


def sizes(model: DiffusionModel) -> dict[str, int]:
    return {
        f"parameters_{name}": sum(p.numel() for p in part.parameters()) for name, part in model.components().items()
    }


def quality(model: DiffusionModel, judge: CNNJudge, neutral: Sequence[str], n: int) -> dict[str, Any]:
    """Attribute accuracy on the n held-out captions of shapes-sd's provenance (combinations never seen in training)."""
    rng = generator(captioned_shapes.DRAWN, "quality")
    drawn = shapes.scenes(n, "test", rng, plain=True)
    prompts = tuple(shapes.caption(scene, rng, neutral) for scene in drawn)
    seeds = image_seeds(0, "quality", n)
    images = model.sample(Inputs(image_noise(seeds, model.shape), prompts, seeds), FlowEuler(steps=20))
    return {"held_out_captions": n, **captioned_shapes.accuracies(judge, images, drawn)}


@hookimpl
def models() -> list[type]:
    return [ShapesMMDiT]
