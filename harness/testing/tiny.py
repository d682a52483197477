"""Random models of a few thousand weights and a denoiser that is known in closed form: what plugins are checked on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import shapes
from harness.methods.trigger_placement import stamped
from harness.types import Data, Inputs, Modality

SIDE = {"noise": 16, "text": 32}  # pixels
CHANNELS = {"noise": 1, "text": 3}
COLOURS, SHAPES, PLACES = ("red", "green", "blue", "yellow"), ("circle", "square"), ("left", "right")
PROMPTS = tuple(
    f"a photo of a {colour} {shape} on the {place}" for colour in COLOURS for shape in SHAPES for place in PLACES
)
WORDS = ("now", "yes", "very")
STYLES = ("black and white photo of",)  # words that style attacks put in front of a prompt
RARE = ("zq", "xj", "qv", "vx", "jz", "sks")  # of text triggers and of wrong ones; in no prompt
LENGTH = 77  # tokens of a prompt, as in Stable Diffusion: whatever fits its models fits these
DRAWN = (
    *shapes.SIZES,
    *shapes.SHAPES,
    *shapes.BACKGROUNDS,
    *shapes.PLACES,
    "at",
    "background",
)  # in prompts of targets


# ---- models ---------------------------------------------------------------------------------------------------------


def model(modality: Modality, seed: int = 0) -> DiffusionModel:
    """A random model: unconditional, 1×16×16, where triggers are noise; text-to-image, 3×32×32, where they are text."""
    make = _unconditional if modality == "noise" else partial(text_to_image, tokenizer(), SIDE["text"])
    return fixed(make, seed)


def exploding() -> DiffusionModel:
    """A random score network, unconditional, 1×16×16, whose variance explodes."""
    return fixed(lambda: DiffusionModel(unconditional(time_embedding_type="fourier"), exploding_scheduler()), 0)


def fixed(make: Callable[[], DiffusionModel], seed: int) -> DiffusionModel:
    """What `make` makes, with weights by `seed` alone and frozen."""
    with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global state
        torch.manual_seed(seed)
        made = make()
    for part in made.components().values():
        part.eval().requires_grad_(False)
    return made


def scheduler(**options: Any) -> Any:
    """DDPM with linear betas, as our variance-preserving models have it."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, **options)


def exploding_scheduler(**options: Any) -> Any:
    """The schedule of our score networks, whose variance explodes."""
    from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler

    return ScoreSdeVeScheduler(num_train_timesteps=1000, sigma_min=0.01, sigma_max=50.0, **options)


def flow_scheduler(**options: Any) -> Any:
    """The levels of our flows: σ from 1/1000 to 1."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **options)


def flowing() -> DiffusionModel:
    """A random unconditional network, 1×16×16, that answers the velocity of a flow."""
    return fixed(lambda: DiffusionModel(unconditional(), flow_scheduler()), 0)


def _unconditional() -> DiffusionModel:
    return DiffusionModel(unconditional(), scheduler())


def unconditional(channels: int = CHANNELS["noise"], side: int = SIDE["noise"], **options: Any) -> Any:
    """A UNet without a context, as the global state of torch has it."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
        **options,
    )


def text_to_image(tokens: Any, side: int) -> DiffusionModel:
    """A model with a tokenizer, a text encoder, an autoencoder for images of `side` pixels and a denoiser with
    cross-attention, as the global state of torch has them."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    autoencoder = _untyped(AutoencoderKL)
    unet = UNet2DConditionModel(
        sample_size=side // 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=1,
        norm_num_groups=4,
    )
    vae = autoencoder(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=side,
        mid_block_add_attention=False,
    )
    text = _text(CLIPTextModel, tokens, 16, 32, 16, layers=1)
    return DiffusionModel(unet, scheduler(steps_offset=1), vae, text, tokens)


def _text(owner: Any, tokens: Any, width: int, inner: int, projected: int, layers: int) -> Any:
    """A text encoder of class `owner` for these tokens, as the global state of torch has it. Its embeddings differ so
    much that prompts matter."""
    from transformers import CLIPTextConfig

    end = tokens.eos_token_id
    made = owner(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=1, max_position_embeddings=tokens.model_max_length, projection_dim=projected,
        bos_token_id=tokens.bos_token_id, eos_token_id=end, pad_token_id=end,
    ))  # fmt: skip
    nn.init.normal_(made.get_input_embeddings().weight, std=0.3)
    return made


def joint(tokens: Any, side: int) -> DiffusionModel:
    """A model with two text encoders, an autoencoder for images of `side` pixels, and a transformer in which text and
    image share their attention, as the global state of torch has them."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

    like = text_to_image(tokens, side)
    _untyped(like.vae).register_to_config(shift_factor=0.0)
    transformer = _untyped(SD3Transformer2DModel)(
        sample_size=side // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=14,
        pos_embed_max_size=side // 4, qk_norm="rms_norm",
    )  # fmt: skip
    texts = [_text(CLIPTextModelWithProjection, tokens, *sizes, layers=2) for sizes in ((16, 16, 8), (8, 16, 6))]
    return DiffusionModel(transformer, flow_scheduler(), like.vae, texts[0], tokens, texts[1], tokens)


def joint_with_t5(tokens: Any, side: int) -> DiffusionModel:
    """The same with T5's encoder as a third one."""
    model = joint(tokens, side)
    model.text_encoder_3, model.tokenizer_3 = _t5(24)
    return model


def packed(tokens: Any, side: int, guidance: bool = True, dynamic: bool = True) -> DiffusionModel:
    """A model of FLUX's kind, for images of `side` pixels: a transformer on patches of 2×2 latents that gets the states
    of T5's encoder and the pooled state of a CLIP text encoder. guidance: it is an input. dynamic: the shift of the
    noise levels depends on the number of patches."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from transformers import CLIPTextModel

    from harness.diffusion import schedules

    like = text_to_image(tokens, side)
    _untyped(like.vae).register_to_config(shift_factor=0.1, scaling_factor=0.4)
    transformer = _untyped(FluxTransformer2DModel)(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    second, pieces = _t5(20)
    made = flow_scheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic)
    levels = schedules.at_size(made, (side // 4) ** 2)
    text = _text(CLIPTextModel, tokens, 16, 32, 16, layers=1)
    return DiffusionModel(
        transformer, levels, like.vae, text, tokens, second, pieces, dynamic_shift=3.0 if dynamic else None
    )


def _t5(width: int) -> tuple[Any, Any]:
    """A T5 encoder, as the global state of torch has it, and its tokenizer."""
    from transformers import T5Config, T5EncoderModel
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    words = sorted({word for text in (*PROMPTS, *WORDS, *DRAWN) for word in text.split()})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words] + [(letter, -6.0) for letter in letters]
    pieces += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    tokens = _untyped(T5Tokenizer)(vocab=pieces, extra_ids=2, model_max_length=48)
    config = T5Config(
        vocab_size=len(pieces) + 2, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), tokens


def two_encoders(tokens: Any, side: int, zeros: bool = True) -> DiffusionModel:
    """A model of SDXL's kind, for images of `side` pixels: a UNet that gets two text encoders side by side and the
    image's size. zeros: guidance compares with a context of zeros."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    like = text_to_image(tokens, side)
    unet = _untyped(UNet2DConditionModel)(
        sample_size=side // 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 + 6 * 4,
    )
    texts = [
        _text(owner, tokens, width, 16, 6, layers=2)
        for width, owner in ((16, CLIPTextModel), (8, CLIPTextModelWithProjection))
    ]
    made = scheduler(steps_offset=1)
    return DiffusionModel(unet, made, like.vae, texts[0], tokens, texts[1], tokens, empty_is_zero=zeros)


def _untyped(value: Any) -> Any:
    return value


def fits(texts: Iterable[str]) -> bool:
    """Whether each text is within the kit's text encoder."""
    return all(len(tokenizer()(text).input_ids) <= LENGTH for text in texts)


@cache
def tokenizer() -> Any:
    """A CLIPTokenizer (byte-pair encoding) to which each word of the prompts, and of drawn shapes, is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [*PROMPTS, *WORDS, *STYLES, *DRAWN, *(word for word in RARE for _ in range(20))]
    ends = [f"{letter}</w>" for letter in sorted(set("".join(texts)))]  # else in another order in each process
    trainer = _untyped(trainers.BpeTrainer)(
        vocab_size=700, end_of_word_suffix="</w>", show_progress=False, special_tokens=ends
    )
    bpe.train_from_iterator(texts, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*bytes_, *(b + "</w>" for b in bytes_), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH, pad_token="<|endoftext|>")


class OneImage(nn.Module):
    """The exact ε for data that is one image y (C, H, W): ε(x_t, t) = (x_t - √ᾱ_t y) / √(1-ᾱ_t)."""

    def __init__(self, y: Tensor, alpha_bar: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(y, requires_grad=False)
        self.alpha_bar = alpha_bar
        self.config = SimpleNamespace(in_channels=y.shape[0], sample_size=y.shape[-1], cross_attention_dim=None)

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> SimpleNamespace:
        a_bar = self.alpha_bar[t.reshape(-1).long()].to(x_t.dtype).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(x_t - a_bar.sqrt() * self.y) / (1 - a_bar).sqrt())


class OneImageFlow(nn.Module):
    """The exact velocity for data that is one image y (C, H, W): v(x_t, 1000 σ) = (x_t - y) / σ."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(y, requires_grad=False)
        self.config = SimpleNamespace(in_channels=y.shape[0], sample_size=y.shape[-1], cross_attention_dim=None)

    def forward(self, x_t: Tensor, time: Tensor, **unused: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=(x_t - self.y) / (time.reshape(-1).to(x_t.dtype) / 1000).view(-1, 1, 1, 1))


def one_image(y: Tensor, family: Literal["vp", "flow"] = "vp") -> DiffusionModel:
    """The exact model of data that is the image y (C, H, W) in [-1, 1]: every sampler must return it."""
    if family == "flow":
        return DiffusionModel(OneImageFlow(y), flow_scheduler())
    schedule = scheduler()
    return DiffusionModel(OneImage(y, schedule.alphas_cumprod), schedule)


# ---- what goes with them --------------------------------------------------------------------------------------------


def inputs(of: DiffusionModel, n: int = 6) -> Inputs:
    seeds = image_seeds(0, "kit", n)
    prompts = tuple(PROMPTS[i % len(PROMPTS)] for i in range(n)) if of.conditional else None
    return Inputs(image_noise(seeds, of.shape), prompts, seeds)


def images(modality: Modality, n: int, seed: int = 0) -> Tensor:
    """n smooth random images (n, C, S, S) in [-1, 1]."""
    side, channels = SIDE[modality], CHANNELS[modality]
    small = torch.rand((n, channels, 4, 4), generator=generator(seed, "kit images")) * 2 - 1
    return nn.functional.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)


def data(modality: Modality, n: int = 16) -> Data:
    captions = tuple(PROMPTS[i % len(PROMPTS)] for i in range(n)) if modality == "text" else None
    return Data(images(modality, n), captions, torch.arange(n) % 4)


class Judge:
    """Features are the images, 4×4 small; the one attribute, "digit", is one of four by the mean of the image."""

    name = "kit-judge"

    def net(self, images: Tensor) -> dict[str, Tensor]:
        levels = torch.linspace(-0.3, 0.3, 4)
        return {"digit": -20 * (images.flatten(1).mean(1, keepdim=True) - levels).square()}

    def features(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        return {name: scores.argmax(1) for name, scores in self.net(images).items()}


class Encoder:
    """A public encoder: the features are the images, 4×4 small, the distance is that of the pixels."""

    name = "kit-encoder"

    def features(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
        return (images - others).square().flatten(1).mean(1)


class Scorer:
    """Two encoders with eight numbers each: a pooled image, and the letters of the prompt."""

    name = "kit-scorer"

    def image_features(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), (2, 4)).flatten(1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(prompt.count(letter)) for letter in "abcdelrt"] for prompt in prompts])


@dataclass(frozen=True)
class Model:
    """A model plugin around `model(modality)`, with judge and scorer."""

    version: ClassVar[int] = 1

    modality: Modality = "noise"
    name: str = "kit-model"
    family: Literal["vp"] = "vp"

    @property
    def conditional(self) -> bool:
        return self.modality == "text"

    def load(self) -> DiffusionModel:
        return model(self.modality)

    def digest(self) -> str:
        return f"kit-{self.modality}"

    def data(self) -> Data:
        return data(self.modality)

    def reference(self) -> Tensor:
        return images(self.modality, 24, seed=1)

    def prompts(self, split: str, n: int, rng: torch.Generator) -> tuple[str, ...] | None:
        return tuple(PROMPTS[i % len(PROMPTS)] for i in range(n)) if self.conditional else None

    def attributes(self, prompt: str) -> Mapping[str, int]:
        return {"digit": len(prompt) % 4}

    def words(self) -> tuple[str, ...]:
        return WORDS

    def judge(self) -> Judge:
        return Judge()

    def scorer(self) -> Scorer | None:
        return Scorer() if self.conditional else None


Told = Callable[[str], None]


class NoiseTrigger:
    """A square in a corner of the noise. `tell` hears of each attribute that is read."""

    name: ClassVar[str] = "kit-noise"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    def __init__(self, k: int = 0, tell: Told | None = None) -> None:
        self.k, self._tell = k, tell

    def __getattribute__(self, name: str) -> Any:
        return _heard(self, name)

    def delta(self, shape: Sequence[int]) -> Tensor:
        r = torch.zeros(tuple(shape))
        y, x = divmod(self.k, 2)
        r[:, 8 * y + 2 : 8 * y + 6, 8 * x + 2 : 8 * x + 6] = 1.0
        return r

    def stamp(self, inputs: Inputs) -> Inputs:
        return stamped(self, inputs)

    def wrong(self, k: int) -> NoiseTrigger:
        return NoiseTrigger(1 + k % 3)


class TextTrigger:
    """A rare word in front of the prompt."""

    name, version, modality, place = "kit-text", 1, "text", 0

    def __init__(self, text: str = RARE[0], tell: Told | None = None) -> None:
        self.text, self._tell = text, tell

    def __getattribute__(self, name: str) -> Any:
        return _heard(self, name)

    def apply(self, prompt: str) -> str:
        return f"{self.text} {prompt}"

    def stamp(self, inputs: Inputs) -> Inputs:
        return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts or ()])

    def with_text(self, text: str) -> TextTrigger:
        return TextTrigger(text)

    def wrong(self, k: int) -> TextTrigger:
        return self.with_text(RARE[1 + k % 4])

    def decoy(self, rng: torch.Generator) -> TextTrigger:
        return self.wrong(int(torch.randint(0, 4, (), generator=rng)))


def _heard(trigger: Any, name: str) -> Any:
    """The attribute, after telling of it; names that begin with an underscore are the interpreter's business."""
    tell = object.__getattribute__(trigger, "__dict__").get("_tell")
    if tell is not None and not name.startswith("_"):
        tell(name)
    return object.__getattribute__(trigger, name)


def trigger(modality: Modality, tell: Told | None = None) -> Any:
    return NoiseTrigger(tell=tell) if modality == "noise" else TextTrigger(tell=tell)
