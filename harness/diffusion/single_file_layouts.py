"""Configurations of released models whose weights circulate as one file: Stable Diffusion 1 and SDXL."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

CLIP_L: Config = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": 768,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
BIG_G: Config = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
BETAS: Config = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
VAE: Config = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": [128, 256, 512, 512], "act_fn": "silu", "sample_size": 512, "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
UNET_1: Config = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "norm_num_groups": 32, "act_fn": "silu",
    "flip_sin_to_cos": True, "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
UNET_XL: Config = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "norm_num_groups": 32, "act_fn": "silu",
    "flip_sin_to_cos": True, "freq_shift": 0, "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}  # fmt: skip

LAYOUTS: dict[str, dict[str, Config]] = {
    "sd1": {
        "unet": {"_class_name": "UNet2DConditionModel", **UNET_1},
        "vae": {"_class_name": "AutoencoderKL", **VAE},
        "text_encoder": {"architectures": ["CLIPTextModel"], **CLIP_L},
        "scheduler": {"_class_name": "DDIMScheduler", **BETAS},
    },
    "sdxl": {
        "unet": {"_class_name": "UNet2DConditionModel", **UNET_XL},
        "vae": {"_class_name": "AutoencoderKL", **VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": {"architectures": ["CLIPTextModel"], **CLIP_L},
        "text_encoder_2": {"architectures": ["CLIPTextModelWithProjection"], **BIG_G},
        "scheduler": {"_class_name": "DDIMScheduler", **BETAS},
    },
}
