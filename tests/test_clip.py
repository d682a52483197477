from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from harness.diffusion.checkpoint import CheckpointError
from harness.judges import shapes_clip

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "gray": (0.0, 0.0, 0.0)}


def tiny_tokenizer(directory: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the colours as single letters and little else."""
    letters = sorted(set("".join(COLOURS)))
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    made = CLIPTokenizer(
        str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=8, pad_token="<|endoftext|>"
    )
    made.save_pretrained(directory)
    return made


def batch(rng: torch.Generator) -> tuple[Tensor, list[str]]:
    """The four colours as plain 8×8 images with a little noise, with their words."""
    images = torch.tensor(list(COLOURS.values())).view(4, 3, 1, 1).expand(4, 3, 8, 8)
    return images + 0.05 * torch.randn(images.shape, generator=rng), list(COLOURS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("scorer")
    tokenizer = tiny_tokenizer(root / "model" / "tokenizer")
    state = torch.get_rng_state()
    facts = shapes_clip.build_scorer(root, "colour-clip", tokenizer, batch, torch.Generator().manual_seed(0), steps=60)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    return root, facts


@pytest.mark.slow
def test_a_trained_scorer_tells_colours_apart_after_a_reload(built):
    root, facts = built
    scorer = shapes_clip.load_scorer(root)
    images, captions = batch(torch.Generator().manual_seed(1))
    assert scorer.name == "colour-clip" and facts["clip_steps"] == 60
    assert shapes_clip.retrieval(scorer, images, captions, size=4) == 1
    assert shapes_clip.swaps(scorer, images, captions, ["red", "green", "blue"]) == 1
    assert scorer.image_features(images).norm(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-5)


def test_weights_are_stored_as_half_precision_and_used_as_single(built):
    from safetensors.torch import load_file

    root, _ = built
    assert {t.dtype for t in load_file(root / "clip" / shapes_clip.WEIGHTS).values()} == {torch.float16}
    assert shapes_clip.load_scorer(root).text_features(["red"]).dtype == torch.float32


def test_stock_open_clip_reads_the_directory(built):
    import open_clip

    root, _ = built
    stock: Any = open_clip.create_model_from_pretrained(
        f"local-dir:{root / 'clip'}", precision="fp32", return_transform=False
    )
    images, _ = batch(torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = stock.eval().encode_image(images, normalize=True)
    assert torch.allclose(found, shapes_clip.load_scorer(root).image_features(images), atol=1e-5)


def test_a_scorer_without_weights_is_refused(built, tmp_path):
    root, _ = built
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / shapes_clip.CONFIG).write_text((root / "clip" / shapes_clip.CONFIG).read_text())
    with pytest.raises(CheckpointError, match="is missing; `bench build"):
        shapes_clip.load_scorer(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(built, tmp_path):
    root, _ = built
    (tmp_path / "clip").mkdir()
    config = json.loads((root / "clip" / shapes_clip.CONFIG).read_text())
    config["model_cfg"]["embed_dim"] = 16
    (tmp_path / "clip" / shapes_clip.CONFIG).write_text(json.dumps(config))
    (tmp_path / "clip" / shapes_clip.WEIGHTS).write_bytes((root / "clip" / shapes_clip.WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="does not fit"):
        shapes_clip.load_scorer(tmp_path)


def test_a_prompt_that_is_too_long_is_named(built):
    root, _ = built
    with pytest.raises(ValueError, match="does not fit the scorer's 8: 'red red red red'"):
        shapes_clip.load_scorer(root).text_features(["red", "red red red red"])


def test_swaps_without_any_of_the_words_are_refused(built):
    root, _ = built
    images, captions = batch(torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="no caption holds exactly one of"):
        shapes_clip.swaps(shapes_clip.load_scorer(root), images, captions, ["big", "small"])
