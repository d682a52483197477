"""What planning derives once: it is the same as deriving it again, and grows with what differs, not with the cells."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings, strategies as st

from harness import registry
from harness.diffusion.samplers import DDIM, Heun, SchedulerSampler
from harness.registry import code_digest, kept
from harness.registry.kept import Kept, digest_of
from harness.runs import evaluations, jsonable, planning, suite
from harness.runs.evaluations import nfe_of
from harness.runs.planning import Outlines
from tests.plans import cell, planned

SOURCE = b"import os\nfrom harness import minimize\nprint(minimize, os)\n"


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of answers, in a cache directory of this test, as a process finds it that has asked for nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = kept.cache_file("derived")
    assert found is not None
    return found


def another_process(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """What a process that starts now has: nothing but the file."""
    fresh = Kept("derived")
    monkeypatch.setattr(code_digest, "derived", fresh)
    monkeypatch.setattr(evaluations, "derived", fresh)
    monkeypatch.setattr(evaluations, "_asked", {})
    code_digest._read.cache_clear()
    return fresh


def test_an_answer_is_there_in_the_next_process_beside_those_of_others(file: Path) -> None:
    one, other = Kept("derived"), Kept("derived")
    assert one.find("a") is None and other.find("b") is None
    one.keep("a", [1, "x"])
    other.keep("b", 2)
    one.save()
    other.save()
    assert Kept("derived").find("a") == [1, "x"] and Kept("derived").find("b") == 2


def test_a_file_that_grew_too_large_keeps_what_is_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 3)
    for name in "abc":
        answers = Kept("derived")
        answers.keep(name, name)
        answers.save()
    last = Kept("derived")
    assert last.find("a") == "a"
    last.keep("d", "d")
    last.save()
    assert json.loads(file.read_text()) == {"a": "a", "d": "d"}


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": ', "[" * 100_000])
def test_a_damaged_file_only_costs_time(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    answers = Kept("derived")
    assert answers.find("a") is None
    answers.keep("a", 1)
    answers.save()
    assert Kept("derived").find("a") == 1


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    answers = Kept("derived")
    answers.keep("a", 1)
    answers.save()
    assert answers.find("b") is None


def test_names_of_answers_tell_where_one_part_ends_and_the_next_begins() -> None:
    assert len({digest_of("ab", "c"), digest_of("a", "bc"), digest_of("abc"), digest_of("ab", "c", "")}) == 4


def test_a_source_is_parsed_once_and_again_when_it_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    whole = code_digest._targets.__wrapped__
    monkeypatch.setattr(
        code_digest, "_targets", lambda content, package: parsed.append(content) or whole(content, package)
    )
    answers = another_process(monkeypatch)
    first = code_digest._read(SOURCE, "pkg")
    assert first == (code_digest.digest(SOURCE), whole(SOURCE, "pkg")) and "harness.minimize" in first[1]
    answers.save()
    another_process(monkeypatch)
    assert code_digest._read(SOURCE, "pkg") == first and parsed == [SOURCE]
    changed = SOURCE + b"x = 1\n"
    assert code_digest._read(changed, "pkg")[0] != first[0]
    assert code_digest._read(b"from .near import x", "one")[1] != code_digest._read(b"from .near import x", "two")[1]
    assert len(parsed) == 4


@pytest.mark.parametrize("spoilt", [3, "x", [], ["x"], ["x", "y"], ["x", [1]], [1, ["y"]], {"a": 1}])
def test_a_kept_answer_of_another_form_is_derived_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, spoilt: Any
) -> None:
    answers = another_process(monkeypatch)
    first, nfe = code_digest._read(SOURCE, "pkg"), nfe_of(Heun(steps=7))
    answers.save()
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), spoilt)))
    another_process(monkeypatch)
    assert code_digest._read(SOURCE, "pkg") == first
    assert nfe_of(Heun(steps=7)) == nfe or spoilt == 3, "a whole number is an answer; who can write it can write code"


def test_a_sampler_is_asked_once_for_its_evaluations_and_not_by_the_next_process(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    whole = SchedulerSampler.nfe.fget
    assert whole is not None
    monkeypatch.setattr(SchedulerSampler, "nfe", property(lambda self: asked.append(self) or whole(self)))
    answers = another_process(monkeypatch)
    assert [nfe_of(DDIM(steps=3)), nfe_of(DDIM(steps=3)), nfe_of(Heun(steps=3))] == [3, 3, 5]
    assert asked == [DDIM(steps=3), Heun(steps=3)]
    answers.save()
    another_process(monkeypatch)
    assert [nfe_of(DDIM(steps=3)), nfe_of(Heun(steps=3)), nfe_of(DDIM(steps=4))] == [3, 5, 4]
    assert asked[2:] == [DDIM(steps=4)]


def test_other_libraries_or_other_code_are_asked_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(SchedulerSampler, "nfe", property(lambda self: asked.append(self) or 3))
    another_process(monkeypatch)
    nfe_of(DDIM(steps=3))
    monkeypatch.setattr(evaluations, "_asked", {})
    nfe_of(DDIM(steps=3))
    assert len(asked) == 1
    for name, other in (("distributions", {"diffusers-9.dist-info"}), ("closure", {"harness.diffusion.samplers": "0"})):
        monkeypatch.setattr(evaluations, "_asked", {})
        monkeypatch.setattr(evaluations, name, lambda *_, other=other: other)
        nfe_of(DDIM(steps=3))
    assert len(asked) == 3


@dataclass(frozen=True)
class Foreign:
    """A sampler of somebody else, whose answer may follow from anything."""

    name: ClassVar[str] = "foreign"
    says: ClassVar[Any] = 4

    steps: int = 2

    @property
    def nfe(self) -> Any:
        return self.says


def test_what_a_foreign_sampler_says_is_taken_as_it_is_and_kept_for_this_process_only(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_process(monkeypatch)
    for says in (4, "many", 0, None):
        monkeypatch.setattr(Foreign, "says", says)
        monkeypatch.setattr(evaluations, "_asked", {})
        assert nfe_of(Foreign()) is says
    evaluations.derived.save()
    assert not file.exists()
    assert nfe_of(type("NoSpec", (), {"nfe": 3})()) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(MappingProxyType)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_the_text_of_a_value_is_that_of_its_copy_as_json_has_it(value: Any) -> None:
    copied = json.dumps(
        jsonable._plain(value, ""), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    assert jsonable.canonical(value) == copied


@pytest.mark.parametrize("value", [{1: 2}, {"a": {None: 1}}, {"a": [{2.0: 1}]}, {"a": Path("x")}, [object()], {1, 2}])
def test_what_is_no_json_is_refused_however_deep_it_lies(value: Any) -> None:
    with pytest.raises(TypeError, match=r"JSON"):
        jsonable.canonical(value)


# ---- planning


SUITE = """
[[grid]]
model = ["digits-ddpm"]
attack = ["none", "baddiffusion"]
trigger = ["box", "box(size=4)"]
target = ["hat"]
defense = ["none", "finetune(steps=100)", "elijah"]
sampler = ["ddim(steps=3)", "trojan-ddim(steps=3)"]
controls = ["decoy"]
n = 8
seed = {seeds}
"""


def plan_of(tmp_path: Path, plugins: registry.Registry, seeds: int) -> tuple[suite.Suite, planning.Plan]:
    file = tmp_path / f"seeds{seeds}.toml"
    file.write_text(SUITE.format(seeds=list(range(seeds))))
    expanded = suite.load_suite(file, plugins)
    return expanded, planning.plan(expanded, plugins)


def test_more_seeds_build_no_more_plugins_and_ask_no_sampler_again(
    tmp_path: Path, plugins: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of(tmp_path, plugins, 1)  # samplers are asked, sources are read
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: counts.update([name]) or whole(*a, **k))

    count(registry.Registry, "build")
    count(suite, "impossible")
    count(planning, "closure")
    monkeypatch.setattr(SchedulerSampler, "nfe", property(lambda self: pytest.fail("it was asked before")))
    found = {}
    for seeds in (1, 5):
        counts.clear()
        expanded, plan = plan_of(tmp_path, plugins, seeds)
        found[seeds] = dict(counts), len(expanded.cells), len(plan.jobs)
    assert found[1][0] == found[5][0] and found[1][0]["build"] > 0 and found[1][0]["impossible"] > 0
    assert found[5][1] == 5 * found[1][1] and found[5][2] > 3 * found[1][2]


def test_a_plan_of_many_cells_is_the_sum_of_the_plans_of_each(tmp_path: Path, plugins: registry.Registry) -> None:
    expanded, whole = plan_of(tmp_path, plugins, 2)
    alone: dict[str, Any] = {}
    for each, entry in zip(expanded.cells, whole.cells, strict=True):
        plan = planned(plugins, each, metrics=expanded.metrics)
        alone |= {key: job for key, job in plan.jobs.items() if key not in alone}
        assert plan.cells == [entry]
    assert alone == whole.jobs
    assert list(alone) == list(whole.jobs)


def test_the_outline_of_a_cell_does_not_depend_on_the_cells_before_it(plugins: registry.Registry) -> None:
    first, second = cell(plugins), cell(plugins, defense="elijah", seed=1)
    outlines = Outlines(plugins)
    before: Mapping[str, Any] = outlines.jobs(first, ("asr",))
    outlines.jobs(second, ("asr",))
    assert outlines.jobs(first, ("asr",)) == before == Outlines(plugins).jobs(first, ("asr",))
    assert outlines.jobs(second, ()) == Outlines(plugins).jobs(second, suite.standard(plugins))
    assert len(outlines.jobs(second, ("asr",)).keys() - before.keys()) > 0
