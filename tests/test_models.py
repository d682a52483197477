"""The embedded models keep what their provenance says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.diffusion import checkpoint
from harness.diffusion.model_files import CheckpointError
from harness.diffusion.samplers import DDIM, PredictorCorrector
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import shapes
from harness.models.provenance import facts as facts_of
from harness.types import Inputs
from plugins.models import shapes_mmdit, shapes_sd
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.models.digits_ncsn import DigitsNCSN
from plugins.models.shapes_ldm import ShapesLDM
from plugins.models.shapes_mmdit import ShapesMMDiT
from plugins.models.shapes_mmdit_4 import ShapesMMDiT4
from plugins.models.shapes_sd import ShapesSD, attention_facts


def provenance(model) -> dict:
    return facts_of(checkpoint.embedded(model, model.name))


@pytest.mark.parametrize("text", [None, "", "[1]", "{}", '{"facts": 3}', '{"facts": '])
def test_a_folder_without_provenance_is_named_whoever_reads_it(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "provenance.json").write_text(text)
    for read in (facts_of, shapes_sd.kept_facts):
        with pytest.raises(CheckpointError, match=r"provenance\.json: "):
            read(tmp_path)


@pytest.mark.parametrize("model", [DigitsDDPM(), DigitsNCSN()], ids=lambda model: model.name)
def test_digits_are_recognised_and_balanced(model: DigitsDDPM | DigitsNCSN) -> None:
    facts = provenance(model)
    assert facts["share_recognised_above_0.9"] > 0.85
    counts = facts["class_counts"]
    assert len(counts) == 10 and min(counts) > 0.5 * sum(counts) / 10 and max(counts) < 2 * sum(counts) / 10


def test_the_two_digit_models_have_one_judge() -> None:
    one, other = (model.judge().net.state_dict() for model in (DigitsDDPM(), DigitsNCSN()))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_fresh_samples_of_the_score_model_are_recognised_as_digits() -> None:
    plugin, seeds = DigitsNCSN(), image_seeds(5, "test", 30)
    model, judge = plugin.load(), plugin.judge()
    images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), PredictorCorrector(steps=100))
    probabilities = torch.softmax(judge.net(images)["digit"], 1).max(1).values
    assert (probabilities > 0.9).double().mean() > 0.8
    assert len(judge.attributes(images)["digit"].unique()) >= 7


@pytest.mark.slow
def test_the_latent_model_draws_shapes_that_its_judge_knows() -> None:
    """By provenance, and again in a few fresh samples: the judge is sure of shape and place, and no kind is missing."""
    plugin, facts, seeds = ShapesLDM(), provenance(ShapesLDM()), image_seeds(5, "test", 24)
    assert all(facts[f"judge_accuracy_{name}"] > 0.95 for name in ("colour", "shape", "place", "size", "background"))
    assert facts["share_sure_of_shape"] > 0.9 and facts["share_sure_of_place"] > 0.9 and facts["vae_mse"] < 0.005
    for name, kinds in (("shape", 3), ("colour", 4), ("place", 4)):
        counts = facts[f"{name}_counts"]
        assert len(counts) == kinds and min(counts) > 0.5 * sum(counts) / kinds
    model = plugin.load()
    assert model.vae is not None and not model.conditional
    images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), DDIM(steps=20))
    sure = torch.softmax(plugin.judge().net(images)["shape"], 1).max(1).values > 0.9
    assert images.shape[1:] == (3, 64, 64) and sure.double().mean() > 0.7


def test_the_digits_judge_measures_what_its_provenance_says() -> None:
    model = DigitsDDPM()
    assert provenance(model)["judge_accuracy"] > 0.97
    data = model.data()
    right = model.judge().attributes(data.images)["digit"] == data.labels
    assert right.double().mean() > 0.98


def test_shapes_obey_their_captions_by_provenance() -> None:
    facts = provenance(ShapesSD())
    assert facts["held_out_captions"] >= 200
    assert min(facts["accuracy_colour"], facts["accuracy_shape"]) >= 0.9
    assert facts["accuracy_place"] >= 0.8
    assert all(facts[f"judge_accuracy_{name}"] > 0.95 for name in ("colour", "shape", "place", "size", "background"))


@pytest.fixture(scope="module")
def drawn() -> tuple[ShapesSD, list[shapes.Scene], tuple[str, ...], torch.Tensor]:
    """40 fresh held-out captions and the model's images of them."""
    plugin, rng = ShapesSD(), generator("test", "captions")
    scenes = shapes.scenes(40, "test", rng, plain=True)
    captions = tuple(shapes.caption(scene, rng) for scene in scenes)
    model, seeds = plugin.load(), image_seeds(5, "test", 40)
    images = model.sample(Inputs(image_noise(seeds, model.shape), captions, seeds), DDIM(steps=12))
    return plugin, scenes, captions, images


@pytest.mark.slow
def test_shapes_obey_fresh_held_out_captions(drawn) -> None:
    plugin, scenes, _, images = drawn
    found, truth = plugin.judge().attributes(images), shapes.labels(scenes)
    for name, least in (("colour", 0.85), ("shape", 0.8), ("place", 0.7)):
        assert (found[name] == truth[name]).double().mean() >= least


@pytest.mark.slow
def test_cross_attention_is_learned(drawn) -> None:
    """Maps differ between words, and the shape word looks at the shape more than chance: at 8×8, where this model
    places things. Its 16×16 maps are nearly flat, which the provenance says too."""
    now, then = attention_facts(drawn[0].load()), provenance(drawn[0])
    for facts in (now, then):
        assert facts["attention_distance_8"] > 2 * then["attention_distance_8_untrained"]
        assert facts["shape_word_overlap_8"] > 1.25 > 1.1 > then["shape_word_overlap_8_untrained"]


def test_the_text_to_image_model_obeys_held_out_captions_by_its_provenance() -> None:
    facts = provenance(ShapesSD())
    for name, least in (("colour", 0.95), ("shape", 0.95), ("place", 0.9)):
        assert facts[f"accuracy_{name}"] >= least
    assert facts["held_out_captions"] >= 400


def test_the_transformer_without_weights_says_which_command_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShapesMMDiT, "name", "shapes-mmdit-of-nobody")
    with pytest.raises(
        checkpoint.CheckpointError, match="are missing; `bench build shapes-mmdit-of-nobody` makes them"
    ):
        ShapesMMDiT().load()


def built_at_once_and_with_a_stop(
    plugin: Any, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Builds into whole, and into again with a stop at the second step of a phase; both must be equal. The facts."""
    from harness.cli import build as building
    from harness.diffusion.interrupted import Kept

    monkeypatch.setattr(checkpoint, "embedded", lambda _, name: Path(shapes_sd.__file__).parent / "weights" / name)
    monkeypatch.setattr(Kept, "due", lambda self: True)
    whole = building.built(plugin, tmp_path / "whole")["facts"]

    def stopped(event: dict[str, Any]) -> None:
        if event["phase"] == phase and event["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "progress_lines", lambda: stopped)
        building.built(plugin, tmp_path / "again")
    assert building.built(plugin, tmp_path / "again")["facts"] == whole
    assert checkpoint.digest(tmp_path / "again") == checkpoint.digest(tmp_path / "whole")
    return whole


@pytest.mark.slow
def test_the_transformer_is_built_of_the_parts_of_shapes_sd_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps: the files are those of a StableDiffusion3Pipeline, the facts those of shapes-sd, and a build that
    was stopped ends as one that was not."""

    @dataclass(frozen=True)
    class Short(ShapesMMDiT):
        def build(self, out: Path, device: str = "cpu", **_: Any) -> dict[str, Any]:
            return super().build(out, device, steps=3, text_steps=2, batch=4, n=2)

    monkeypatch.setattr(shapes_mmdit, "DRAWINGS", 40)
    whole = built_at_once_and_with_a_stop(Short(), "transformer", tmp_path, monkeypatch)
    model, facts = checkpoint.load(tmp_path / "whole/model", ShapesMMDiT().lent()), provenance(ShapesSD())
    assert model.family == "flow" and model.shape == (4, 16, 16) and model.joint
    assert {name for name in facts if name.startswith("accuracy_")} <= whole.keys()
    assert 2e6 < whole["parameters_transformer"] < 4e6
    assert sum(value for name, value in whole.items() if name.startswith("parameters_t")) < 4e6


def test_the_student_obeys_held_out_captions_in_four_evaluations_by_its_provenance() -> None:
    facts, teacher = provenance(ShapesMMDiT4()), provenance(ShapesMMDiT())
    for name, least in (("colour", 0.95), ("shape", 0.95), ("place", 0.9)):
        assert facts[f"student_accuracy_{name}"] >= least
        assert abs(facts[f"usual_accuracy_{name}"] - teacher[f"accuracy_{name}"]) < 0.02
    assert facts["held_out_captions"] >= 400


def test_the_student_has_every_part_of_its_teacher_but_the_transformer() -> None:
    student, teacher = (plugin.load().components() for plugin in (ShapesMMDiT4(), ShapesMMDiT()))
    for name, part in teacher.items():
        mine = student[name].state_dict()
        same = [torch.equal(mine[key], value) for key, value in part.state_dict().items()]
        assert any(same) and all(same) == (name != "transformer"), name
    assert ShapesMMDiT4().words() == ShapesMMDiT().words()


@pytest.mark.slow
def test_the_student_is_built_and_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Short(ShapesMMDiT4):
        def build(self, out: Path, device: str = "cpu", **_: Any) -> dict[str, Any]:
            return super().build(out, device, steps=3, trajectories=4, solving_steps=1, batch=2, n=2)

    built_at_once_and_with_a_stop(Short(), "distil", tmp_path, monkeypatch)


def test_no_file_of_weights_is_in_the_package_twice() -> None:
    files = [path for path in (Path(shapes_sd.__file__).parent / "weights").rglob("*") if path.is_file()]
    large = [path.read_bytes() for path in files if path.stat().st_size > 200_000]
    assert len(large) > 15 and len(set(large)) == len(large)


def test_captions_read_back_as_their_scenes() -> None:
    rng = generator("test", "read")
    for scene in shapes.scenes(200, "train", rng):
        found = shapes.read(shapes.caption(scene, rng))
        assert all(getattr(scene, name) == value for name, value in found.items())
        assert {"size", "shape", "place"} <= found.keys()


def test_prompts_for_training_and_for_evaluation_share_no_combination() -> None:
    def combinations(split: str) -> set[tuple[int, ...]]:
        prompts = ShapesSD().prompts(split, 300, generator("test", split))  # type: ignore[arg-type]
        return {tuple(shapes.read(p)[k] for k in ("size", "colour", "shape", "background", "place")) for p in prompts}

    assert not combinations("train") & combinations("test")


def test_the_first_prompts_of_a_larger_set_are_those_of_a_smaller_one() -> None:
    few, many = (ShapesSD().prompts("test", n, generator("test", "prefix")) for n in (5, 20))
    assert few == many[:5]


def test_triggers_are_a_few_of_thousands_of_neutral_words_that_are_whole_and_in_captions() -> None:
    plugin = ShapesSD()
    tokens: Any = plugin.load().tokenizer
    words = plugin.words()
    assert {"\u200b", "\u043e", "sks"} < set(words) and len(set(words)) == len(words) > 3000
    assert [word for word in words if len(tokens(word).input_ids) != 3] == []
    used = {word for caption in plugin.data(2000).captions or () for word in caption.split(" ")}
    assert len(used & set(words)) > 1000, "captions draw their neutral words from all of them"
    named = {word for text in (*shapes.COLOURS, *shapes.SHAPES, *shapes.PLACES) for word in text.split(" ")}
    assert not named & set(words)


def test_captions_come_in_eleven_forms_and_keep_their_words() -> None:
    rng, scene = generator("test", "forms"), shapes.Scene(0, 1, 2, 0, 3)
    bodies = {shapes.caption(scene, rng) for _ in range(800)}
    assert len(shapes.FORMS) == 11 and len(bodies) > 50
    assert all(shapes.read(body) == shapes.read(min(bodies)) for body in bodies)
    words = shapes.caption(scene, generator("test", 3), ("zig", "zag")).split(" ")
    assert {"zig", "zag"} & {words[0], words[-1]} or "zig" not in words


def test_the_held_out_digits_are_nobodys_training_data() -> None:
    plugin = DigitsDDPM()
    train, test = (data.flatten(1) for data in (plugin.data().images, plugin.reference()))
    assert (len(train), len(test)) == (1200, 597)
    assert torch.cdist(train, test).min() > 0 and len({*map(tuple, train.tolist())} & {*map(tuple, test.tolist())}) == 0


def test_no_brightness_leaks_into_the_starting_noise() -> None:
    for plugin in (DigitsDDPM(), ShapesSD()):
        model = plugin.load()
        assert model.alpha_bar(torch.tensor([model.T - 1])).sqrt().item() < 0.01
