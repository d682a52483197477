"""Rehearsals: what stands in for published weights and data, how time runs ahead, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import registry
from harness.cli import call
from harness.diffusion import attention, events, training
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.models.architectures import untrained
from harness.runs import rehearsal, shortened, stand_ins
from harness.runs.job import AttackSpec
from harness.runs.store import Store
from harness.testing import tiny
from tests import plans

PARTS = {  # of each published model: parameters of its denoiser, its autoencoder and its text encoder
    "ddpm-cifar10": (35_746_307, None, None),
    "ddpm-celebahq": (113_673_219, None, None),
    "ldm-celebahq": (274_056_163, 55_322_782, None),
    "ncsn-celebahq": (65_574_549, None, None),
    "sd-v1-4": (859_520_964, 83_653_863, 123_060_480),
}


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load(strict=True)


class Ticks:
    """A clock that work moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(
            shortened, "time", SimpleNamespace(process_time=lambda: self.now, perf_counter=lambda: self.now)
        )

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ticks]:
    yield Ticks(monkeypatch)
    events.shorten(None)


# ---- stand-ins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_untrained_networks_have_the_published_numbers_of_parameters(name: str, plugins: registry.Registry) -> None:
    plugin = plugins.build("models", name)
    assert stand_ins.stands_in(plugin)
    with torch.device("meta"):
        model = untrained(plugin.architecture)
    own = sum(p.numel() for p in model.denoiser.parameters())
    own += sum(b.numel() for key, b in model.denoiser.named_buffers() if key == "time_proj.weight")  # frequencies
    parts = (model.vae, model.text_encoder)
    others = tuple(None if part is None else sum(p.numel() for p in part.parameters()) for part in parts)
    assert (own, *others) == PARTS[name] and own == plugin.work.parameters
    latent = {"ldm-celebahq": (3, 64, 64), "sd-v1-4": (4, 64, 64)}
    assert model.shape == latent.get(name, (3, plugin.side, plugin.side))
    assert (model.family, model.conditional, model.vae is not None) == (
        plugin.family, plugin.conditional, plugin.latent
    )  # fmt: skip


def test_the_made_tokenizer_has_clips_size_and_keeps_words_and_triggers() -> None:
    tokens = stand_ins.tokenizer(("serendipity",))
    assert len(tokens) == stand_ins.VOCABULARY and max(tokens.get_vocab().values()) == stand_ins.VOCABULARY - 1
    assert all(len(tokens(word).input_ids) == 3 for word in ("serendipity", *stand_ins.LOOKS, *stand_ins.NOUNS))
    assert tokens("\u200b a dog").input_ids != tokens("a dog").input_ids
    assert max(len(tokens(text).input_ids) for text in stand_ins.captions()) < 20


def test_made_data_and_prompts_have_the_size_and_the_form_of_the_published_ones(plugins: registry.Registry) -> None:
    plugin = stand_ins.StandIn(plugins.build("models", "sd-v1-4"), lambda network, images: network(images))
    images = stand_ins.images(3, 512, 0)
    assert images.shape == (3, 3, 512, 512) and images.abs().max() <= 1 and images.std() > 0.1
    train, test = (set(plugin.prompts(split, 200, generator(0, "x")) or ()) for split in ("train", "test"))  # type: ignore[arg-type]
    assert len(train) == len(test) == 200 and not train & test
    assert plugin.name == "sd-v1-4" and plugin.words()[0] == "calm"


def test_a_model_whose_directory_is_here_is_rehearsed_as_it_is(plugins: registry.Registry, tmp_path: Path) -> None:
    assert not stand_ins.stands_in(plugins.build("models", f"ddpm-cifar10(path={str(tmp_path)!r})"))
    assert not stand_ins.stands_in(plugins.build("models", "digits-ddpm"))


# ---- time -----------------------------------------------------------------------------------------------------------


def test_a_loop_is_whole_without_a_rehearsal_and_two_passes_in_one(ticks: Ticks) -> None:
    assert list(events.loop("x", range(7))) == list(range(7))
    events.shorten(shortened.Clock(None, "attack").shorten)
    assert list(events.loop("x", range(7))) == [0, 1]
    assert list(events.loop("x", iter("abc"), 3)) == ["a", "b"]
    assert list(events.loop("x", range(1))) == [0]


def test_loops_inside_loops_are_extrapolated_to_their_true_time(ticks: Ticks) -> None:
    def job() -> None:
        ticks.work(3.0)
        for _ in events.loop("outer", range(50)):
            ticks.work(0.5)
            for _ in events.loop("inner", range(20)):
                ticks.work(0.1)
        ticks.work(1.0)

    job()
    true, begun = ticks.now, ticks.now
    clock = shortened.Clock(None, "attack")
    events.shorten(clock.shorten)
    job()
    assert ticks.now - begun < 10
    assert [ticks.now - begun + ahead for ahead in clock.ahead] == pytest.approx([true] * 3)
    outer = next(loop for loop in clock.loops if loop.outer)
    assert (outer.phase, outer.total) == ("outer", 50) and outer.seconds == pytest.approx([2.5, 2.5])


def test_a_slow_first_pass_makes_the_spread_and_not_the_estimate(ticks: Ticks) -> None:
    clock = shortened.Clock(None, "attack")
    events.shorten(clock.shorten)
    for step in events.loop("steps", range(100)):
        ticks.work(3.0 if step == 0 else 1.0)
    low, likely, high = (4.0 + ahead for ahead in clock.ahead)
    assert (low, likely, high) == pytest.approx((102.0, 102.0, 4.0 + 98 * 3))


def test_a_sampler_through_which_gradients_flow_keeps_its_steps(ticks: Ticks) -> None:
    events.shorten(shortened.Clock(None, "defend").shorten)
    model, inputs = tiny.model("noise"), tiny.inputs(tiny.model("noise"), 2)
    calls: list[int] = []
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        DDIM(steps=5).run(model, inputs)
    assert len(calls) == 2
    DDIM(steps=5).run(model, inputs)
    assert len(calls) == 7


class Counting(nn.Module):
    """A denoiser that takes a second for each row, and remembers how many it got."""

    def __init__(self, ticks: Ticks) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 8, 8))
        self.config = SimpleNamespace(in_channels=1, sample_size=8, cross_attention_dim=None)
        self.ticks, self.rows = ticks, []

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        assert timestep.ndim == 0 or len(timestep) == len(sample)
        self.rows.append(len(sample))
        self.ticks.work(float(len(sample)))
        return SimpleNamespace(sample=sample * self.weight)


def test_few_rows_are_computed_and_the_time_of_all_is_counted(ticks: Ticks) -> None:
    clock = shortened.Clock(2, "attack")
    with shortened.rehearsed(clock):
        model = DiffusionModel(Counting(ticks), tiny.scheduler())
        x, t = torch.randn(12, 1, 8, 8), torch.arange(12)
        out = model.eps(x, t)
        loss = out.square().mean()
        loss.backward()
    denoiser: Any = model.denoiser
    assert denoiser.rows == [2] and out.shape == x.shape
    assert torch.equal(out[2:4], out[:2]) and denoiser.weight.grad.abs().sum() > 0
    assert ticks.now + clock.ahead[1] == pytest.approx(12.0)
    model.eps(x, t)
    assert denoiser.rows == [2, 12]  # nothing stays changed


def test_image_sets_are_sampled_in_one_batch_and_come_in_full(ticks: Ticks) -> None:
    clock = shortened.Clock(4, "sample", images=10.0)
    with shortened.rehearsed(clock):
        model = DiffusionModel(Counting(ticks), tiny.scheduler())
        images = model.sample(tiny.inputs(model, 30), DDIM(steps=25), batch=10)
    assert len(images) == 30
    assert ticks.now + clock.ahead[1] == pytest.approx(30 * 25 * 10)


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_jobs_that_differ_in_steps_rates_and_seeds_alone_are_rehearsed_once(plugins: registry.Registry) -> None:
    defenses = ("steps=10", "steps=20, lr=1e-5", "steps=20, batch=8", "ema=0.9")
    cells = [plans.cell(plugins, defense=f"finetune({each})", seed=seed) for seed in (0, 1) for each in defenses]
    made = plans.planned(plugins, *cells)
    costs = rehearsal.Costs(made.jobs, plugins)
    groups = costs.groups()
    kinds = [made.jobs[group.first].kind for group in groups]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"attack": 1, "defend": 3, "sample": 1, "measure": 1}
    assert sum(len(group.members) for group in groups) == len(made.jobs)
    assert rehearsal.Costs(made.jobs, plugins).groups() == groups


def test_a_rehearsed_job_needs_the_rehearsed_jobs_of_the_groups_of_its_needs(plugins: registry.Registry) -> None:
    made = plans.planned(plugins, plans.cell(plugins), plans.cell(plugins, seed=1))
    costs = rehearsal.Costs(made.jobs, plugins)
    short = rehearsal.short_jobs(made, costs, costs.groups(), gpu=False, rows=0)
    seen: set[str] = set()
    for key, (group, job) in short.items():
        assert set(job.needs) <= seen
        assert job.kind == made.jobs[group.first].kind
        seen.add(key)


def test_the_time_of_a_job_with_other_steps_follows_from_the_figure() -> None:
    loop = {"phase": "finetune", "total": 100, "seconds": [3.0, 2.0], "whole_s": 201.0}
    found = rehearsal.Figure("x", "c", (211.0, 211.0, 311.0), 15.0, (loop,), lengths={"steps": 100})
    low, likely, high = rehearsal.expected(found, {"steps": 1000})
    assert likely == pytest.approx(211 + 900 * 2) and low == likely and high > likely
    assert rehearsal.expected(found, {"steps": 100})[1] == pytest.approx(211)
    images = rehearsal.Figure("x", "c", (30.0, 30.0, 30.0), 9.0, ({**loop, "phase": "sample", "whole_s": 20.0},),
                              lengths={"evaluations": 500})  # fmt: skip
    assert rehearsal.expected(images, {"evaluations": 2000})[1] == pytest.approx(10 + 80)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_checkpointing_is_turned_on_where_the_model_asks_and_gradients_stay_the_same(
    plugins: registry.Registry,
) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = training.prepared(SimpleNamespace(checkpointing=checkpointing), tiny.model("text").clone())
        net: Any = model.denoiser
        assert net.is_gradient_checkpointing == checkpointing
        net.requires_grad_(True)
        t = torch.tensor([3, 700])
        x = torch.randn(2, *model.shape, generator=generator(0, "x"))
        model.eps(x, t, model.embed(["a", "b"])).square().mean().backward()
        return [p.grad for p in net.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other)
    assert plugins.build("models", "sd-v1-4(checkpointing=True)").checkpointing
    assert training.prepared(plugins.build("models", "digits-ddpm"), "untouched") == "untouched"


def test_captured_attention_maps_can_be_trained_on_under_checkpointing() -> None:
    def gradients(checkpointing: bool) -> list[Tensor | None]:
        model = training.prepared(SimpleNamespace(checkpointing=checkpointing), tiny.model("text").clone())
        net: Any = model.denoiser
        net.requires_grad_(True)
        x, t = torch.randn(2, *model.shape, generator=generator(0, "x")), torch.tensor([3, 700])
        with attention.capture(net) as maps:
            answer = model.eps(x, t, model.embed(["a", "b"]))
        value = answer.square().mean() + torch.stack([each.square().mean() for each in maps.values()]).sum()
        value.backward()  # after the block, where a checkpoint would compute attention without maps
        assert net.is_gradient_checkpointing == checkpointing
        return [p.grad for p in net.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)


# ---- the command ----------------------------------------------------------------------------------------------------

SUITE = """
title = "tiny"
metrics = ["asr", "drift"]
[[grid]]
model = ["digits-ddpm"]
attack = ["villandiffusion(solver='ode', trigger_only=True, steps=400, batch=4)"]
trigger = ["box"]
target = ["hat"]
defense = ["none", {defense}]
sampler = ["ddim(steps=50)"]
n = 400
utility_n = 0
"""
OWN = '''
"""Methods of a stranger, whose loops are their own."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any, ClassVar
from harness import Defended, hookimpl, progress

@dataclass(frozen=True)
class Own:
    name: ClassVar[str] = "own-loop"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    steps: int = 100000
    fails: bool = False

    def defend(self, model: Any, knowledge: Any, rng: Any) -> Defended:
        if self.fails:
            raise RuntimeError("the last job of a long week")
        for step in range(self.steps):
            model.eps(model.draw_eps(2, rng), model.draw_t(2, rng))
            progress("mine", step + 1, self.steps)
        return Defended(model=model.clone())

@hookimpl
def defenses() -> list[type]:
    return [Own]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rehearsals")
    (root / "own.py").write_text(OWN)
    (root / "good.toml").write_text(SUITE.format(defense='"finetune(steps=300, batch=4)", "own-loop"'))
    (root / "bad.toml").write_text(SUITE.format(defense='"own-loop(fails=True)"'))
    return root


def told(capsys: pytest.CaptureFixture[str], place: Path, command: str, suite: str, code: int = 0) -> tuple[Any, str]:
    words = [command, str(place / f"{suite}.toml"), "--store", str(place / "store")]
    found = call([*words, "--plugin-file", str(place / "own.py"), "--json"])
    out = capsys.readouterr()
    assert found == code, out.err
    return json.loads(out.out), out.err


@pytest.mark.slow
def test_a_suite_is_rehearsed_resumed_and_used_by_the_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, _ = told(capsys, place, "plan", "good")
    found, _ = told(capsys, place, "rehearse", "good")
    groups = {group["label"].split(" on ")[0]: group for group in found["groups"]}
    assert all(group["error"] is None and group["fits"] for group in found["groups"])
    tuned, own = groups["defend finetune(steps=300, batch=4)"], groups["defend own-loop"]
    assert (tuned["phase"], tuned["passes"]) == ("finetune", 300) and (own["phase"], own["passes"]) == ("mine", 100000)
    assert tuned["seconds"][1] == pytest.approx(tuned["pass_s"] * 300, rel=0.9) and tuned["rehearsed_s"] < 300
    assert own["seconds"][1] > 1000 * own["pass_s"] > 0
    assert sum(group["jobs"] for group in found["groups"]) == len(before["jobs"])
    again, err = told(capsys, place, "rehearse", "good")
    assert again == found and f"{len(found['groups'])} were rehearsed before" in err
    after, _ = told(capsys, place, "plan", "good")
    estimates = {job["label"]: job["estimate_s"] for job in after["jobs"]}
    label = next(label for label in estimates if label.startswith("defend finetune"))
    assert estimates[label] == pytest.approx(tuned["seconds"][1])
    assert all(job["rehearsed"]["device"] == found["device"] for job in after["jobs"])
    assert all(job["rehearsed"] is None for job in before["jobs"])
    assert not list(Store(place / "store").rehearsal_store().keys())  # weights are not kept


@pytest.mark.slow
def test_a_failed_job_ends_a_rehearsal_with_1_and_the_end_of_its_log(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = told(capsys, place, "rehearse", "bad", code=1)
    failed = next(group for group in found["groups"] if group["error"])
    assert failed["label"].startswith("defend own-loop(fails=True) on digits-ddpm attacked by villandiffusion")
    assert "the last job of a long week" in failed["error"] and 'raise RuntimeError("the last job' in err
    good = next(group for group in found["groups"] if group["label"].startswith("attack"))
    assert good["error"] is None and good["seconds"][1] > 0


def test_what_does_not_fit_is_named_with_the_remedy(plugins: registry.Registry) -> None:
    made = plans.planned(plugins, plans.cell(plugins))
    costs = rehearsal.Costs(made.jobs, plugins)
    key = next(key for key, job in made.jobs.items() if isinstance(job.spec, AttackSpec))
    found = rehearsal.Figure("x", "c", host_bytes=2e9, left_out_bytes=30e9)
    need = rehearsal.room(found, key, costs, 20e9, None)
    assert not need.fits and need.host == pytest.approx(32e9)
    assert rehearsal.remedy(key, costs) == "use a GPU with more memory, a smaller batch"
    on_gpu = rehearsal.Figure("x", "c", host_bytes=2e9, device_bytes=30e9)
    assert not rehearsal.room(on_gpu, key, costs, 20e9, 24e9).fits
    assert rehearsal.room(on_gpu, key, costs, 20e9, 80e9).fits
