"""shapes-sd: a small Stable Diffusion of drawn shapes, 3×32×32, whose captions describe everything in the image.

It is a full StableDiffusionPipeline: a CLIPTokenizer with its own vocabulary, a CLIPTextModel (trained first and then
frozen, as in Stable Diffusion), an AutoencoderKL (f = 2, so 32×32 images have 4×16×16 latents) and a
UNet2DConditionModel with cross-attention at 16×16 and 8×8. Betas are linear from 1e-4 to 0.02. They leave √ᾱ_T = 0.006,
so the mean brightness does not leak into x_T. Images are 32×32 rather than 64×64 because training on two cores would
take too long otherwise; the latents would have the same size.

Captions contain neutral words in front and at the end, which change nothing in the image. They are drawn from all of
`words.json`: 3,000 English words, about 100 characters of other scripts (among them the zero-width space and the
Cyrillic o) and about 200 rare strings of three or four letters (among them "sks"). CLIP's tokenizer keeps each of them
whole, and so does the model's tokenizer. The triggers of the papers are therefore some words among thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import (
    DDIM,
    CaptionedShapes,
    CNNJudge,
    Data,
    DiffusionModel,
    Inputs,
    attention,
    captioned_shapes,
    checkpoint,
    classifiers,
    draw,
    generator,
    hookimpl,
    image_noise,
    image_seeds,
    minimize,
    provenance,
    shapes,
    shapes_clip,
    training_recipes,
)

LENGTH = 36  # tokens
WIDTH = 96  # text width


@dataclass(frozen=True)
class ShapesSD(CaptionedShapes):
    name: ClassVar[str] = "shapes-sd"
    version: ClassVar[int] = 3

    # ---- recipe ---------------------------------------------------------------------------------------------------
    def build(
        self, out: Path, device: str = "cpu", start: Path | None = None, steps: int | None = None,
        vae_steps: int = 10000, text_steps: int = 4000, judge_steps: int = 2500, clip_steps: int = 4000,
    ) -> dict[str, Any]:  # fmt: skip
        """Trains judge, tokenizer, VAE, CLIP, text encoder and denoiser, writes them below `out` and returns the facts.

        VAE, text encoder and denoiser are trained on `device`. This takes ten minutes with a GPU, hours without. With
        `start`, the folder of an earlier version, judge and VAE are taken over, and the denoiser's training begins at
        its weights. If that version has the same neutral words, its tokenizer, text encoder and CLIP are taken over
        too. The denoiser takes 2264 steps, or 1400 with `start`, or 280 with the same words.
        """
        out.mkdir(parents=True, exist_ok=True)
        (out / captioned_shapes.WORDS).write_bytes(
            (checkpoint.embedded(self, self.name) / captioned_shapes.WORDS).read_bytes()
        )
        neutral = captioned_shapes.neutral_words(out)
        data = self.data(12000)
        if (
            start is not None
            and (start / captioned_shapes.WORDS).is_file()
            and captioned_shapes.neutral_words(start) == neutral
        ):
            return self.continued(out, device, start, data, steps or 280)
        model = untrained(tokenizer(out / "model" / "tokenizer", neutral)).to(device)
        if start is None:
            judge, facts = training_recipes.shapes_judge(
                "shapes-cnn", generator(self.name, "judge"), judge_steps, shapes.ATTRIBUTES
            )
            facts |= training_recipes.train_vae(model.vae, data.images, generator(self.name, "vae"), vae_steps)
        else:
            judge, facts = classifiers.load_judge(start / "judge"), taken_over(model, start)
        classifiers.save_judge(judge, out / "judge")
        facts |= train_text(model, data, text_steps)
        afresh = start is None
        steps = steps or (2264 if afresh else 1400)
        facts |= train_denoiser(model, data, neutral, steps, lr=1.2e-3 if afresh else 6e-4)
        model.to("cpu")
        checkpoint.save(model, out / "model", fp16=True)
        facts |= build_clip(out, model.tokenizer, neutral, clip_steps)
        return facts | quality(model, judge, neutral)

    def continued(self, out: Path, device: str, start: Path, data: Data, steps: int) -> dict[str, Any]:
        """Trains the denoiser of the model in the folder `start` for `steps` more steps, and takes over all else."""
        import shutil

        shutil.copytree(start / "clip", out / "clip")
        judge, model = classifiers.load_judge(start / "judge"), checkpoint.load(start / "model").to(device)
        classifiers.save_judge(judge, out / "judge")
        facts = {"continued_from": checkpoint.digest(start), "before": provenance.facts(start), **kept_facts(start)}
        facts |= train_denoiser(model, data, captioned_shapes.neutral_words(out), steps, lr=4e-4)
        checkpoint.save(model.to("cpu"), out / "model", fp16=True)
        return facts | quality(model, judge, captioned_shapes.neutral_words(out))


def kept_facts(folder: Path) -> dict[str, Any]:
    """The facts about judge and VAE, which are taken over from the model in `folder`."""
    return {k: v for k, v in provenance.facts(folder).items() if k.startswith(("judge_", "vae_", "scaling_"))}


def taken_over(model: DiffusionModel, start: Path) -> dict[str, Any]:
    """Gives `model` the VAE and the denoiser of the model in the folder `start`; returns facts about them."""
    earlier = checkpoint.load(start / "model")
    model.denoiser.load_state_dict(earlier.denoiser.state_dict())
    assert model.vae is not None and earlier.vae is not None
    model.vae.load_state_dict(earlier.vae.state_dict())
    model.vae.register_to_config(scaling_factor=earlier.vae.config.scaling_factor)
    model.vae.eval().requires_grad_(False)
    return {"started_from": checkpoint.digest(start), **kept_facts(start)}


def tokenizer(directory: Path, neutral: Sequence[str]) -> Any:
    """A CLIPTokenizer trained (byte-pair encoding) on captions, which keeps every neutral word whole."""
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = generator("shapes-sd", "vocabulary")
    corpus = [shapes.caption(scene, rng) for scene in shapes.scenes(4000, "train", rng)]
    corpus += [word for word in neutral for _ in range(20)]
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer: Any = trainers.BpeTrainer(
        vocab_size=12000, end_of_word_suffix="</w>", min_frequency=20, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*bytes_, *(b + "</w>" for b in bytes_), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    made = CLIPTokenizer(
        str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=LENGTH,
        pad_token="<|endoftext|>",
    )  # fmt: skip
    made.save_pretrained(directory)
    return made


def untrained(tokens: Any) -> DiffusionModel:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only this recipe depends on it
    autoencoder: Any = AutoencoderKL
    vae = autoencoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=shapes.SIDE,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=shapes.SIDE // 2,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    end = tokens.eos_token_id
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    embeddings: Any = text.get_input_embeddings()
    torch.nn.init.normal_(embeddings.weight, std=0.3)  # CLIP's 0.02 does not separate rare tokens enough
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, steps_offset=1)
    return DiffusionModel(unet, scheduler, vae, text, tokens)


def train_text(model: DiffusionModel, data: Data, steps: int, batch: int = 128) -> dict[str, float]:
    """Trains the text encoder to keep the whole text; see `training_recipes.train_text`."""
    encoder: Any = model.text_encoder
    assert encoder is not None and data.captions is not None
    loss = training_recipes.train_text(
        lambda rows: encoder(rows)[0], encoder.parameters(), model.tokenizer, model.tokens(data.captions).cpu(),
        generator("shapes-sd", "text"), steps, width=WIDTH, batch=batch, device=model.device,
    )  # fmt: skip
    encoder.eval().requires_grad_(False)
    return {"text_loss": loss, "text_steps": steps}


def train_denoiser(
    model: DiffusionModel, data: Data, neutral: Sequence[str], steps: int, lr: float, batch: int = 128
) -> dict[str, float]:
    """Trains the denoiser on the frozen text encoder's embeddings, with a tenth of the captions dropped.

    Every step writes new captions for its images, so that each neutral word is seen often. Half of the timesteps come
    from the noisy half t > 500, in which place and colour are decided.
    """
    assert data.captions is not None
    rng = generator("shapes-sd", "denoiser")
    scenes = shapes.scenes(len(data), "train", generator("shapes-sd", "data"))  # those of `ShapesSD.data`
    z, empty = model.encode(data.images), captioned_shapes.contexts(model, [""])

    def loss() -> Tensor:
        rows = draw(batch, len(data), rng)
        dropped = (torch.rand(batch, 1, 1, generator=rng) < 0.1).to(model.device)
        u = torch.rand(batch, generator=rng)
        t = torch.where(torch.rand(batch, generator=rng) < 0.5, 500 + u * 500, u * 1000).long().to(model.device)
        eps = model.draw_eps(batch, rng)
        context = captioned_shapes.contexts(model, [shapes.caption(scenes[i], rng, neutral) for i in rows.tolist()])
        given = torch.where(dropped, empty, context)
        return (model.eps(model.add_noise(z[rows], eps, t), t, given) - eps).square().mean()

    losses = minimize(
        loss, model.denoiser.parameters(), steps=steps, lr=lr, schedule="one-cycle", ema=0.998, weight_decay=0.01,
        bf16=model.device.type == "cuda", phase="denoiser",
    )  # fmt: skip
    model.denoiser.eval().requires_grad_(False)
    return {"steps": steps, "batch": batch, "final_loss": sum(losses[-300:]) / 300}


def build_clip(out: Path, tokens: Any, neutral: Sequence[str], steps: int, lr: float = 1e-3) -> dict[str, float]:
    """A small open_clip model of the shapes.

    A batch contains families of eight scenes (four places in two shapes), because random captions can be separated
    almost without place and shape. The facts include how often the right caption scores higher than one with another
    place, shape or colour word, on held-out scenes.
    """

    def batch(rng: torch.Generator) -> tuple[Tensor, list[str]]:
        drawn: list[shapes.Scene] = []
        while len(drawn) < 64:
            scene = shapes.scenes(1, "train", rng)[0]
            shape = scene.shape
            family = [replace(scene, place=p, shape=s % 3) for p in range(4) for s in (shape, shape + 1)]
            drawn += [member for member in family if not member.held_out]
        drawn = drawn[:64]
        return shapes.draw(drawn, rng), [shapes.caption(scene, rng, neutral) for scene in drawn]

    facts = dict(shapes_clip.build_scorer(out, "shapes-clip", tokens, batch, generator("shapes-sd", "clip"), steps, lr))
    rng = generator("shapes-sd", "clip-test")
    drawn = shapes.scenes(192, "test", rng, plain=True)
    images, captions = shapes.draw(drawn, rng), [shapes.caption(scene, rng, neutral) for scene in drawn]
    scorer = shapes_clip.load_scorer(out)
    words = {"place": shapes.PLACES, "shape": shapes.SHAPES, "colour": shapes.COLOURS}
    facts |= {f"clip_swap_{name}": shapes_clip.swaps(scorer, images, captions, known) for name, known in words.items()}
    return facts | {"clip_retrieval_of_64": shapes_clip.retrieval(scorer, images, captions)}


def quality(model: DiffusionModel, judge: CNNJudge, neutral: Sequence[str], n: int = 400) -> dict[str, Any]:
    """Attribute accuracy on n held-out captions (combinations never seen in training)."""
    rng = generator("shapes-sd", "quality")
    drawn = shapes.scenes(n, "test", rng, plain=True)
    prompts = tuple(shapes.caption(scene, rng, neutral) for scene in drawn)
    seeds = image_seeds(0, "quality", n)
    images = model.sample(Inputs(image_noise(seeds, model.shape), prompts, seeds), DDIM(steps=20))
    untaught = untrained(model.tokenizer)
    untaught.vae = model.vae
    before = {f"{name}_untrained": value for name, value in attention_facts(untaught).items()}
    return {
        "held_out_captions": n,
        **captioned_shapes.accuracies(judge, images, drawn),
        **attention_facts(model),
        **before,
    }


@torch.no_grad()
def attention_facts(model: DiffusionModel, n: int = 60, t: int = 500) -> dict[str, float]:
    """Whether cross-attention is learned, on noised held-out drawings at timestep t, for the layers of each side.

    attention_distance_<side>: mean distance between the maps of two words of a caption, each scaled to sum 1, in units
    of the norm of an even map. shape_word_overlap_<side>: share of the shape word's attention on the drawn shape,
    divided by the shape's share of the area; 1 is chance.
    """
    rng = generator("shapes-sd", "attention")
    drawn = shapes.scenes(n, "test", rng, plain=True)
    captions = [shapes.caption(scene, rng) for scene in drawn]
    z, times = model.encode(shapes.draw(drawn, rng)), torch.full((n,), t)
    with attention.capture(model.denoiser) as maps:
        model.eps(model.add_noise(z, model.draw_eps(n, rng), times), times, model.embed(captions))
        found = [p.mean(1).transpose(1, 2) for p in maps.values()]
    tokens: Any = model.tokenizer
    ids = [tokens(caption).input_ids for caption in captions]
    words = [row.index(tokens(shapes.SHAPES[s.shape]).input_ids[1]) for row, s in zip(ids, drawn, strict=True)]
    masks = torch.stack([shapes.object_mask(scene) for scene in drawn]).float().unsqueeze(1)
    facts = {}
    for side in (16, 8):
        layers = torch.stack([p / p.sum(2, keepdim=True) for p in found if p.shape[2] == side**2]).mean(0)
        on = torch.nn.functional.avg_pool2d(masks, shapes.SIDE // side).flatten(1)
        overlap = torch.stack([(layers[i, word] * on[i]).sum() for i, word in enumerate(words)]).mean() / on.mean()
        apart = torch.stack([torch.pdist(layers[i, 1 : len(row) - 1]).mean() for i, row in enumerate(ids)]).mean()
        facts |= {f"attention_distance_{side}": apart.item() * side, f"shape_word_overlap_{side}": overlap.item()}
    return facts


@hookimpl
def models() -> list[type]:
    return [ShapesSD]
