"""`bench scan --base`: tensors and texts beside a clean base; and the families of backdoors that no detector sees."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import torch

from harness.capabilities import FAMILIES, StatingDetector, delivers, offers
from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError
from harness.registry import load
from harness.registry.contract import faults
from harness.scan import comparison, document, families, robust
from harness.scan.comparison import check_base, compared, distances, look_alikes, moved_texts
from harness.testing import tiny
from harness.types import Defended
from plugins.defenses.amdet import AMDET
from plugins.defenses.bias_scan import BiasScan
from plugins.defenses.elijah import Elijah
from plugins.defenses.terd import TERD
from plugins.defenses.vocabulary_scan import VocabularyScan
from tests import scans
from tests.scans import Run

NORMS = '''
"""A detector that states nothing."""

from dataclasses import dataclass
from typing import ClassVar

from harness import Defended, hookimpl


@dataclass(frozen=True)
class Norms:
    """Suspicious of a large output bias."""

    name: ClassVar[str] = "norms"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    def defend(self, model, knowledge, rng):
        return Defended(suspicion=model.denoiser.conv_out.bias.mean().item(), flag_above=1.0)


@hookimpl
def defenses():
    return [Norms]
'''
quick, bench = scans.quick, scans.bench_with(NORMS, "scan")


@pytest.fixture(scope="module")
def clean() -> DiffusionModel:
    return tiny.model("text")


def with_word(model: DiffusionModel, word: str, strength: float = 3.0) -> DiffusionModel:
    """A copy in whose text encoder one word has another embedding."""
    made = model.clone()
    (token,) = made.tokenizer(word).input_ids[1:-1]  # type: ignore[union-attr]
    weight = made.text_encoder.get_input_embeddings().weight  # type: ignore[union-attr]
    weight.data[token] = strength * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
    return made


# ---- tensors --------------------------------------------------------------------------------------------------------


def test_a_model_is_the_same_as_itself(clean: DiffusionModel) -> None:
    found = compared(clean, clean.clone(), "base", None)
    assert [part.part for part in found.parts] == ["unet", "vae", "text_encoder"]
    assert all(part.compared and not part.changed and part.relative == 0 and not part.texts for part in found.parts)
    assert found.says == tuple(f"{part.part}: the same as in the base." for part in found.parts)


def test_a_changed_layer_is_named_with_the_relative_norm_of_its_change(clean: DiffusionModel) -> None:
    made: Any = clean.clone()
    layer = made.denoiser.conv_out
    before = {name: value.clone() for name, value in layer.named_parameters()}
    layer.weight.data *= 1.5
    layer.bias.data += 0.25
    (part,) = [part for part in compared(made, clean, "base", None).parts if part.changed]
    apart = sum((value - before[name]).square().sum().item() for name, value in layer.named_parameters()) ** 0.5
    own = sum(value.square().sum().item() for value in before.values()) ** 0.5
    whole = sum(value.square().sum().item() for value in clean.denoiser.state_dict().values()) ** 0.5
    assert (part.part, part.changed, part.rounded, part.layers_changed) == ("unet", 2, 0, 1)
    assert (part.layers[0].layer, part.layers[0].tensors) == ("conv_out", 2)
    assert part.layers[0].relative == pytest.approx(apart / own)
    assert part.relative == pytest.approx(apart / whole)


def test_rounding_to_half_precision_is_no_change(clean: DiffusionModel) -> None:
    made = clean.clone()
    for part in made.components().values():
        for weight in part.parameters():
            weight.data = weight.data.half().float()
    found = compared(made, clean, "base", None)
    assert all(not part.changed and part.rounded > 0 for part in found.parts)
    assert "the same as in the base, but for rounding in " in found.says[0]


def test_a_denoiser_of_another_layout_is_not_compared_and_the_encoders_are(clean: DiffusionModel) -> None:
    base: Any = clean.clone()
    base.denoiser.conv_out = torch.nn.Conv2d(16, 8, 3)
    found = compared(with_word(clean, "red"), base, "base", None)
    assert found.says[0] == "unet: not compared, because the base has another layout."
    assert found.parts[0].relative is None and found.parts[2].changed == 1


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_z_is_the_distance_from_the_median_in_median_absolute_deviations() -> None:
    moved = [0.1, 0.2, 0.3, 0.4, 2.0]
    found = moved_texts("words", ["a", "b", "c", "d", "e"], moved, 9)
    spread = 1.4826 * statistics.median(abs(each - 0.3) for each in moved)
    assert (found.median, found.spread, found.count, found.of) == (0.3, pytest.approx(spread), 5, 9)
    assert [each.text for each in found.farthest] == ["e", "d", "c", "b", "a"]
    assert [each.z for each in found.farthest] == pytest.approx([(each - 0.3) / spread for each in reversed(moved)])
    assert moved_texts("words", ["a", "b"], [0.5, 0.5], 2).farthest[0].z == 0  # rounding has no spread


def test_a_text_moves_by_one_minus_the_mean_cosine_of_its_embeddings(clean: DiffusionModel) -> None:
    other, texts = tiny.model("text", 1), ["red", "a blue circle"]
    found = distances(clean, other, "text_encoder", texts)
    length = len(clean.tokenizer("a blue circle").input_ids) + 1  # type: ignore[misc]
    ours, theirs = clean.embed(texts), other.embed(texts)  # padded to the full length: attention is causal
    for row in range(2):
        cosines = [torch.dot(ours[row, i], theirs[row, i]) / ours[row, i].norm() / theirs[row, i].norm()
                   for i in range(1, length)]  # fmt: skip
        assert found[row] == pytest.approx(1 - sum(cosines).item() / len(cosines), abs=1e-5)  # type: ignore[union-attr]


def test_a_word_with_another_meaning_stands_out(clean: DiffusionModel) -> None:
    found = compared(with_word(clean, "yes"), clean, "base", tiny.PROMPTS)
    words, replaced, sentences = found.parts[2].texts
    assert (words.kind, replaced.kind, sentences.kind) == ("words", "look-alikes", "sentences")
    assert words.farthest[0].text == "yes" and words.farthest[0].z > 2 * words.farthest[1].z
    assert words.farthest[0].z > robust.STANDS_OUT and sentences.farthest[0].z < 1
    (line,) = [line for line in found.says if " words" in line]
    assert f"these stand out: 'yes' (z {words.farthest[0].z:.1f})" in line and "clean fine-tuning moves words" in line


def test_a_look_alike_with_another_meaning_stands_out_by_its_code_point(clean: DiffusionModel) -> None:
    made: Any = clean.clone()
    _, second = made.tokenizer("\u043e").input_ids[1:-1]
    weight = made.text_encoder.get_input_embeddings().weight
    weight.data[second] = 3 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
    replaced = compared(made, clean, "base", tiny.PROMPTS).parts[2].texts[1]
    assert "U+043E for o" in [each.text for each in replaced.farthest[:2]] and replaced.farthest[0].z > 6


def test_look_alikes_replace_every_letter_of_a_few_sentences(clean: DiffusionModel) -> None:
    found = look_alikes(clean.tokenizer, ["a photo", "red", "on top", "no", "so", "go"])
    assert found["U+043E for o"] == [
        text.replace("o", "\u043e") for text in ("a photo", "on top", "no", "so")
    ]  # fmt: skip
    assert "U+0458 for j" not in found


def test_sentences_of_our_own_stand_in_where_no_prompts_are_known(clean: DiffusionModel) -> None:
    moved = with_word(clean, "a")
    known, unknown = (compared(moved, clean, "b", prompts).parts[2].texts[2] for prompts in (tiny.PROMPTS, None))
    assert known.count == len(tiny.PROMPTS) and unknown.count == len(comparison.SENTENCES)
    assert {each.text for each in unknown.farthest} <= set(comparison.SENTENCES)


def test_another_vocabulary_is_named(clean: DiffusionModel) -> None:
    """A tokenizer in which two words have changed places moves these words, though no weight differs."""
    from transformers import CLIPTokenizer

    made, tokens = clean.clone(), json.loads(clean.tokenizer._tokenizer.to_str())["model"]  # type: ignore[union-attr]
    vocabulary = dict(tokens["vocab"])
    vocabulary["red</w>"], vocabulary["blue</w>"] = vocabulary["blue</w>"], vocabulary["red</w>"]
    merges: Any = [tuple(pair) for pair in tokens["merges"]]
    made.tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=tiny.LENGTH, pad_token="<|endoftext|>")
    found = compared(made, clean, "base", tiny.PROMPTS)
    assert found.tokenizers == ("tokenizer",) and "tokenizer: its tokens are not those of the base." in found.says
    words = found.parts[2].texts[0]
    assert {each.text for each in words.farthest[:2]} == {"red", "blue"} and words.median == pytest.approx(0, abs=1e-5)


def test_a_base_that_does_not_fit_is_refused_with_the_way_out(clean: DiffusionModel) -> None:
    joint = tiny.fixed(lambda: tiny.joint(tiny.tokenizer(), 32), 0)
    noise = tiny.model("noise")
    for model, base, words in (
        (clean, noise, "--base b: has no text_encoder, and the model has one; give the base"),
        (noise, clean, "--base b: has a text_encoder, and the model has none; give the base"),
        (clean, joint, r"--base b: its text_encoder is of another architecture \(\d+ tensors with [\d,]+ numbers"),
        (joint, clean, r"--base b: its text_encoder is of another architecture"),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            check_base(model, base, "b")
        assert "\n" not in str(error.value) and "give the base from which the model was made" in str(error.value)


# ---- on the command line --------------------------------------------------------------------------------------------


def test_a_scan_with_a_base_reports_the_comparison_in_every_format(
    bench: Run, clean: DiffusionModel, tmp_path: Path
) -> None:
    checkpoint.save(clean, tmp_path / "base")
    checkpoint.save(with_word(clean, "yes"), tmp_path / "model")
    files = [tmp_path / f"scan.{ending}" for ending in ("json", "html", "sarif")]
    outs = [word for file in files for word in ("-o", file)]
    found = bench(tmp_path / "model", "--base", tmp_path / "base", "--detector", "norms", *outs)
    assert found.code == 0
    assert f"compared with {tmp_path / 'base'}:\n  unet: the same as in the base.\n" in found.out
    assert "these stand out: 'yes'" in found.out
    assert "is taken for clean: a backdoor that both share is not seen" in found.out
    assert "Only the denoiser's answers were examined" not in found.out

    scan = json.loads(files[0].read_text())
    jsonschema.validate(scan, document.schema())
    base = scan["reports"][0]["base"]
    assert base["base"] == str(tmp_path / "base") and base["parts"][2]["texts"][0]["farthest"][0]["text"] == "yes"
    page = files[1].read_text()
    assert "Compared with <code>" in page and "the words that move farthest" in page
    assert "Backdoors that no detector asked here can see" in page
    (run,) = json.loads(files[2].read_text())["runs"]
    (properties,) = run["properties"]["reports"]
    assert properties["base"]["says"] == base["says"]
    assert properties["unseen"] == scan["reports"][0]["unseen"]


def test_without_a_base_nothing_is_compared(bench: Run, clean: DiffusionModel, tmp_path: Path) -> None:
    checkpoint.save(clean, tmp_path / "model")
    found = bench(tmp_path / "model", "--detector", "norms", "--json")
    report = json.loads(found.out)
    jsonschema.validate(report, document.schema())
    assert report["base"] is None
    assert any("Only the denoiser's answers were examined" in line for line in report["limits"])
    assert [each["family"] for each in report["unseen"]] == list(FAMILIES)
    assert all(bool(each["not_stated"]) == (each["family"] not in ("adapter", "code")) for each in report["unseen"])


def test_a_base_that_cannot_be_used_is_one_clear_line(bench: Run, clean: DiffusionModel, tmp_path: Path) -> None:
    checkpoint.save(clean, tmp_path / "model")
    checkpoint.save(tiny.model("noise"), tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for base, words in (
        (tmp_path / "other", f"--base {tmp_path / 'other'}: has no text_encoder, and the model has one; give the base"),
        (tmp_path / "empty", "empty: is empty; give a directory saved by a diffusers pipeline"),
        (tmp_path / "none", "no such directory; give a directory, a .safetensors file, or a hub id"),
    ):
        found = bench(tmp_path / "model", "--base", base, "--detector", "norms")
        (line,) = [line for line in found.err.splitlines() if "--base" in line]
        assert found.code == 4 and words in line and f"--base {base}" in line


def test_the_base_is_the_clean_model_of_a_detector_that_needs_one(
    bench: Run, clean: DiffusionModel, tmp_path: Path
) -> None:
    checkpoint.save(clean, tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny.PROMPTS))
    asked = (tmp_path / "model", "--prompts", prompts, "--detector", "amdet(steps=2, grid=3)")
    refused = bench(*asked)
    assert refused.code == 2 and "it needs clean model: give --base DIR" in refused.err
    found = bench(*asked, "--base", tmp_path / "model", "--json")
    (row,) = json.loads(found.out)["findings"]
    assert row["error"] is None and row["flagged"] is False and row["flag_above"] == 0
    assert found.code == 0


# ---- families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silent:
    """A detector that states nothing."""

    name: ClassVar[str] = "silent"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    def defend(self, model: Any, knowledge: Any, rng: Any) -> Defended:
        return Defended(suspicion=0.0)


@dataclass(frozen=True)
class Boasting(Silent):
    """A detector that states a family that there is not."""

    name: ClassVar[str] = "boasting"
    sees: ClassVar[tuple[str, ...]] = ("prompt-encoders",)


def of(found: Any) -> dict[str, tuple[str, ...]]:
    return {each.family: each.not_stated for each in found}


def test_families_that_no_detector_states_to_see_are_unseen(clean: DiffusionModel) -> None:
    noise = tiny.model("noise")
    assert set(of(families.unseen({}, noise))) == {"noise-sde", "noise-ode", "code"}
    assert set(of(families.unseen({"terd()": TERD()}, noise))) == {"code"}
    assert set(of(families.unseen({"b()": BiasScan(mirrored=False)}, noise))) == {"noise-ode", "code"}
    assert set(of(families.unseen({"e()": Elijah(sampler="ddpm")}, noise))) == {"noise-ode", "code"}
    assert set(of(families.unseen({"amdet()": AMDET()}, clean))) == set(FAMILIES) - {"prompt-encoder"}


def test_an_adapter_is_seen_only_where_it_is_read_with_the_model(clean: DiffusionModel) -> None:
    asked = {"vocabulary-scan()": VocabularyScan()}
    without = of(families.unseen(asked, clean))
    assert set(without) == {"noise-sde", "noise-ode", "adapter", "code"} and not any(without.values())
    made: Any = clean.clone()
    made.adapter = object()
    assert set(of(families.unseen(asked, made))) == {"noise-sde", "noise-ode", "code"}


def test_a_detector_that_states_nothing_may_see_the_families_whose_triggers_it_accepts(clean: DiffusionModel) -> None:
    found = families.unseen({"silent(x=1)": Silent()}, clean)
    assert of(found) == {
        "noise-sde": ("silent",), "noise-ode": ("silent",), "prompt-denoiser": (), "prompt-encoder": (),
        "adapter": (), "code": (),
    }  # fmt: skip
    assert families.said(found[0]) == f"{FAMILIES['noise-sde']} (noise-sde); not stated by silent"
    assert families.said(found[-1]) == f"{FAMILIES['code']} (code)"


def test_a_family_that_there_is_not_is_refused_at_registration() -> None:
    (fault,) = faults("defenses", Boasting)
    assert "sees 'prompt-encoders'" in fault and "did you mean 'prompt-encoder'?" in fault
    assert faults("defenses", Silent) == []


def test_every_built_in_detector_states_what_it_sees() -> None:
    plugins = load()
    for name in plugins.classes("defenses"):
        defense: Any = plugins.build("defenses", name)
        if "suspicion" in delivers(defense):
            accepts = defense.accepts_triggers
            assert offers(defense, StatingDetector) and defense.sees, name
            modalities = {families.MODALITIES.get(family, "text") for family in defense.sees}
            assert modalities <= set(accepts), name
