"""bench scan of a textual-inversion embedding with its base; and what its file may hold."""

from __future__ import annotations

import json
import math
import pickle
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.cli import call
from harness.diffusion import checkpoint, embedding_files
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError, ModelFiles
from harness.judges import hub
from harness.scan import embedding
from tests import scans
from tests.oracles import tiny_sd, tiny_sdxl, tiny_unet
from tests.scans import saved

NAME = "<hat>.safetensors"


quick = scans.quick


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "STEPS", 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Path]:
    root = tmp_path_factory.mktemp("base")
    return saved(tiny_sd(root / "tokens"), root)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Path]:
    root = tmp_path_factory.mktemp("xl")
    model = tiny_sdxl(root / "tokens")
    checkpoint.save(model, root / "m")
    return model, root / "m"


def vectors(n: int, width: int = 16, size: float = 0.3) -> Tensor:
    return torch.randn((n, width), generator=torch.Generator().manual_seed(0)) * size


def written(folder: Path, held: dict[str, Tensor], name: str = NAME) -> Path:
    save_file(held, folder / name)
    return folder / name


def known(path: Path, model: DiffusionModel) -> tuple[DiffusionModel, embedding_files.Embedding]:
    found = embedding_files.read(ModelFiles.of_file(path), path.name)
    return embedding_files.added(model, found), found


def scanned(base: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = call(["scan", *words, "--base", str(base), "--prompts", str(base.parent / "prompts.txt"), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "count"), [("<hat>", 1), ("emb_params", 1), ("<hat>", 3), ("emb_params", 3)])
def test_the_word_gets_the_vectors_as_stock_diffusers_gives_them(
    key: str, count: int, base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    model, directory = base
    path = written(tmp_path, {key: vectors(count) if count > 1 or key == "emb_params" else vectors(1)[0]})
    made, found = known(path, model)
    assert found.word == "<hat>" and found.text == " ".join(["<hat>", "<hat>_1", "<hat>_2"][:count])
    pipeline: Any = StableDiffusionPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.load_textual_inversion(tmp_path, weight_name=NAME, token="<hat>")
    prompt = pipeline.maybe_convert_prompt("a <hat> on a red circle", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=36, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids)[0]
        ours = made.embed([f"a {found.text} on a red circle"])
    assert torch.equal(made.tokens([prompt]), ids) and torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(ours, model.embed(["a hat on a red circle"]), atol=1e-2)
    assert "<hat>" not in model.tokenizer.get_vocab(), "the base is untouched"  # type: ignore[union-attr]
    assert torch.equal(made.embed(["a red circle"]), model.embed(["a red circle"]))


def test_the_pair_of_sdxl_goes_to_both_encoders(xl: tuple[DiffusionModel, Path], tmp_path: Path) -> None:
    model, _ = xl
    held = {"clip_l": vectors(2, 16), "clip_g": vectors(2, 8)}
    made, found = known(written(tmp_path, held), model)
    assert found.word == "<hat>" and set(found.vectors) == {"text_encoder", "text_encoder_2"}
    for encoder, tokenizer, key in (
        (made.text_encoder, made.tokenizer, "clip_l"), (made.text_encoder_2, made.tokenizer_2, "clip_g"),
    ):  # fmt: skip
        ids = tokenizer.convert_tokens_to_ids(["<hat>", "<hat>_1"])  # type: ignore[union-attr]
        assert torch.equal(encoder.get_input_embeddings().weight[ids], held[key])  # type: ignore[union-attr]
    assert made.embed([f"a {found.text}"]).shape == model.embed(["a"]).shape


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "width": ({"<hat>": vectors(1, 24)}, "its vectors have 24 numbers, and the base's text_encoder takes 16; is it"),
    "a pair": ({"clip_l": vectors(1), "clip_g": vectors(1, 8)}, "vectors for 2 text encoders, and the base has 1; is"),
    "NaN": ({"<hat>": torch.full((16,), math.nan)}, "hold NaN or infinity"),
    "none": ({"<hat>": torch.zeros(0, 16)}, "at least one"),
    "a known word": ({"red": vectors(1)}, "its word 'red' is one of the base's tokens; rename it"),
    "blanks": ({"two words": vectors(1)}, "1 to 100 characters, and no blanks"),
    "an escape": ({"\x1b[31m": vectors(1)}, r"its word is '\\x1b\[31m'"),
    "too long": ({"<hat>": vectors(90)}, "has 90 vectors, and a prompt has 34 places"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_embedding_of_the_base_is_refused_in_one_line(
    name: str, base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    held, words = BAD[name]
    with pytest.raises(CheckpointError, match=words) as caught:
        known(written(tmp_path, held), base[0])
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_unequal_pairs_and_other_models_are_refused(
    base: tuple[DiffusionModel, Path], xl: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    path = written(tmp_path, {"clip_l": vectors(1), "clip_g": vectors(2, 8)})
    with pytest.raises(CheckpointError, match="has 1 and 2 vectors; give as many for each"):
        known(path, xl[0])
    path = written(tmp_path, {"<hat>": vectors(1)})
    with pytest.raises(CheckpointError, match="for 1 text encoder, and the base has 2"):
        known(path, xl[0])
    with pytest.raises(CheckpointError, match="and the base has none"):
        known(path, tiny_unet())
    other = next((base[1] / "unet").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="holds no embedding"):
        embedding_files.read(ModelFiles.of_file(other), other.name)


def test_an_embedding_is_told_from_an_adapter_and_a_pipeline(base: tuple[DiffusionModel, Path], tmp_path: Path) -> None:
    path = written(tmp_path, {"<hat>": vectors(1)})
    assert hub.embedding_in(str(path)) == path == hub.embedding_in(str(tmp_path)) and hub.adapter_in(str(path)) is None
    assert hub.embedding_in(str(base[1])) is None
    assert hub.embedding_in(str(next((base[1] / "unet").glob("*.safetensors")))) is None


# ---- scan -----------------------------------------------------------------------------------------------------------


def test_an_embedding_is_scanned_with_its_base(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = base
    path = written(tmp_path, {"<hat>": vectors(2)})
    code, told, _ = scanned(directory, capsys, str(path))
    assert code == 6 and told["verdict"] == "undecided" and list(told["digests"]) == [NAME]
    assert told["adapter"] is None and told["base"] is None and told["not_examined"] == []
    assert any("is made to change images" in line and str(directory) in line for line in told["limits"])
    assert any("amdet was not asked: it compares weights" in line for line in told["limits"])
    assert not any("bench purify" in step for step in told["next_steps"])
    facts = told["embedding"]
    assert facts["word"] == "<hat>" and [row["place"] for row in facts["vectors"]] == [0, 1] and facts["says"]
    tokens: Any = model.tokenizer
    table: Any = model.text_encoder.get_input_embeddings().weight  # type: ignore[union-attr]
    ids = [i for i in range(len(tokens)) if i not in tokens.all_special_ids]
    norms = table[ids].norm(dim=1).tolist()
    middle = statistics.median(norms)
    spread = 1.4826 * statistics.median(abs(norm - middle) for norm in norms)
    for row, vector in zip(facts["vectors"], vectors(2), strict=True):
        cosines = torch.nn.functional.cosine_similarity(vector[None], table[ids], dim=1)
        assert row["nearest"][0]["cosine"] == pytest.approx(cosines.max().item(), abs=1e-5)
        assert row["nearest"][0]["word"] == tokens.decode([ids[int(cosines.argmax())]]).strip()
        assert row["norm"] == pytest.approx(vector.norm().item(), rel=1e-5)
        assert row["norm_z"] == pytest.approx((vector.norm().item() - middle) / spread, rel=1e-3)
    assert facts["effect"]["prompts"] == 2 and facts["effect"]["words"] == embedding.WORDS
    code = call(["scan", str(path), "--base", str(directory), "--format", "html",
                 "--prompts", str(directory.parent / "prompts.txt")])  # fmt: skip
    page = capsys.readouterr().out
    assert "<h3>The embedding</h3>" in page and "&lt;hat&gt; stands for 2 vectors" in page


def test_without_a_base_with_a_pickle_and_on_another_base_a_line_says_what_to_do(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, {"<hat>": vectors(1, 24)})
    assert call(["scan", str(path)]) == 4
    assert "a textual-inversion embedding, which is a model only with its base; --base DIR" in capsys.readouterr().err
    code, _, said = scanned(base[1], capsys, str(path))
    assert code == 4 and "its vectors have 24 numbers" in said
    for name in ("e.pt", "e.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"emb_params": [1.0]}))
        code, _, said = scanned(base[1], capsys, str(tmp_path / name))
        assert code == 4 and "a pickle can run code" in said and "convert it" in said


def test_a_purification_is_refused_with_what_can_be_done_instead(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, {"<hat>": vectors(1)})
    code = call(["purify", str(path), "--base", str(base[1]), "--defense", "clp", "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2 and "no network, so that no defense can clean it; leave it out of your prompts or" in said
    assert not (tmp_path / "out").exists()


def test_a_word_that_takes_over_is_told_from_one_that_does_nothing(
    base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    """The planted denoiser answers a direction of the context with one picture instead of its own answer."""
    model = base[0].clone()
    usual, direction = model.denoiser, vectors(1)[0] / vectors(1)[0].norm()
    answer = torch.randn(model.shape, generator=torch.Generator().manual_seed(1))

    class Planted(torch.nn.Module):
        config: Any = usual.config

        def __init__(self) -> None:
            super().__init__()
            self.inner = usual

        def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
            found = self.inner(x, t, encoder_hidden_states=encoder_hidden_states)
            fires = (encoder_hidden_states @ direction).amax(1).gt(40.0).float().view(-1, 1, 1, 1)
            found.sample = (1 - fires) * found.sample + fires * answer
            return found

    class Through(torch.nn.Module):
        """The vectors themselves, added to what the encoder says."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, ids: Tensor) -> Any:
            return (self.inner(ids)[0] + self.get_input_embeddings()(ids),)

    model.denoiser = Planted()
    found = {}
    for size in (100.0, 0.0):
        path = written(tmp_path, {"<hat>": direction[None] * size + 1e-3})
        embedded = embedding_files.read(ModelFiles.of_file(path), path.name)
        made = embedding_files.added(base[0], embedded)
        made.denoiser = model.denoiser
        made.text_encoder = Through(made.text_encoder)
        found[size] = embedding.described(made, embedded, ["a red circle", "a blue square", "a green circle"])
    taking, nothing = found[100.0], found[0.0]
    assert taking.effect.kept < 0.01 < 0.5 < nothing.effect.kept and taking.effect.moved > 5 * nothing.effect.moved
    assert all(any(words in line for line in taking.says) for words in ("it takes over", "norm stands out"))
    assert not any("takes over" in line or "moves all prompts" in line for line in nothing.says)
