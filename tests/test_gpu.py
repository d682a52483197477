"""What is done otherwise on a GPU, as far as a processor shows it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.diffusion import attention, gpu, training
from harness.diffusion.events import listen
from harness.diffusion.training import Diverged, Losses
from harness.engine import child
from harness.engine.gpus import Leases
from harness.registry import load
from harness.runs.job import Job
from harness.runs.planning import Outlines, plan
from harness.runs.suite import load_suite
from tests import engine_tools
from tests.engine_tools import do, job, local
from tests.oracles import tiny_flow, tiny_mmdit, tiny_ncsn, tiny_sd, tiny_unet

store, bodies = engine_tools.store, engine_tools.bodies
CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [tiny_unet, tiny_flow, tiny_ncsn])
def test_tables_are_those_of_the_schedule_on_the_models_device_and_in_its_copies(make: Any) -> None:
    model = make()
    t = torch.tensor([0, 7, 999, -1])
    if model.family == "vp":
        a_bar = torch.cat([model.scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
        assert torch.equal(model.alpha_bar(t).flatten(), a_bar[t].float())
        assert torch.equal(model.alpha(t).flatten(), (a_bar[t] / a_bar[t - 1]).float())
    else:
        sigma = torch.cat([model._sigmas, model._sigmas.new_zeros(1)])
        signal = torch.ones(1001, dtype=torch.float64) if model.family == "ve" else 1 - sigma
        assert torch.equal(model.sigma(t).flatten(), sigma[t].float())
        assert torch.equal(model.signal(t).flatten(), signal[t].float())
    held = {name: table.device.type for name, table in model.clone().to("meta")._tables.items()}
    assert set(held.values()) == {"meta"} and held.keys() == model._tables.keys()
    moved = model.clone()._tables
    assert all(torch.equal(moved[name], table) for name, table in model._tables.items())


def test_losses_that_are_looked_at_seldom_are_the_same_and_nan_is_named_by_its_step() -> None:
    values = [torch.tensor(0.1 * i) for i in range(7)]
    often, seldom = Losses("implant", [], 1), Losses("implant", [], 5)
    for value in values[:4]:
        often.add(value)
        seldom.add(value)
    assert (len(often.read), seldom.read, seldom.last()) == (4, [], {})
    for value in values[4:]:
        often.add(value)
        seldom.add(value)
    assert len(seldom.read) == 5 and seldom.last() == {"loss": seldom.read[-1]}
    assert often.all() == seldom.all() == [float(value) for value in values]
    seldom.add(torch.tensor(1.0))
    seldom.add(torch.tensor(math.nan))
    seldom.add(torch.tensor(math.nan))
    with pytest.raises(Diverged, match="implant: the loss became nan at step 8; a lower lr"):
        seldom.all()


def test_a_training_counts_its_steps_from_those_it_goes_on_from() -> None:
    losses = Losses("train", [0.5, 0.4], 3)
    losses.add(torch.tensor(0.25))
    losses.add(torch.tensor(math.inf))
    with pytest.raises(Diverged, match="inf at step 3"):
        losses.all()


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (50, [50]), (120, [50, 50, 20])])
def test_a_processor_makes_the_usual_batches(n: int, sizes: list[int]) -> None:
    assert list(gpu.batches(n, CPU, 50)) == sizes


def test_a_gpu_makes_as_many_images_at_once_as_a_first_batch_shows_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")
    peaks = iter([5000, 900])  # of what ran before; of the first batch, beside 100 bytes that are held
    reset: list[Any] = []
    monkeypatch.setattr(gpu, "_peak", 0)
    monkeypatch.setattr(gpu, "_allowed", lambda device: 10_000.0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    assert list(gpu.batches(200, card, 50)) == [8, 69, 69, 54]  # (0.7 · 10,000 - 100) / ((900 - 100) / 8)
    assert len(reset) == 1
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 900)
    assert gpu.peak() == 5000  # of the whole job
    assert list(gpu.batches(50, card, 50)) == [50]


@pytest.mark.parametrize(("each", "room", "images"), [(1.0, 1e6, gpu.MOST), (0.0, 1e6, gpu.MOST), (100.0, 1050.0, 10),
                                                      (100.0, 30.0, 1), (100.0, -5.0, 1)])  # fmt: skip
def test_a_batch_has_at_least_one_image_and_at_most_the_largest_number(each: float, room: float, images: int) -> None:
    assert gpu.fitting(each, room) == images


@pytest.mark.parametrize("make", [tiny_sd, tiny_mmdit])
def test_attention_runs_in_half_precision_where_flash_attention_is_and_maps_stay_in_fp32(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kinds = make(tmp_path), []
    real = torch.nn.functional.scaled_dot_product_attention

    def seen(q: Any, k: Any, v: Any, **options: Any) -> Any:
        kinds.append({q.dtype, k.dtype, v.dtype})
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    x, t = torch.randn((2, *model.shape), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    context = model.embed(["a red square", "a blue circle"])

    def answers(bf16: bool) -> tuple[Any, Any]:
        kinds.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model.eps(x, t, context), [kind for kind in kinds]

    (full, _), (half, before) = answers(False), answers(True)
    assert before and all(kind == {torch.float32} for kind in before)
    monkeypatch.setattr(attention, "FLASH", ("cpu",))
    (same, _), (flash, after) = answers(False), answers(True)
    assert torch.equal(same, full)
    assert len(after) == len(before) and all(kind == {torch.bfloat16} for kind in after)
    assert (flash - half).abs().max() < 0.05 * half.abs().max()
    with attention.capture(model.denoiser) as maps:
        answers(True)
    assert maps and all(found.dtype == torch.float32 for found in maps.values())


def test_a_job_on_a_gpu_does_not_fill_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    fills: Any = torch.utils.deterministic
    before, deterministic = fills.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        child._set_up_torch({"threads": 1, "gpu": None})
        assert fills.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled()
        child._set_up_torch({"threads": 1, "gpu": {"id": "0", "share": 1.0}})
        assert not fills.fill_uninitialized_memory
    finally:
        fills.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def off(name: str, *needs: Job, **spec: Any) -> Job:
    """A job that uses no GPU."""
    return replace(job(name, *needs, **spec), on_gpu=False)


def test_a_job_that_uses_no_gpu_runs_beside_those_on_gpus_without_a_lease(store: Any, bodies: Any) -> None:
    with local(store, gpus=["0"], cpu_slots=1, leases=Leases(store.root)) as engine:
        first, second = engine.try_submit(job("on", do="stall"), 1), engine.try_submit(job("on 2", do="stall"), 1)
        beside, another = engine.try_submit(off("off", do="stall"), 1), engine.try_submit(off("off 2", do="stall"), 1)
        assert first is not None and first.gpu == {"id": "0", "share": 1.0} and second is None
        assert beside is not None and beside.gpu is None and another is None
        for handle in (first, beside):
            engine.cancel(handle, grace=0)


def test_the_driver_fills_both_and_no_job_waits_for_the_other_kind(store: Any, bodies: Any) -> None:
    """The jobs off GPUs come last by their estimates, and first among them is one that has to wait for a job on one."""
    first = job("on 0", do="show_environment", cuda="1", estimate=9.0)
    others = [job(f"on {i}", do="show_environment", cuda="1", estimate=5.0) for i in (1, 2)]
    free = [off(f"off {i}", do="show_environment", cuda="", estimate=1.0) for i in range(3)]
    needy = off("off needy", first, do="show_environment", cuda="", estimate=1.0)
    results = do(store, first, *others, *free, needy, gpus=[1], cpu_slots=1, leases=Leases(store.root))
    assert [result.error for result in results.values()] == [None] * 7


def test_measuring_uses_a_gpu_for_published_judges_only(tmp_path: Path) -> None:
    suite = tmp_path / "two.toml"
    suite.write_text("""
[[grid]]
model = ["digits-ddpm"]
attack = ["none"]
trigger = ["box"]
target = ["corner"]
sampler = ["ddim(steps=2)"]
defense = ["none"]
seed = [0]
""")
    plugins = load()
    loaded = load_suite(suite, plugins)
    jobs = plan(loaded, plugins).jobs.values()
    assert {job.kind: job.on_gpu for job in jobs} == {"sample": True, "measure": False}
    published = Outlines(plugins).jobs(replace(loaded.cells[0], model="ddpm-cifar10"), ())
    assert {job.kind: job.on_gpu for job in published.values()} == {"sample": True, "measure": True}


def test_events_of_a_training_come_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "UNREAD", 3)
    heard: list[dict[str, Any]] = []
    listen(heard.append)
    try:
        weight = torch.nn.Parameter(torch.ones(2))
        losses = training.minimize(lambda: weight.square().sum(), [weight], steps=4, lr=0.1)
    finally:
        listen(None)
    assert [event["step"] for event in heard] == [1, 2, 3, 4]
    assert [event["loss"] for event in heard] == losses
