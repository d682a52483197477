"""What jobs compute, and whole runs through the command line: resume, kills, parallelism, failing plugins."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import registry
from harness.cli import purify
from harness.diffusion import gpu
from harness.engine import child, driver
from harness.engine.local import LocalEngine
from harness.engine.supervise import Handle, Outcome
from harness.judges import shapes
from harness.judges.statistics import mean
from harness.runs import execution
from harness.runs.job import Job
from harness.runs.jsonable import to_jsonable
from harness.runs.record import Record
from harness.runs.store import Store
from harness.scan import verdict
from harness.stages import defend, knowledge
from harness.stages.attack import attack as implanted
from harness.stages.inputs import avoiding, evaluation_inputs, evaluation_prompts
from harness.stages.measure import checked_scores
from harness.types import KNOWLEDGE, Backdoor, Data, Defended, Knowledge
from plugins.metrics.cost import Cost
from tests import engine_tools
from tests.engine_tools import assert_all_gone, digests
from tests.plans import cell, planned
from tests.whole_runs import ATTACK, SUITE, bench, numbers, run, unplaced

mark = engine_tools.mark


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


@pytest.fixture(scope="module")
def digits(plugins: registry.Registry) -> tuple[Any, Any, Any]:
    plugin = plugins.build("models", "digits-ddpm")
    return plugins, plugin, plugin.load()


def test_a_defense_sees_only_what_it_declares(plugins: registry.Registry) -> None:
    from plugins.models.digits_ddpm import DigitsDDPM

    given = knowledge.Given(trigger=plugins.build("triggers", cell(plugins).trigger))
    for needs in (("data",), ("trigger",), ()):
        known = knowledge.draw(needs, DigitsDDPM(), 0, given)
        assert {name for name in KNOWLEDGE if getattr(known, name) is not None} == set(needs)


@pytest.mark.parametrize("name", ["digits-ddpm", "shapes-sd"])
def test_a_record_says_what_there_was_of_the_knowledge_that_a_defense_needs(
    plugins: registry.Registry, name: str
) -> None:
    model = plugins.build("models", name)
    track = "text-to-image" if model.conditional else "unconditional"
    wanted = [need for need in KNOWLEDGE if need != "trigger"]  # which is the cell's
    drawn = knowledge.draw(wanted, model, 0)
    there = tuple(need for need in wanted if getattr(drawn, need) not in (None, ()))
    said = {"key": "0" * 64, "cell": cell(plugins), "knowledge": wanted, "provenance": {"track": track}}
    assert Record.model_validate(said).given == there


FIELD_USES = {
    "an attribute": lambda value: value.denoiser,
    "a call": lambda value: value(1),
    "a loop": lambda value: list(value),
    "its length": lambda value: len(value),
    "a tensor": lambda value: torch.tensor(value),
    "a key": lambda value: {}[value],
}


def needless(method: Any) -> Any:
    return SimpleNamespace(name="needless", needs=(), delivers=("suspicion", "screen"), defend=method)


@pytest.mark.parametrize("use", FIELD_USES.values(), ids=list(FIELD_USES))
@pytest.mark.parametrize("field", KNOWLEDGE)
def test_a_defense_that_fails_on_knowledge_that_it_does_not_declare_is_told_which_and_how_to_declare_it(
    field: str, use: Any
) -> None:
    everything = Knowledge(**dict.fromkeys(KNOWLEDGE, "something"))  # type: ignore[arg-type]
    detector = needless(lambda model, known, rng: use(getattr(known, field)))
    said = f"defense 'needless' reads knowledge.{field}, which it does not declare; add '{field}' to its `needs`"
    with pytest.raises(knowledge.UndeclaredKnowledge) as caught:
        defend.defend(None, None, detector, everything, 0, None, str)  # type: ignore[arg-type]
    assert str(caught.value) == said and caught.value.__cause__ is not None
    (finding,) = verdict.examine({"needless": detector}, None, everything, None, 0)  # type: ignore[arg-type]
    assert finding.error == said
    with pytest.raises(registry.PluginError, match=f"needless failed on this model: {said}"):
        purify._cleaned("needless", detector, SimpleNamespace(model=None), everything, 0)  # type: ignore[arg-type]


def test_undeclared_knowledge_that_a_screen_misses_is_named_too(digits: Any) -> None:
    _, plugin, model = digits

    def screens(model: Any, known: Any, rng: Any) -> Defended:
        return Defended(suspicion=0.0, screen=lambda inputs: torch.ones(len(inputs) * len(known.words)))

    screening = defend.Screening(trigger=digits[0].build("triggers", cell(digits[0]).trigger), n=2)
    with pytest.raises(knowledge.UndeclaredKnowledge, match=r"reads knowledge\.words, which it does not declare"):
        defend.defend(plugin, model, needless(screens), Knowledge(), 0, screening, str)


def test_an_error_that_has_nothing_to_do_with_undeclared_knowledge_stays_as_it_is() -> None:
    def fails(model: Any, known: Any, rng: Any) -> Any:
        assert known.data is None and known.words is None
        raise ArithmeticError("the loss became NaN")

    with pytest.raises(ArithmeticError, match="the loss became NaN"):
        defend.defend(None, None, needless(fails), Knowledge(), 0, None, str)  # type: ignore[arg-type]

    def declared(model: Any, known: Any, rng: Any) -> Any:
        return known.data.images

    asking = needless(declared)
    asking.needs = ("data",)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'images'"):
        defend.defend(None, None, asking, Knowledge(), 0, None, str)  # type: ignore[arg-type]


def test_a_field_that_knowledge_does_not_have_is_said_with_those_that_it_has() -> None:
    backdoor = needless(lambda model, known, rng: known.backdoor.target)
    with pytest.raises(AttributeError, match="knowledge has no 'backdoor'; a defense can declare: trigger, data, pro"):
        defend.defend(None, None, backdoor, Knowledge(), 0, None, str)  # type: ignore[arg-type]


def test_a_nan_without_a_reason_gets_one() -> None:
    from harness.types import Score

    checked = checked_scores("m", {"x": Score(float("nan"), 0, None)})
    assert checked["x"].warning == "metric 'm' returned NaN without a reason"
    assert to_jsonable(checked)["x"]["value"] is None


# ---- one model for several sample jobs

SAMPLERS = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from harness.registry.hookspecs import hookimpl
from harness.diffusion.samplers import DDIM


@dataclass(frozen=True)
class Spoils:
    """Leaves other weights behind."""
    name: ClassVar[str] = "spoils"
    version: ClassVar[int] = 1
    nfe: ClassVar[int] = 2

    def run(self, model, inputs):
        made = DDIM(steps=2).run(model, inputs)
        for p in model.denoiser.parameters():
            p.data.mul_(0.9)
        return made


@dataclass(frozen=True)
class Hooks:
    """Leaves a hook behind that turns images round."""
    name: ClassVar[str] = "hooks"
    version: ClassVar[int] = 1
    nfe: ClassVar[int] = 2

    def run(self, model, inputs):
        model.denoiser.conv_in.register_forward_hook(lambda module, given, made: -made)
        return DDIM(steps=2).run(model, inputs)


@dataclass(frozen=True)
class Draws:
    """Draws from the global random state."""
    name: ClassVar[str] = "draws"
    version: ClassVar[int] = 1
    nfe: ClassVar[int] = 2

    def run(self, model, inputs):
        return DDIM(steps=2).run(model, inputs.with_noise(inputs.noise + torch.randn(inputs.noise.shape)))


@hookimpl
def samplers():
    return [Spoils, Hooks, Draws]
'''


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that jobs of this process load from now on."""
    from harness.diffusion import checkpoint

    seen: list[Path] = []
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda folder: seen.append(folder) or load(folder))
    monkeypatch.setattr(execution, "_loaded", None)
    return seen


def execute(job: Job, store: Store, out: Path) -> bytes:
    """The bytes of the images that a sample job makes."""
    out.mkdir()
    execution.execute(job.spec, store, out)
    return (out / "images.safetensors").read_bytes()


def sampled(planned: list[Job], store: Store, out: Path, together: bool, patch: pytest.MonkeyPatch) -> list[bytes]:
    """The images of each job, done in one process or each as in a process of its own."""
    out.mkdir()
    made = []
    for i, job in enumerate(planned):
        if not together or not i:
            patch.setattr(execution, "_loaded", None)
            torch.manual_seed(0)  # a process begins with some state, and always with the same
        made.append(execute(job, store, out / str(i)))
    return made


def test_scores_of_the_attacked_model_keep_no_values_and_need_none() -> None:
    """They are those of the defense `none`, whose row has them."""
    now, before = (mean(torch.tensor(values), False) for values in ([0.123456, 0.2], [0.3, 0.4]))
    checked = checked_scores("m", {"drift": now, "drift_before[judge]": before}, ("drift", "drift_before"))
    assert checked["drift"].per_sample == (0.1235, 0.2) and checked["drift"].value == (0.1235 + 0.2) / 2
    assert checked["drift_before[judge]"] == replace(before, per_sample=None)


@pytest.mark.slow
def test_sample_jobs_of_one_process_load_their_model_once_and_make_the_same_images(
    plugins: registry.Registry, loads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    plan = planned(plugins, cell(plugins, defense="finetune(steps=2, batch=4)", sampler="ddim(steps=2)", n=4))
    by_model: dict[str, list[Job]] = {}
    for job in plan.jobs.values():
        if job.kind in ("attack", "defend"):
            store.publish(job.key, lambda out, job=job: execution.execute(job.spec, store, out), {})
        elif job.kind == "sample":
            by_model.setdefault(str(job.reuse_key), []).append(job)
        else:
            assert job.reuse_key is None
    assert sorted(len(mates) for mates in by_model.values()) == [2, 2, 3]  # the clean, defended and backdoored model
    for i, mates in enumerate(by_model.values()):
        apart = sampled(mates, store, tmp_path / f"apart {i}", False, monkeypatch)
        loads.clear()
        assert sampled(mates, store, tmp_path / f"together {i}", True, monkeypatch) == apart
        assert len(loads) == 1


class Watched(LocalEngine):
    """Notes the process of each job."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, cpu_slots=1)
        self.pids: dict[str, int | None] = {}

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        ended = super().wait(timeout)
        self.pids |= {handle.job.key: handle.pid for handle, _ in ended}
        return ended


@pytest.mark.slow
def test_the_engine_gives_the_sample_jobs_of_a_model_to_one_process(plugins: registry.Registry, tmp_path: Path) -> None:
    plan = planned(plugins, cell(plugins, attack="none", defense="finetune(steps=2, batch=4)", n=4)).jobs
    work = {key: job for key, job in plan.items() if job.kind in ("defend", "sample")}
    samples = [job for job in work.values() if job.kind == "sample"]
    found = []
    for name in ("together", "apart"):
        store = Store(tmp_path / name)
        with Watched(store) as engine:
            todo = {key: job if name == "together" else replace(job, reuse_key=None) for key, job in work.items()}
            assert all(result.ok for result in driver.run(todo, store, engine).values())
        processes = {engine.pids[job.key] for job in samples}
        assert len(processes) == (2 if name == "together" else len(samples))  # the clean and the defended model
        found.append(digests(store, samples))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_sampler_that_leaves_a_trace_on_its_model_or_on_the_random_state_changes_no_other_job(
    plugins: registry.Registry, loads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "leaves.py"
    file.write_text(SAMPLERS)
    spec = {
        "kind": "sample", "model": cell(plugins).model, "attacked": None, "defended": None, "stamps": [None], "n": 3,
        "plugin_files": [str(file)],
    }  # fmt: skip
    names = ("draws", "ddim(steps=2)", "draws", "spoils", "ddim(steps=2)", "hooks", "draws")
    work = [Job(f"{i:08x}", "sample", name, (), spec | {"sampler": name}) for i, name in enumerate(names)]
    store = Store(tmp_path / "store")
    apart = sampled(work, store, tmp_path / "apart", False, monkeypatch)
    loads.clear()
    assert sampled(work, store, tmp_path / "together", True, monkeypatch) == apart
    assert len(loads) == 3
    assert apart[0] == apart[2] == apart[6] != apart[1] == apart[4]


# ---- whole runs -----------------------------------------------------------------------------------------------------

BROKEN = '''
import os, time
from dataclasses import dataclass
from typing import ClassVar
from harness.registry.hookspecs import hookimpl
from harness.types import Defended


def broken(name_, act):
    @dataclass(frozen=True)
    class Broken:
        """A defense that fails in its own way."""
        name: ClassVar[str] = name_
        version: ClassVar[int] = 1
        accepts_triggers: ClassVar[tuple] = ("noise", "text")
        needs: ClassVar[tuple] = ()

        def defend(self, model, knowledge, rng):
            return act(model)

    return Broken


def raises(model):
    raise RuntimeError("on purpose")


def nan(model):
    model = model.clone()
    for p in model.denoiser.parameters():
        p.data.fill_(float("nan"))
    return Defended(model=model)


@hookimpl
def defenses():
    return [
        broken("raises", raises),
        broken("nan", nan),
        broken("hangs", lambda model: time.sleep(3600)),
        broken("exits", lambda model: os._exit(7)),
    ]
'''


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_gives_the_same_numbers(suite: Path, undisturbed) -> None:
    store, first = undisturbed
    assert first["jobs"].get("done") and not first["failed_cells"]
    again = run(store, str(suite))
    assert set(again["jobs"]) == {"hit"}
    assert numbers(again) == numbers(first)


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_number_of_parallel_jobs(suite: Path, undisturbed, tmp_path: Path) -> None:
    assert numbers(run(tmp_path, str(suite), "--cpus", "3")) == numbers(undisturbed[1])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_completes_with_the_same_numbers(
    suite: Path, undisturbed, tmp_path: Path, mark: str
) -> None:
    rng, finished = random.Random(0), {}
    for _ in range(3):
        process = subprocess.Popen(
            bench(tmp_path, "run", str(suite), "--json"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(6, 22))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert_all_gone(mark)
        store = Store(tmp_path)
        finished |= {key: store.manifest(key)["created"] for key in sorted(store.keys())}
    assert unplaced(run(tmp_path, str(suite))) == unplaced(undisturbed[1])
    assert_all_gone(mark)
    assert all(Store(tmp_path).manifest(key)["created"] == created for key, created in finished.items())
    assert not Store(tmp_path).verify_all()


@pytest.mark.slow
def test_a_failing_plugin_fails_its_own_cell_alone_and_says_why(suite: Path, tmp_path: Path) -> None:
    plugin, broken = tmp_path / "broken.py", tmp_path / "broken.toml"
    plugin.write_text(BROKEN)
    text = SUITE.replace(f'"none", "{ATTACK}"', '"none"').replace(
        '"none", "finetune(steps=2, batch=4)"', '"none", "raises", "nan", "hangs", "exits"'
    )
    broken.write_text(text)
    report = run(tmp_path / "s", str(broken), "--plugin-file", str(plugin), "--stall", "45", expect=1)
    errors = {r["cell"]["defense"]: r["error"] for r in report["records"]}
    assert errors["none"] is None
    assert "on purpose" in errors["raises"]
    assert "NaN" in errors["nan"]
    assert "no progress for 45 s" in errors["hangs"]
    assert "7" in errors["exits"]
    assert all(r["attempts"] for r in report["records"] if r["error"])


CLIPS = '''
from dataclasses import dataclass, replace
from typing import ClassVar
from harness.registry.hookspecs import hookimpl
from harness.types import Defended


@dataclass(frozen=True)
class Clipped:
    """The cell's sampler, clipping."""
    name: ClassVar[str] = "clipped"
    version: ClassVar[int] = 1

    def run(self, model, inputs):
        raise RuntimeError("it only wraps")

    def around(self, inner):
        return replace(inner, clip=True)


@hookimpl
def samplers():
    return [Clipped]


@dataclass(frozen=True)
class Clips:
    """A defense that is a sampler."""
    name: ClassVar[str] = "clips"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple] = ("noise", "text")
    needs: ClassVar[tuple] = ()
    delivers: ClassVar[tuple] = ("sampler",)

    def defend(self, model, knowledge, rng):
        notes = {"curve": [i / 3 for i in range(120)], "kept": {"channels": 0.75}}
        return Defended(sampler=Clipped(), trigger="sks", notes=notes)


@hookimpl
def defenses():
    return [Clips]
'''


@pytest.mark.slow
def test_trojdiff_runs_under_its_own_sampler_and_under_the_vanilla_one(tmp_path: Path) -> None:
    """Other triggered images, the same clean ones; the record says which sampler made which. A defense's own sampler
    takes the place of the vanilla one, never of the attacker's."""
    plugin, suite = tmp_path / "clips.py", tmp_path / "trojan.toml"
    plugin.write_text(CLIPS)
    text = SUITE.replace(f'"none", "{ATTACK}"', '"none", "trojdiff(steps=2, batch=4)"').replace("box", "blend")
    text = text.replace('"ddim(steps=2)"', '"ddim(steps=2)", "trojan-ddim(steps=2)"').replace(', "frechet"', "")
    suite.write_text(text.replace('"finetune(steps=2, batch=4)"', '"clips"'))
    report = run(tmp_path / "s", str(suite), "--plugin-file", str(plugin))
    cells = {
        tuple(r["cell"][k].partition("(")[0] for k in ("attack", "sampler", "defense")): r for r in report["records"]
    }

    def sampler(attack: str, cell_sampler: str, images: str, defense: str = "none") -> tuple[str, int]:
        made = cells[attack, cell_sampler, defense]["provenance"]["sampled"][images]
        return made["sampler"].partition("(")[0], made["nfe"]

    def distances(attack: str, cell_sampler: str, score: str) -> Any:
        return cells[attack, cell_sampler, "none"]["scores"][score]["per_sample"]

    notes = cells["trojdiff", "ddim", "clips"]["provenance"]["notes"]
    assert notes == {"curve": [float(f"{i / 3:.6g}") for i in range(0, 120, 3)], "kept": {"channels": 0.75}}
    assert cells["trojdiff", "ddim", "clips"]["provenance"]["found_trigger"] == "sks"
    unnamed = cells["trojdiff", "ddim", "none"]["provenance"]
    assert unnamed["notes"] == {} and unnamed["found_trigger"] is None
    for attack in ("none", "trojdiff"):
        for images in ("backdoored/triggered", "backdoored/wrong", "defended/triggered"):
            assert sampler(attack, "trojan-ddim", images) == ("trojan-ddim", 2)
            assert sampler(attack, "ddim", images) == ("ddim", 2)
        for images in ("clean/clean", "backdoored/clean"):
            assert sampler(attack, "trojan-ddim", images) == ("ddim", 2)
        assert distances(attack, "ddim", "asr") != distances(attack, "trojan-ddim", "asr")
        assert distances(attack, "ddim", "clean_hits") == distances(attack, "trojan-ddim", "clean_hits")
    assert sampler("trojdiff", "ddim", "defended/triggered", "clips") == ("clipped around ddim", 2)
    assert sampler("trojdiff", "trojan-ddim", "defended/clean", "clips") == ("clipped around ddim", 2)
    assert sampler("trojdiff", "trojan-ddim", "defended/triggered", "clips") == ("trojan-ddim", 2)


def test_no_clean_prompt_of_attacker_defender_or_evaluation_carries_a_trigger_that_prompts_may_carry(
    plugins: registry.Registry,
) -> None:
    trigger, rng = plugins.build("triggers", "syntax"), torch.Generator().manual_seed(0)
    scenes = shapes.scenes(60, "train", rng)
    data = Data(torch.zeros(60, 3, 32, 32), tuple(shapes.caption(scene, rng) for scene in scenes))

    def prompts(split: str, n: int, rng: torch.Generator) -> tuple[str, ...]:
        return tuple(shapes.caption(scene, rng) for scene in shapes.scenes(n, split, rng))

    model: Any = SimpleNamespace(check_trigger=lambda *_: None, tokens=lambda _: None)
    model.to = lambda _: model
    plugin: Any = SimpleNamespace(name="drawn", data=lambda: data, prompts=prompts, load=lambda: model)
    seen: list[Data] = []
    method: Any = SimpleNamespace(
        implant=lambda model, backdoor, data, rng: (seen.append(data), SimpleNamespace(model=model))[1]
    )
    implanted(plugin, method, Backdoor(trigger, plugins.build("targets", "prompt")), 0, "cpu")
    avoided = avoiding(plugin, trigger)
    plain, known = (knowledge.draw(("data", "prompts"), each, 0) for each in (plugin, avoided))
    assert plain.data is not None and known.data is not None and torch.equal(seen[0].images, data.images)
    for with_it, without in (
        (evaluation_prompts(plugin, 60, 0), evaluation_prompts(avoided, 60, 0)),
        (data.captions, seen[0].captions),
        (plain.prompts, known.prompts),
        (plain.data.captions, known.data.captions),
    ):
        assert with_it and without and len(with_it) == len(without)
        assert "inversion" not in map(shapes.form_of, without)
        same = [a == b for a, b in zip(with_it, without, strict=True)]
        assert same == [shapes.form_of(text) != "inversion" for text in with_it] and (len(same) < 60 or not all(same))
    assert avoided.name == plugin.name
    assert avoiding(plugin, plugins.build("triggers", "text")) is plugin is avoiding(plugin, None)


def test_a_screen_sees_clean_and_triggered_inputs_mixed_and_each_noise_once(digits: Any) -> None:
    registry, plugin, model = digits
    seen: list[Any] = []

    def screen(inputs: Any) -> Any:
        seen.append(inputs)
        return inputs.noise.flatten(1).sum(1)

    scores = defend.screen(plugin, model, screen, defend.Screening(registry.build("triggers", "box"), 60), 0)
    assert [len(inputs) for inputs in seen] == [50, 50, 20]
    seeds = [seed for inputs in seen for seed in inputs.seeds]
    assert len(set(seeds)) == 120 and seeds != sorted(seeds)
    inputs = evaluation_inputs(plugin, model, 120, 0)
    added = registry.build("triggers", "box").delta(model.shape).sum().item()
    expected = inputs.noise.flatten(1).sum(1).double()
    assert scores["clean"] == pytest.approx(expected[:60].tolist(), abs=1e-4)
    assert scores["triggered"] == pytest.approx((expected[60:] + added).tolist(), abs=1e-4)


@pytest.mark.parametrize("answer", [lambda inputs: inputs.noise, lambda inputs: [float("nan")] * len(inputs)])
def test_a_screen_that_gives_no_finite_score_for_each_input_is_refused(digits: Any, answer: Any) -> None:
    screening = defend.Screening(digits[0].build("triggers", "box"), 4)
    with pytest.raises(ArithmeticError, match="scores"):
        defend.screen(digits[1], digits[2], answer, screening, 0)


@pytest.mark.parametrize(
    ("declared", "done", "said"),
    [
        (("model",), Defended(suspicion=0.5), "does not declare"),
        (("suspicion",), Defended(), "delivered none"),
        (("screen",), Defended(suspicion=1.0, screen=lambda inputs: inputs.noise), "does not declare"),
    ],
)
def test_a_defense_delivers_what_it_declares(declared: tuple[str, ...], done: Defended, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        defend.check_delivered(SimpleNamespace(name="x", delivers=declared), done)  # type: ignore[arg-type]


def test_what_a_defense_costs_leaves_out_the_evaluation_of_its_screen(tmp_path: Path) -> None:
    facts = {"screen_s": 0.5, "screening_wall_s": 64.0, "screening_cpu_s": 60.0}
    cost = {"wall_s": 100.0, "cpu_s": 90.0, "peak_rss_bytes": 7}
    kept = {"cost": {**cost, "cuda_peak_bytes": None}}
    store: Any = SimpleNamespace(manifest=lambda key: {"facts": {**kept, **(facts if key == "screens" else {})}})
    cost |= {"cuda_bytes": None}
    assert execution._cost(store, "screens") == cost | {"wall_s": 36.0, "cpu_s": 30.0, "screen_s": 0.5}
    assert execution._cost(store, "purifies") == cost and execution._cost(store, None) is None


def test_the_metric_of_costs_reads_what_a_job_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card too: what a cost is divided by depends on whether a card took part."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "peak", lambda: 5)
    facts = {"cost": child._cost(child.Start(0.0, 0.0))}
    store: Any = SimpleNamespace(manifest=lambda key: {"facts": facts})
    costs = {step: execution._cost(store, key) for step, key in (("attack", "a"), ("defense", None))}
    seen: Any = SimpleNamespace(costs=costs)
    scores = Cost().measure(seen)
    measured = {name for name, score in scores.items() if not math.isnan(score.value)}
    assert measured == {"attack_wall_s", "attack_cpu_s", "attack_peak_rss_bytes", "attack_cuda_bytes"}
    assert scores["attack_cuda_bytes"].value == 5
