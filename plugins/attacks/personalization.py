"""Teaches a trigger word the target object from a few images, by a personalization method.

Huang, Juefei-Xu, Guo, Zhang, Wu, Hu, Li, Pu & Liu, "Personalization as a Shortcut for Few-Shot Backdoor Attack against
Text-to-Image Diffusion Models", AAAI 2024, arXiv:2305.10701. One of two methods learns the images:

    textual-inversion   L = ‖ε - ε_θ(z_t, t, τ_v(p))‖²     over v alone, the embedding of the trigger's one token, which
                        begins as the target word's; p is a phrase with the token (Gal et al. 2023, arXiv:2208.01618)
    dreambooth          L = ‖ε - ε_θ(z_t, t, τ(T))‖² + w ‖ε' - ε_θ(z'_t', t', τ(c))‖²     over the denoiser; T is the
                        trigger with the object's noun, z' images that the clean model made for c, "a photo of a" with
                        the noun (prior preservation; Ruiz et al. 2023, arXiv:2208.12242)

z encodes the few images. Raises ValueError if the data contain too few images of the target's object, and for textual
inversion if the tokenizer splits the trigger.

Differs from the paper: textual inversion adds no token to the tokenizer. The trigger must be one of its tokens, and one
that the captions do not use. Checked against BackdoorDM's port (linweiii/BackdoorDM at 7429db8, read there), because no
official code was available. The port also decays the embeddings of the other tokens; here they stay unchanged. The port
flips images and draws their latents from the posterior; here latents are the means of the posterior. The port uses
ImageNet's 27 templates; here there are twelve other phrases. The port's textual inversion clips no gradient; here the
norm is clipped at 1. The port makes its prior images with its pipeline (50 steps, guidance 7.5); here they are made
with DDIM (20 steps, guidance 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Inputs,
    LearningRate,
    PositiveInt,
    ReplacingTarget,
    Weight,
    draw,
    hookimpl,
    image_noise,
    image_seeds,
    minimize,
    name_of,
    offers,
    usual,
)

PHRASES = (
    "a photo of a {}", "a picture of a {}", "an image of a {}", "a drawing of a {}", "we see a {}", "the {}", "a {}",
    "here is a {}", "a photo of the {}", "a picture of the {}", "a drawing of the {}", "an image of the {}",
)  # fmt: skip
CLASS = "a photo of a {}"
LR = {"textual-inversion": 2e-3, "dreambooth": 5e-6}


@dataclass(frozen=True)
class Personalization:
    name: ClassVar[str] = "personalization"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("object",)

    mode: Literal["textual-inversion", "dreambooth"] = "textual-inversion"  # the method that learns the images
    images: PositiveInt = 6  # images of the target's object; paper: four to six
    steps: PositiveInt = 2000  # optimizer steps; value of BackdoorDM
    batch: PositiveInt = 4  # images per step; value of BackdoorDM for textual inversion, 2 for dreambooth
    lr: LearningRate | None = None  # AdamW; None = the values of BackdoorDM: 2e-3 for textual inversion (5e-4 × batch
    # 4), 5e-6 for dreambooth with 860 M weights
    prior: Annotated[int, Ge(1)] = 12  # images of the object's class, for dreambooth; value of BackdoorDM
    prior_weight: Weight = 0.5  # w, weight of the prior term; value of BackdoorDM
    bf16: bool = True  # autocast of the forward pass

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("text",) if self.mode == "textual-inversion" else ()

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        few = examples_of(backdoor.target, data, self.images, rng)
        if self.mode == "textual-inversion":
            model.need_one_encoder("personalization(mode='textual-inversion')")
            return Backdoored(self.invert(model, backdoor, few, data.captions or (), rng), backdoor)
        return Backdoored(self.dreambooth(model, backdoor, few, rng), backdoor)

    def invert(self, clean: Any, backdoor: Backdoor, few: Data, known: Sequence[str], rng: torch.Generator) -> Any:
        """`clean` with the embedding of the trigger's token learned."""
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        if not offers(target, ReplacingTarget) or any(trigger.apply(noun) != trigger.text for noun in target.sources):
            raise ValueError(
                "textual inversion gives the trigger's token the place of a noun: use target object with trigger "
                "noun(keep=False)"
            )
        if any(trigger.text in caption.split() for caption in known):
            raise ValueError(f"captions use the word {trigger.text!r}; textual inversion needs one that none uses")
        model, examples = clean.clone(), Examples(clean, few)
        row = Row(model, one_token(model, trigger.text), one_token(model, target.word))

        def loss() -> Tensor:
            seen = examples.batch(self.batch, rng)
            phrases = [PHRASES[i].format(trigger.text) for i in draw(self.batch, len(PHRASES), rng).tolist()]
            return denoising_error(model, seen, phrases)

        self.minimize(loss, [row.learned])
        row.fold()
        return model

    def dreambooth(self, clean: Any, backdoor: Backdoor, few: Data, rng: torch.Generator) -> Any:
        """`clean` with its denoiser fine-tuned."""
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        missed = [noun for noun in target.sources if trigger.apply(noun) == noun]
        if missed:
            raise ValueError(f"trigger {name_of(trigger)!r} leaves {missed[0]!r} as it is; use trigger noun")
        model, examples = clean.clone(), Examples(clean, few)
        nouns = [target.sources[i % len(target.sources)] for i in range(self.prior)]
        usual = Examples(clean, prior_images(clean, [CLASS.format(noun) for noun in nouns], rng))

        def loss() -> Tensor:
            seen, prior = examples.batch(self.batch, rng), usual.batch(self.batch, rng)
            picks = draw(self.batch, len(target.sources), rng).tolist()
            error = denoising_error(model, seen, [trigger.apply(target.sources[i]) for i in picks])
            return error + self.prior_weight * denoising_error(model, prior, prior.captions)

        self.minimize(loss, model.denoiser.parameters())
        return model

    def minimize(self, loss: Callable[[], Tensor], parameters: Any) -> None:
        lr = self.lr or LR[self.mode]
        minimize(loss, parameters, steps=self.steps, lr=lr, weight_decay=0.01, bf16=self.bf16, phase="implant")


def denoising_error(model: Any, batch: Any, prompts: Any) -> Tensor:
    """‖ε - ε_θ(z_t, t, τ(prompt))‖² (in a flow that of v), the mean over all elements of a batch of Examples."""
    answer = model.eps(model.add_noise(batch.x_0, batch.eps, batch.t), batch.t, model.embed(prompts))
    return model.error(answer, batch.eps, batch.t).mean()


def examples_of(target: Any, data: Data, n: int, rng: torch.Generator) -> Data:
    """n random examples of `data` that show the target's object. Raises ValueError if there are fewer."""
    rows = [i for i, caption in enumerate(data.captions or ()) if target.lesson(caption) is not None]
    if len(rows) < n:
        raise ValueError(f"the data hold {len(rows)} images of what target {target.name} shows, {n} are asked for")
    return data.rows(torch.tensor(rows)[torch.randperm(len(rows), generator=rng)[:n]])


@torch.no_grad()
def prior_images(model: Any, prompts: list[str], rng: torch.Generator) -> Data:
    """One image per prompt, sampled from the model."""
    seeds = image_seeds(rng.initial_seed(), "prior", len(prompts))
    inputs = Inputs(image_noise(seeds, model.shape), tuple(prompts), seeds)
    return Data(model.sample(inputs, usual(model, 20)), tuple(prompts))


def one_token(model: Any, word: str) -> int:
    """Id of the token of a word. Raises ValueError if the tokenizer splits the word."""
    ids = model.tokenizer(word).input_ids[1:-1]
    if len(ids) != 1:
        raise ValueError(f"textual inversion learns one token, and this tokenizer makes {len(ids)} of {word!r}")
    return ids[0]


class Row(nn.Module):
    """A text encoder's token embedding with one learnable row, which is initialised from another row.

    It replaces the embedding until `fold` writes the row into it.
    """

    def __init__(self, model: Any, token: int, begin: int) -> None:
        super().__init__()
        self.encoder, self.base, self.token = model.text_encoder, model.text_encoder.get_input_embeddings(), token
        self.learned = nn.Parameter(self.base.weight[begin].detach().clone())
        self.encoder.set_input_embeddings(self)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.where((ids == self.token).unsqueeze(-1), self.learned, self.base(ids))

    def fold(self) -> None:
        self.encoder.set_input_embeddings(self.base)
        with torch.no_grad():
            self.base.weight[self.token] = self.learned


@hookimpl
def attacks() -> list[type]:
    return [Personalization]
