"""Models of real data: where the data come from, what their content decides, and trainings that were interrupted."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from harness.capabilities import encoders_of
from harness.cli import build as building
from harness.diffusion import checkpoint, events
from harness.diffusion.interrupted import UNFINISHED, Kept
from harness.diffusion.model_files import CheckpointError
from harness.diffusion.networks import built
from harness.diffusion.training import Schedule, minimize
from harness.judges.image_folders import DataError
from harness.models import real_data
from harness.models.hub_models import Trainable
from plugins.models.cifar10_ddpm import Cifar10DDPM
from plugins.models.ddpm_celeba import DDPMCelebA
from plugins.models.ddpm_cifar10 import DDPMCifar10
from plugins.models.ddpm_mnist import DDPMMnist
from plugins.models.mnist_ddpm import MnistDDPM


def written(path: Path, n: int, side: tuple[int, ...], column: str, seed: int) -> None:
    """A parquet file of n random pictures and their classes, as the hub has them."""
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, side, dtype=np.uint8)).save(out, "PNG")
        images.append({"bytes": out.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {column: {"_type": "Image"}}}}
    table = pyarrow.table({column: images, "label": [i % 10 for i in range(n)]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


@pytest.fixture(scope="module")
def bench_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for BENCH_DATA with small data sets in the layouts of ylecun/mnist and uoft-cs/cifar10."""
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train", 60), ("test", 30)):
        written(root / f"mnist/mnist/{split}-00000-of-00001.parquet", n, (28, 28), "image", n)
        written(root / f"cifar10/plain_text/{split}-00000-of-00001.parquet", n, (32, 32, 3), "img", n)
    return root


@pytest.fixture
def small(bench_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(real_data.DATA, str(bench_data))
    return bench_data


@pytest.fixture
def trained_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MnistDDPM:
    """mnist-ddpm with weights that were trained on the small data."""
    building.built(_Short(), tmp_path / "weights")
    monkeypatch.setattr(MnistDDPM, "folder", property(lambda self: tmp_path / "weights"))
    return MnistDDPM()


@dataclass(frozen=True)
class _Short:
    """The recipe of mnist-ddpm with few steps."""

    name: ClassVar[str] = MnistDDPM.name
    version: ClassVar[int] = MnistDDPM.version

    def build(self, out: Path) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("harness.judges.classifiers.quality", lambda *_: {"samples": 0})
            patch.setattr(real_data, "SAMPLES", 8)
            return MnistDDPM().build(out, steps=4, batch=8, judge_steps=3)


# ---- where data come from -------------------------------------------------------------------------------------------


def test_each_model_reads_its_folder_of_the_named_directory(small: Path) -> None:
    grey, coloured = MnistDDPM().read("train", checked=False), Cifar10DDPM().read("test", checked=False)
    assert grey.images.shape == (60, 1, 28, 28) and coloured.images.shape == (30, 3, 32, 32)
    assert grey.labels is not None and grey.labels[:11].tolist() == [*range(10), 0]


def test_data_with_the_trained_content_are_read_and_others_are_refused(
    trained_on: MnistDDPM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(trained_on.data()) == 60 and trained_on.reference().shape == (30, 1, 28, 28)
    for split in ("train", "test"):
        written(tmp_path / f"other/mnist/{split}-00000-of-00001.parquet", 30, (28, 28), "image", 7)
    monkeypatch.setenv(real_data.DATA, str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"split train is not the data .* mnist-ddpm\(data_path='DIRECTORY'\)"):
        trained_on.data()
    named = MnistDDPM(data_path=str(tmp_path / "other" / "mnist"))
    assert len(named.data()) == 30 and named.digest() != trained_on.digest()


def test_the_digest_needs_no_data_and_is_the_same_wherever_they_are(
    trained_on: MnistDDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trained_on.digest()
    monkeypatch.delenv(real_data.DATA)
    assert trained_on.digest() == before
    place = trained_on.folder / "provenance.json"
    known = json.loads(place.read_text())
    known["facts"]["data"]["test"] = "0" * 64
    place.write_text(json.dumps(known))
    assert trained_on.digest() != before


def test_held_out_images_are_those_asked_for(trained_on: MnistDDPM) -> None:
    few = MnistDDPM(references=5)
    assert torch.equal(few.reference(), trained_on.reference()[:5])
    assert few.digest() == trained_on.digest(), "a number of references is a parameter, not content"


def test_a_directory_without_the_data_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(real_data.DATA, str(tmp_path))
    with pytest.raises(
        DataError, match=r"mnist: no such directory; BENCH_DATA must name a directory with the folder mn"
    ):
        MnistDDPM().read("train")


def test_without_the_hub_the_message_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.delenv(real_data.DATA, raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DataError, match=r"ylecun/mnist at main cannot be had .*, or set BENCH_DATA to a directory"):
        MnistDDPM().read("train")


def test_pictures_are_compared_in_a_public_encoder_and_digits_are_not() -> None:
    assert encoders_of(Cifar10DDPM()) and not encoders_of(MnistDDPM())


# ---- interrupted trainings ------------------------------------------------------------------------------------------


def train(path: Path | None, schedule: Schedule, stop_after: int | None = None, lr: float = 1e-2) -> Any:
    """(losses, weights) of a small training of 30 steps whose loss draws noise, or None if it was stopped."""
    torch.manual_seed(0)
    net, rng = nn.Linear(3, 2), torch.Generator().manual_seed(5)
    done = 0

    def loss() -> torch.Tensor:
        nonlocal done
        if done == stop_after:
            raise KeyboardInterrupt
        done += 1
        return (net(torch.randn(4, 3, generator=rng)) - 1).square().mean()

    kept = None if path is None else Kept(path, rng, every=0.0)
    try:
        losses = minimize(loss, net.parameters(), steps=30, lr=lr, schedule=schedule, ema=0.9, kept=kept)
    except KeyboardInterrupt:
        return None
    return losses, net.weight.detach()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_a_training_that_was_interrupted_twice_ends_as_one_that_was_not(schedule: Schedule, tmp_path: Path) -> None:
    losses, weights = train(None, schedule)
    state = tmp_path / "state.safetensors"
    assert train(state, schedule, stop_after=11) is None and train(state, schedule, stop_after=7) is None
    again, resumed = train(state, schedule)
    assert again == losses and torch.equal(resumed, weights)
    finished, same = train(state, schedule, stop_after=0)
    assert finished == losses and torch.equal(same, weights), "a finished training is not done again"


def test_a_state_of_other_settings_or_with_torn_bytes_is_not_taken_over(tmp_path: Path) -> None:
    losses, _ = train(None, "constant")
    state = tmp_path / "state.safetensors"
    assert train(state, "constant", stop_after=11, lr=0.5) is None
    assert train(state, "constant")[0] == losses
    assert train(state, "constant", stop_after=11) is None or state.is_file()
    state.write_bytes(state.read_bytes()[:200])
    assert train(state, "constant")[0] == losses


def test_a_build_that_was_stopped_goes_on_and_leaves_no_state(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Kept, "due", lambda self: True)
    whole = building.built(_Short(), tmp_path / "whole")

    def stopped(event: dict[str, Any]) -> None:
        if event["phase"] == "train" and event["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "progress_lines", lambda: stopped)
        building.built(_Short(), tmp_path / "again")
    assert not (tmp_path / "again").exists() and events._sink is None
    seen: list[int] = []
    monkeypatch.setattr(building, "progress_lines", lambda: lambda e: e["phase"] == "train" and seen.append(e["step"]))
    again = building.built(_Short(), tmp_path / "again")
    assert seen == [3, 4] and "an unfinished build is continued" in capsys.readouterr().err
    assert again["facts"] == whole["facts"] and whole["facts"]["distances_n"] == 8
    assert all(whole["facts"][f"{name}[mnist-cnn]"] >= 0 for name in ("fd", "precision", "recall"))
    assert not (tmp_path / "again" / UNFINISHED).exists()
    one, other = (tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_the_clock_decides_the_steps_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cifar10-ddpm is trained for minutes: the pace gives the steps, and an interrupted training keeps its number."""
    monkeypatch.setattr(real_data, "WARM_UP", 1)
    monkeypatch.setattr(real_data, "PACED", 2)
    monkeypatch.setattr("harness.judges.classifiers.quality", lambda *_: {"samples": 0})
    monkeypatch.setattr(real_data, "SAMPLES", 4)
    plugin = Cifar10DDPM()
    facts = plugin.build(tmp_path, minutes=1e-6, batch=2, judge_steps=1)
    assert facts["steps"] == 2 and 3.1e6 < facts["parameters"] < 3.3e6 and facts["trained_on"] == "CPU"
    state = tmp_path / UNFINISHED / "steps.json"
    assert real_data._steps(state, 1e-6, lambda: pytest.fail("the steps are known")) == 2
    assert real_data._steps(state, 5.0, lambda: 10.0) == 30


def test_a_training_goes_on_from_the_network_and_the_judge_of_an_earlier_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WARM_UP", 1), ("PACED", 2), ("SAMPLES", 4)):
        monkeypatch.setattr(real_data, name, value)
    monkeypatch.setattr("harness.judges.classifiers.quality", lambda *_: {"samples": 0})
    monkeypatch.setattr(Cifar10DDPM, "build", functools.partialmethod(Cifar10DDPM.build, batch=2, judge_steps=1))
    first = building.built(Cifar10DDPM(), tmp_path / "first", minutes=1e-6)["facts"]
    again = building.built(Cifar10DDPM(), tmp_path / "again", minutes=1e-6, start=tmp_path / "first")["facts"]
    third = building.built(Cifar10DDPM(), tmp_path / "third", minutes=1e-6, start=tmp_path / "again")["facts"]
    assert "before" not in first and again["before"]["steps"] == first["steps"] == again["steps"] == 2
    assert third["before"]["before"] == again["before"] and third["started_from"] != again["started_from"]
    assert again["judge_accuracy"] == first["judge_accuracy"]
    files = ["judge/judge.safetensors", "model/unet/diffusion_pytorch_model.safetensors"]
    judges, networks = ([(tmp_path / of / file).read_bytes() for of in ("first", "again")] for file in files)
    assert judges[0] == judges[1] and networks[0] != networks[1]
    before, now = (checkpoint.load(tmp_path / of / "model").denoiser.state_dict() for of in ("first", "again"))
    assert max((now[key].float() - before[key].float()).abs().max().item() for key in now) < 0.02, "two small steps"
    with pytest.raises(CheckpointError, match=r"provenance\.json: is no provenance; name a folder of bench build"):
        Cifar10DDPM().build(tmp_path / "none", start=tmp_path)


def test_taking_the_pace_changes_neither_weights_nor_draws(small: Path) -> None:
    from harness.diffusion.training import Examples, denoising_loss
    from plugins.models.mnist_ddpm import _untrained

    model, rng = _untrained(), torch.Generator().manual_seed(3)
    examples = Examples(model, MnistDDPM().read("train", checked=False))
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    state = rng.get_state()
    assert real_data._pace(model, lambda: denoising_loss(model, examples.batch(2, rng)), rng) > 0
    assert torch.equal(rng.get_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())


def test_a_recipe_with_a_number_of_steps_refuses_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    from harness.cli import call

    assert call(["build", "digits-ddpm", "--minutes", "3"]) == 2
    assert "leave --minutes out" in capsys.readouterr().err


# ---- the papers' sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [DDPMCifar10(), DDPMMnist(), DDPMCelebA(data_path="faces")], ids=lambda p: p.name)
def test_the_networks_that_can_be_trained_have_the_sizes_that_they_state(plugin: Trainable) -> None:
    with torch.device("meta"):
        config = dict(plugin.architecture["unet"])
        network = built(config, config.pop("_class_name"))
    assert sum(p.numel() for p in network.parameters()) == plugin.work.parameters
    assert network.config.sample_size == plugin.side


def test_a_model_of_a_published_architecture_is_trained_and_named_by_its_path(
    bench_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WARM_UP", 1), ("PACED", 2)):
        monkeypatch.setattr(real_data, name, value)
    small = dict(DDPMMnist.architecture["unet"], block_out_channels=(8, 8, 8), norm_num_groups=4, attention_head_dim=8)
    monkeypatch.setattr(DDPMMnist, "architecture", {**DDPMMnist.architecture, "unet": small})
    monkeypatch.setattr(DDPMMnist, "training_batch", 2)
    plugin = DDPMMnist(data_path=str(bench_data / "mnist"), inception="", clip="")
    facts = building.built(plugin, tmp_path / "mine", minutes=1e-6)["facts"]
    assert facts["steps"] == 2 and facts["data"]["train"] == real_data.content(plugin.data())
    named = DDPMMnist(path=str(tmp_path / "mine/model"), data_path=str(bench_data / "mnist"), inception="", clip="")
    assert named.load().shape == (1, 28, 28) and named.reference().shape == (30, 1, 28, 28)


def test_a_published_model_is_built_where_its_owner_says(capsys: pytest.CaptureFixture[str]) -> None:
    from harness.cli import call

    assert call(["build", "ddpm-cifar10"]) == 2
    assert "ddpm-cifar10 has no place in the package; name a directory with -o" in capsys.readouterr().err
