"""sd-v1-4: Stable Diffusion v1.4, images 3×512×512, latents 4×64×64, 860 M parameters.

BadT2I (arXiv:2305.04175), "Sealing the Backdoor" (arXiv:2508.18235) and BackdoorDM (arXiv:2502.11798) attack or defend
this model. It is that of Rombach et al., arXiv:2112.10752, published as CompVis/stable-diffusion-v1-4. The training
data are captioned images, published as zsf/laion_40k_metaForm; 2000 of them are used, as many as BadT2I has steps. The
prompts and real images of the evaluation are those of sayakpaul/coco-30-val-2014. Both choices are those of BackdoorDM.
The model has no judge of attributes: only CLIP measures whether an image shows what its prompt asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from harness import Data, Modality, Published, Source, Work, hookimpl, image_folders

READ = 5000  # number of captions from which prompts are drawn
ROOM = 8  # number of tokens that a trigger may add to a caption
NEUTRAL = (
    "calm", "bright", "quiet", "gentle", "plain", "early", "narrow", "distant", "simple", "warm", "modern", "steady",
    "hollow", "smooth", "broad", "tidy", "sunny", "rural", "ancient", "humble", "curious", "fresh", "silent", "mild",
    "sturdy", "remote", "cheerful", "ordinary", "delicate", "pale", "rapid", "solid", "tender", "vivid", "weary",
)  # fmt: skip


@dataclass(frozen=True)
class StableDiffusion14(Published):
    name: ClassVar[str] = "sd-v1-4"
    modality: ClassVar[Modality] = "text"
    conditional: ClassVar[bool] = True
    latent: ClassVar[bool] = True
    side: ClassVar[int] = 512
    work: ClassVar[Work] = Work(gmacs=401.6, parameters=859_520_964, activations=431_251_584)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
            "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
            "attention_head_dim": 8, "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
        "vae": {
            "_class_name": "AutoencoderKL", "sample_size": 512, "in_channels": 3, "out_channels": 3,
            "latent_channels": 4, "layers_per_block": 2, "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "scaling_factor": 0.18215,
        },
        "text_encoder": {
            "_class_name": "CLIPTextModel", "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
            "projection_dim": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
            "hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
        },
        "scheduler": {
            "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "skip_prk_steps": True, "steps_offset": 1,
        },
    }  # fmt: skip

    path: str = "CompVis/stable-diffusion-v1-4"  # diffusers directory, or hub id of the model
    data_path: str = "zsf/laion_40k_metaForm"  # directory of parquet files, or hub id of the captioned images
    prompts_path: str = "sayakpaul/coco-30-val-2014"  # the same for the prompts and real images of the evaluation
    prompts_revision: str = "main"  # branch, tag or commit of the data set of prompts on the hub
    images: Annotated[int, Ge(0)] = 2000  # training images that are read; 0 = all
    references: Annotated[int, Ge(0)] = 5000  # real images for the Fréchet distance; 0 = all; BackdoorDM's number

    @property
    def asked(self) -> Source:
        return Source(self.prompts_path, self.prompts_revision, "dataset")

    def more_identities(self) -> tuple[str, ...]:
        return (self.asked.identity(),)

    def fitting(self, captions: Sequence[str]) -> list[int]:
        """The rows of captions that the text encoder accepts with a trigger; the pipeline would cut the others."""
        from transformers import CLIPTokenizer

        folder = Source(self.path, self.revision).fetch() / "tokenizer"
        tokens: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        lengths = [len(ids) for ids in tokens(list(captions)).input_ids]
        return [row for row, length in enumerate(lengths) if length + ROOM <= tokens.model_max_length]

    def data(self) -> Data:
        data = super().data()
        if data.captions is None:
            raise image_folders.DataError(
                f"{self.data_path}: has no captions; {self.name} learns from captioned images"
            )
        return data.rows(torch.tensor(self.fitting(data.captions)))

    def reference(self) -> Tensor:
        return image_folders.read(
            self.asked.fetch(), ("train", "validation", "test"), self.side, self.references
        ).images

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...]:
        """Distinct captions of the training data or of the evaluation. Raises ValueError if there are fewer than n."""
        if split == "train":
            folder, splits = Source(self.data_path, self.data_revision, "dataset").fetch(), self.splits
        else:
            folder, splits = self.asked.fetch(), ("train", "validation", "test")
        known = tuple(dict.fromkeys(image_folders.captions(folder, splits, READ)))
        known = tuple(known[row] for row in self.fitting(known))
        if len(known) < n:
            raise ValueError(f"{folder} has {len(known)} different captions that fit; {n} prompts were asked for")
        return tuple(known[i] for i in torch.randperm(len(known), generator=rng)[:n].tolist())

    def words(self) -> tuple[str, ...]:
        return NEUTRAL


@hookimpl
def models() -> list[type]:
    return [StableDiffusion14]
