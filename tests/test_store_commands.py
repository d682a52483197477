"""bench store, and why a plan says that a job is not in the store."""

from __future__ import annotations

import copy
import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.cli import Exit, call
from harness.runs.explain import Explainer, Why, leaves_of
from harness.runs.inventory import entries
from harness.runs.job import Job
from harness.runs.jsonable import key_of
from harness.runs.store import Store

ATTACK = {
    "kind": "attack",
    "threads": 1,
    "inputs": [],
    "code": {"harness.types": "11", "harness.methods.attention_guidance": "22", "plugins.attacks.bad": "33"},
    "model": {"spec": "digits", "version": 1, "weights": "0" * 64},
    "attack": {"spec": "bad(steps=6, lr=0.001)", "version": 1},
    "trigger": {"spec": "box(size=5)", "version": 1},
    "target": {"spec": "hat", "version": 1},
    "seed": 0,
}
METRICS = {"asr": {"spec": "asr", "version": 1}, "fid": {"spec": "fid(dims=64)", "version": 1}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], store: Store) -> Callable[..., SimpleNamespace]:
    """bench(*words) → code, out, err; on the test's store."""

    def run(*words: str) -> SimpleNamespace:
        code = call([*words, "--store", str(store.root)])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def changed(ingredients: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A copy in which `a__b=value` sets ["a"]["b"]; None takes it away."""
    made = copy.deepcopy(ingredients)
    for name, value in more.items():
        *way, last = name.replace("_DOT_", ".").split("__")
        place = made
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return made


def job(ingredients: dict[str, Any], label: str = "a job", needs: tuple[str, ...] | None = None) -> Job:
    inputs = tuple(ingredients.get("inputs", ())) if needs is None else needs
    return Job(key_of(ingredients), ingredients["kind"], label, inputs, {}, 1.0, ingredients=ingredients)


def put(store: Store, ingredients: dict[str, Any], label: str = "a job", text: str = "weights") -> str:
    """Publish a tiny artifact of these ingredients; its key."""

    def fill(out: Path) -> dict[str, Any]:
        (out / "file.txt").write_text(text)
        return {}

    key = key_of(ingredients)
    store.publish(key, fill, {"kind": ingredients["kind"], "label": label, "ingredients": ingredients})
    return key


def why(store: Store, ingredients: dict[str, Any], *others: Job) -> Why:
    wanted = job(ingredients)
    return Explainer(store, {each.key: each for each in (wanted, *others)}).why(wanted.key)


def age(store: Store, key: str, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(store.artifact(key) / "manifest.json", (then, then))


# ---- explanations


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attack__spec": "bad(steps=6, lr=0.002)"}, "nearest {}: lr 0.001 → 0.002"),
        ({"attack__spec": "bad(steps=7, lr=0.002)"}, "nearest {}: lr 0.001 → 0.002; steps 6 → 7"),
        ({"attack__spec": "bad(steps=6, lr=0.001, warmup=3)"}, "nearest {}: warmup 3 is new"),
        ({"trigger__spec": "box(size=6)"}, "nearest {}: trigger size 5 → 6"),
        ({"trigger__spec": "ring(size=6, wide=2)"}, "nearest {}: trigger box → ring"),
        ({"attack__version": 2}, "nearest {}: version 1 → 2"),
        ({"target__version": 2}, "nearest {}: target version 1 → 2"),
        ({"seed": 1}, "nearest {}: seed 0 → 1"),
        ({"threads": 2, "seed": 1, "target__version": 2}, "nearest {}: seed 0 → 1; target version 1 → 2; 1 more"),
        ({"model__weights": "1" * 64}, "nearest {}: weights of the model differ"),
        (
            {"code__harness.methods.attention_guidance": "44"},
            "code of harness.methods.attention_guidance changed since {}",
        ),
        ({"code__harness.types": "9", "code__new": "9"}, "code of harness.types changed since {}"),
        ({"code__harness.methods.new": "44"}, "code of harness.methods.new was added since {}"),
        ({"code__harness.types": None}, "code of harness.types was removed since {}"),
        ({"seed": 1, "code__harness.types": "9"}, "nearest {}: seed 0 → 1; code of harness.types differs"),
        ({"attack__spec": "worse(steps=6, lr=0.001)"}, "never computed"),
        ({"trigger__spec": "ring", "target__spec": "shoe"}, "never computed"),
        ({"attack__spec": "bad(steps=6, lr=\x1b[31m"}, "never computed"),
        ({"seed": "\x1b[31m"}, "nearest {}: seed 0 → \\u001b[31m"),
    ],
)
def test_a_miss_names_what_differs_from_the_nearest_artifact(store: Store, more: dict[str, Any], says: str) -> None:
    near = put(store, ATTACK)
    put(store, changed(ATTACK, kind="sample"))
    found = why(store, changed(ATTACK, **more))
    assert found.text == says.format(near[:6])
    assert found.nearest == (None if says == "never computed" else near)


def test_several_changed_modules_are_counted(store: Store) -> None:
    near = put(store, ATTACK)
    found = why(store, changed(ATTACK, code={name: "9" for name in ATTACK["code"]}))
    names = "harness.methods.attention_guidance, harness.types"
    assert found.text == f"code of {names} and 1 more changed since {near[:6]}"
    assert [(each.part, each.old, each.new) for each in found.differences] == [
        ("code", "22", "9"), ("code", "11", "9"), ("code", "33", "9"),
    ]  # fmt: skip


def test_the_same_configuration_is_nearer_than_the_same_code(store: Store) -> None:
    other_code = put(store, changed(ATTACK, code__new="1", **{"code__harness.types": "9"}))
    put(store, changed(ATTACK, seed=1))
    assert why(store, ATTACK).nearest == other_code


def test_a_parameter_is_nearer_than_another_method_and_the_newest_of_equals_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, changed(ATTACK, attack__spec="worse"))
    now = time.time()
    keys = []
    for minute, seed in enumerate((3, 1, 2)):
        monkeypatch.setattr(time, "time", lambda minute=minute: now + 60 * minute)
        keys.append(put(store, changed(ATTACK, seed=seed, attack__spec="bad(steps=9, lr=1.0)")))
    found = why(store, ATTACK)
    assert found.nearest == keys[-1] and "lr 1.0 → 0.001" in found.text


def test_of_the_same_configuration_the_one_with_the_most_code_in_common_is_taken(store: Store) -> None:
    near = put(store, changed(ATTACK, **{"code__harness.types": "9"}))
    put(store, changed(ATTACK, code={name: "9" for name in ATTACK["code"]}))
    assert why(store, ATTACK).nearest == near


def test_a_method_of_the_same_name_is_nearer_than_one_with_fewer_differences(store: Store) -> None:
    put(store, changed(ATTACK, attack__spec="worse"))
    near = put(store, changed(ATTACK, attack__spec="bad(steps=7, lr=0.1, more=1)", seed=3))
    assert why(store, ATTACK).nearest == near


def test_the_specs_of_a_cell_are_read_as_those_of_plugins(store: Store) -> None:
    cell = {"attack": "bad(steps=6, lr=0.001)", "seed": 0}
    near = put(store, {"kind": "measure", "inputs": [], "cell": cell})
    found = why(store, {"kind": "measure", "inputs": [], "cell": {**cell, "attack": "bad(steps=6, lr=0.1)"}})
    assert found.text == f"nearest {near[:6]}: attack lr 0.001 → 0.1"


def test_metrics_are_named(store: Store) -> None:
    measure = {"kind": "measure", "inputs": [], "metrics": METRICS, "code": {}}
    near = put(store, measure)
    texts = {
        "nearest {}: metric fid dims 64 → 192": changed(measure, metrics__fid__spec="fid(dims=192)"),
        "nearest {}: metric asr version 1 → 2": changed(measure, metrics__asr__version=2),
        "nearest {}: metric asr is gone": changed(measure, metrics__asr=None),
        "nearest {}: metric clip is new": changed(measure, metrics__clip={"spec": "clip", "version": 1}),
    }
    for says, ingredients in texts.items():
        assert why(store, ingredients).text == says.format(near[:6])


def test_a_missing_input_is_named_and_one_that_differs_is_explained(store: Store) -> None:
    old, new = ATTACK, changed(ATTACK, attack__spec="bad(steps=6, lr=0.002)")

    def sampled(attack: dict[str, Any]) -> dict[str, Any]:
        key = key_of(attack)
        return {"kind": "sample", "inputs": [key], "of": [key, None], "n": 16, "sampler": {"spec": "ddim(steps=4)"}}

    put(store, old)
    near = put(store, sampled(old))
    upstream = job(new, "attack bad on digits")
    found = why(store, sampled(new), upstream)
    assert (found.reason, found.text, found.needs) == ("needs", "needs attack bad on digits", (upstream.key,))
    put(store, new)
    assert why(store, sampled(new), upstream).text == f"nearest {near[:6]}: attack lr 0.001 → 0.002"
    assert why(store, sampled(new)).text == f"nearest {near[:6]}: attack lr 0.001 → 0.002"


def test_what_is_a_jobs_own_comes_before_what_is_upstream(store: Store) -> None:
    old, new = put(store, ATTACK), put(store, changed(ATTACK, attack__spec="bad(steps=6, lr=0.1)"))
    near = put(store, {"kind": "sample", "inputs": [old], "n": 16})
    found = why(store, {"kind": "sample", "inputs": [new], "n": 32})
    assert found.text == f"nearest {near[:6]}: n 16 → 32; attack lr 0.001 → 0.1"


def test_an_input_that_is_known_by_its_key_alone_is_a_difference(store: Store) -> None:
    sample = {"kind": "sample", "n": 16, "inputs": ["a" * 64]}
    for key in ("a" * 64, "b" * 64):
        store.publish(key, lambda out: {}, {"kind": "attack"})  # older: without ingredients
    near = put(store, sample)
    found = why(store, changed(sample, inputs=["b" * 64]))
    assert found.nearest == near and [(d.name, d.old, d.new) for d in found.differences] == [
        ("input", "a" * 64, "b" * 64)
    ]


def test_inputs_in_other_roles_are_a_difference(store: Store) -> None:
    inputs = [put(store, ATTACK), put(store, changed(ATTACK, seed=1))]
    near = put(store, {"kind": "sample", "inputs": inputs, "of": inputs})
    found = why(store, {"kind": "sample", "inputs": inputs, "of": inputs[::-1]})
    assert found.text == f"nearest {near[:6]}: order of of differs" and len(found.differences) == 1


def test_older_and_odd_manifests_are_passed_over(store: Store) -> None:
    odd: list[Any] = [None, [], {}, "text", {"kind": "attack", "inputs": 3, "code": [1, {"a": None}], "attack": 5}]
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    deeper: Any = 1
    for _ in range(5000):
        deeper = [deeper]
    assert [text for _, text in leaves_of({"kind": "attack", "deep": deeper})] == ["(nested too deeply)"]
    odd.append({"kind": "attack", "inputs": [None, ["x"], "x"], "deep": deep, "model": {"spec": {"no": "text"}}})
    for i, ingredients in enumerate(odd):
        more = {} if ingredients is None else {"ingredients": ingredients}
        store.publish(key_of({"odd": i}), lambda out: {}, {"kind": "attack", **more})
    unlisted = '{"key": "KEY", "files": {"a": 3}, "ingredients": {"kind": "attack"}}'
    for i, text in enumerate(("{", "[]", "[" * 100_000, '{"key": "x"}', "null", "\xff", unlisted)):
        key = key_of({"broken": i})
        store.artifact(key).mkdir(parents=True)
        (store.artifact(key) / "manifest.json").write_text(text.replace("KEY", key))
        assert not store.has(key) and store.verify(key) == ["manifest.json"]
    assert len(list(entries(store))) == len(odd)
    assert why(store, ATTACK).text == "never computed"
    near = put(store, ATTACK)
    assert why(store, changed(ATTACK, seed=1)).nearest == near
    assert why(store, {"kind": "attack"} | {"deep": deep, "code": []}).reason in ("nearest", "never computed")


def test_manifests_that_name_each_other_as_inputs_end(store: Store) -> None:
    a, b = "a" * 64, "b" * 64
    for key, other in ((a, b), (b, a)):
        ingredients = {"kind": "attack", "inputs": [other], "seed": 0}
        store.publish(key, lambda out: {}, {"kind": "attack", "ingredients": ingredients})
    assert why(store, {"kind": "attack", "seed": 1, "inputs": [a]}).nearest in (a, b)


def test_what_was_damaged_failed_or_removed_is_said(store: Store) -> None:
    key = put(store, ATTACK)
    (store.artifact(key) / "file.txt").write_text("w")
    assert why(store, ATTACK).text == "damaged: file.txt is missing or has another size"
    store.remove(key)
    assert why(store, ATTACK).text == "never computed"
    store.write_attempts(key, [{"status": "failed", "error": "it raised\nTraceback"}])
    assert why(store, ATTACK).text == "failed before (it raised)"
    store.write_attempts(key, [{"status": "done", "error": None}])
    assert why(store, ATTACK).text == "computed before, but its artifact was removed"


def test_the_store_is_read_once_and_only_if_something_is_missing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    whole = Store.manifests

    def counted(self: Store) -> Any:
        passes.append(1)
        return whole(self)

    monkeypatch.setattr(Store, "manifests", counted)
    jobs = [job(changed(ATTACK, seed=seed)) for seed in range(5)]
    put(store, ATTACK)
    Explainer(store, {jobs[0].key: jobs[0]}).why(jobs[0].key)
    assert passes == []
    explainer = Explainer(store, {each.key: each for each in jobs})
    assert [explainer.why(each.key).reason for each in jobs] == ["in the store"] + ["nearest"] * 4
    assert passes == [1]


def test_a_thousand_misses_among_a_thousand_artifacts_take_seconds(store: Store) -> None:
    from harness.runs.explain import _Shelves

    made = [changed(ATTACK, seed=seed) for seed in range(2000)]
    wanted = [job(each) for each in made[:1000]]
    shelves = _Shelves({each.key: each.ingredients for each in wanted})
    for each in made[1000:]:
        shelves.put({"key": key_of(each), "ingredients": each, "created": 0.0})
    began = time.process_time()
    assert {shelves.why(each).reason for each in wanted} == {"nearest"}
    assert time.process_time() - began < 6


# ---- bench plan


@pytest.fixture(scope="module")
def smoke() -> dict[str, Job]:
    """The jobs of the smoke suite as they are planned."""
    from harness import registry
    from harness.runs import planning, suite

    loaded = registry.load()
    return planning.plan(suite.expand(suite.read(suite.find_suite("smoke")), loaded), loaded).jobs


def test_a_plan_names_the_module_and_the_parameter_that_made_a_miss(
    bench: Callable[..., SimpleNamespace], store: Store, smoke: dict[str, Job]
) -> None:
    attack = next(each for each in smoke.values() if each.kind == "attack")
    sample = next(each for each in smoke.values() if each.kind == "sample" and not each.needs)
    older = changed(
        dict(attack.ingredients), attack__spec=attack.ingredients["attack"]["spec"].replace(" lr=0.0002", " lr=0.1")
    )
    other_code = copy.deepcopy(dict(sample.ingredients))
    other_code["code"]["harness.diffusion.samplers"] = "0"
    near = {attack.key: put(store, older), sample.key: put(store, other_code)}
    rows = {row["key"]: row for row in json.loads(bench("plan", "smoke", "--json").out)["jobs"]}
    assert rows.keys() == smoke.keys()
    said = rows[attack.key]["why"]
    assert (said["reason"], said["nearest"]) == ("nearest", near[attack.key])
    assert said["text"] == f"nearest {near[attack.key][:6]}: lr 0.1 → 0.0002"
    assert [(d["part"], d["name"], d["old"], d["new"]) for d in said["differences"]] == [
        ("attack", "lr", "0.1", "0.0002")
    ]
    assert rows[sample.key]["state"] == f"miss: code of harness.diffusion.samplers changed since {near[sample.key][:6]}"
    waiting = next(row for row in rows.values() if row["kind"] == "measure")
    assert waiting["why"]["reason"] == "needs" and waiting["why"]["needs"]
    table = bench("plan", "smoke").out
    assert f"miss: nearest {near[attack.key][:6]}: lr 0.1 → 0.0002" in table
    assert max(map(len, table.splitlines())) < 180

    found = bench("store", "explain", attack.key[:12], "--suite", "smoke")
    assert found.code == Exit.ok and "not in the store: nearest" in found.out and "  lr 0.1 → 0.0002\n" in found.out
    measure = next(key for key, each in smoke.items() if each.kind == "measure" and attack.key in each.needs)
    found = bench("store", "explain", measure[:12], "--suite", "smoke")
    assert f"{attack.key[:10]} {attack.label}: nearest {near[attack.key][:6]}: lr 0.1" in found.out
    missing = {
        row["key"]
        for row in json.loads(bench("store", "explain", measure, "--suite", "smoke", "--json").out)["missing"]
    }
    assert attack.key in missing and not any(smoke[key].needs for key in missing)
    found = bench("store", "explain", "0" * 60, "--suite", "smoke")
    assert found.code == Exit.usage and "no job of smoke has a key that begins" in found.err


def test_a_key_is_looked_up_in_the_newest_run_as_it_was_asked_for(
    bench: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.cli import run

    wanted, asked = job(ATTACK, "attack bad on digits"), []

    def prepare(*words: Any, **_: Any) -> Any:
        asked.append(words)
        return SimpleNamespace(plan=SimpleNamespace(jobs={wanted.key: wanted}), suite=SimpleNamespace(name="tiny"))

    monkeypatch.setattr(run, "prepare", prepare)
    found = bench("store", "explain", wanted.key[:8])
    assert found.code == Exit.usage and "name a suite by --suite" in found.err and asked == []
    remember(store, "tiny", [], settings={"threads": 3}, told={"suite": "tiny", "only": ["a=b"], "sets": ["n=3"]})
    found = bench("store", "explain", wanted.key[:8], "--json")
    assert found.code == Exit.ok and json.loads(found.out)["why"]["reason"] == "never computed"
    assert asked[0][:4] == ("tiny", ["a=b"], ["n=3"], 3)
    put(store, ATTACK)
    (store.artifact(wanted.key) / "file.txt").unlink()
    assert "not in the store: damaged: file.txt" in bench("store", "explain", wanted.key[:8]).out


# ---- bench store


def remember(store: Store, suite: str, jobs: list[dict[str, Any]], **more: Any) -> None:
    """A run in the store whose driver is dead, unless `driver` says otherwise."""
    dead = {"host": socket.gethostname(), "pid": 4194305, "started": time.time()}
    told = {"suite": suite, "only": [], "sets": [], "files": [], **more.pop("told", {})}
    planned = [{"label": "a job", "estimate": 1.0, **each} for each in jobs]
    store.write_run(suite, {"driver": dead, "settings": {"threads": 1}, "jobs": planned, **more, "told": told})


def test_kinds_are_listed(bench: Callable[..., SimpleNamespace], store: Store) -> None:
    assert bench("store").out == f"{store.root}\nno artifacts; bench run makes some\n"
    put(store, ATTACK, text="x" * 1500)
    put(store, changed(ATTACK, seed=1), text="x" * 1500)
    put(store, {"kind": "sample", "inputs": []}, text="xy")
    for words in (("store",), ("store", "ls")):
        out = bench(*words).out
        assert [line.split()[:4] for line in out.splitlines()[2:4]] == [
            ["attack", "2", "3.0", "kB"], ["sample", "1", "2", "B"],
        ]  # fmt: skip
        kinds = json.loads(bench(*words, "--json").out)["kinds"]
        assert [(kind["kind"], kind["number"], kind["size"]) for kind in kinds] == [
            ("attack", 2, 3000), ("sample", 1, 2),
        ]  # fmt: skip


def test_an_option_before_the_subcommand_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["store", "--store", str(store.root), "gc"]) == Exit.usage
    assert "give --store after gc" in capsys.readouterr().err
    assert call(["store", "--json", "ls", "--store", str(store.root)]) == Exit.usage


def test_an_artifact_is_explained_by_what_went_in_and_what_uses_it(
    bench: Callable[..., SimpleNamespace], store: Store
) -> None:
    key = put(store, ATTACK, "attack bad on digits")
    user = put(store, {"kind": "sample", "inputs": [key], "of": [key, None], "n": 4}, "sample clean inputs")
    lines = [line.split() for line in bench("store", "explain", key[:8]).out.splitlines()]
    for line in (
        f"{key[:10]} attack bad on digits",
        "attack bad(steps=6, lr=0.001), version 1",
        "seed 0",
        "code harness.methods.attention_guidance, harness.types, plugins.attacks.bad",
        f"{user[:10]} sample clean inputs",
    ):
        assert line.split() in lines
    assert f"input  {key[:10]} attack bad on digits" in bench("store", "explain", user[:8]).out
    said = json.loads(bench("store", "explain", key[:8], "--json").out)
    assert said["ingredients"] == ATTACK and [each["key"] for each in said["used_by"]] == [user]
    store.publish("c" * 64, lambda out: {}, {})
    assert "unknown; it was made before this was kept" in bench("store", "explain", "c" * 8).out
    store.publish("c" * 60 + "d" * 4, lambda out: {}, {})
    for beginning, says in (("c", "2 keys begin with 'c'"), ("XY", "is no beginning of a key")):
        found = bench("store", "explain", beginning)
        assert (found.code, found.out, len(found.err.splitlines())) == (Exit.usage, "", 1) and says in found.err


def test_damage_is_found_listed_and_set_aside(bench: Callable[..., SimpleNamespace], store: Store) -> None:
    good, bad = put(store, ATTACK), put(store, changed(ATTACK, seed=1))
    assert bench("store", "verify").code == Exit.ok
    (store.artifact(bad) / "file.txt").write_text("WEIGHTS")
    bare = store.artifact("e" * 64)
    bare.mkdir(parents=True)
    found = bench("store", "verify")
    assert found.code == Exit.mismatch and f"{bad[:10]} damaged: file.txt" in found.out
    assert "3 artifacts, 2 damaged" in found.out and store.has(bad)
    assert bench("store", "verify", good[:9]).code == Exit.ok
    assert bench("store", "verify", "f" * 9).code == Exit.usage
    found = bench("store", "verify", "--set-aside", "--json")
    assert found.code == Exit.mismatch
    assert json.loads(found.out)["damaged"] == {bad: ["file.txt"], "e" * 64: ["manifest.json"]}
    assert not store.has(bad) and not bare.exists() and store.has(good)
    assert len(list(store.root.glob("quarantine/*"))) == 2
    assert bench("store", "verify").code == Exit.ok


def test_gc_removes_leftovers_and_no_artifact(bench: Callable[..., SimpleNamespace], store: Store) -> None:
    kept, aside = put(store, ATTACK), put(store, changed(ATTACK, seed=1), text="x" * 100)
    age(store, kept, 1000)
    store.set_aside(aside)
    draft = store.artifact(kept).parent / ".tmp-4194305-bb"
    draft.mkdir()
    (draft / "half").write_text("12345")
    os.utime(draft, (0, 0))
    for words, there in ((("--dry-run",), True), ((), False)):
        said = json.loads(bench("store", "gc", "--json", *words).out)
        assert [(each["kind"], each["number"]) for each in said["removed"]] == [("damaged", 1), ("draft", 1)]
        assert said["removed"][1]["size"] == 5 and said["removed"][0]["size"] > 100
        assert draft.exists() is there and any(store.root.glob("quarantine/*")) is there
    assert store.has(kept) and "removed 0, 0 B" in bench("store", "gc").out


def test_gc_removes_old_artifacts_of_the_asked_kind(bench: Callable[..., SimpleNamespace], store: Store) -> None:
    old, young = put(store, ATTACK), put(store, changed(ATTACK, seed=1))
    sample = put(store, {"kind": "sample", "inputs": []})
    for key in (old, sample):
        age(store, key, 20)
    assert "would remove 2, 14 B" in bench("store", "gc", "--older-than", "10", "--dry-run").out
    assert store.has(old)
    assert "removed 0" in bench("store", "gc", "--older-than", "30").out
    said = json.loads(bench("store", "gc", "--older-than", "10", "--kind", "attack", "--json").out)
    assert said["keys"] == [old] and said["bytes"] == 7
    assert [store.has(key) for key in (old, young, sample)] == [False, True, True]
    assert not list(store.root.rglob(".tmp-*"))
    for words in (("--keep", "smoke"), ("--kind", "attack")):
        found = bench("store", "gc", *words)
        assert found.code == Exit.usage and "--older-than DAYS" in found.err


def test_gc_keeps_what_a_suite_needs(
    bench: Callable[..., SimpleNamespace], store: Store, smoke: dict[str, Job]
) -> None:
    needed = [store.publish(key, lambda out: {}, {}).name for key in list(smoke)[:3]]
    other, of_last_run = put(store, ATTACK), put(store, changed(ATTACK, threads=4))
    remember(store, "smoke", [{"key": of_last_run, "needs": []}])
    for key in (*needed, other, of_last_run):
        age(store, key, 20)
    said = json.loads(bench("store", "gc", "--older-than", "1", "--keep", "smoke", "--json").out)
    assert said["keys"] == [other] and all(map(store.has, (*needed, of_last_run)))


@pytest.mark.parametrize(
    ("driver", "kept"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid(), "started": time.time() + 1}, True),
        ({"host": socket.gethostname(), "pid": 4194305, "started": time.time()}, False),
        ({"host": "elsewhere", "pid": 1, "started": time.time()}, True),
        ({"host": "elsewhere", "pid": 1, "started": 0.0}, False),
    ],
)
def test_gc_keeps_what_a_run_that_goes_on_may_read(
    bench: Callable[..., SimpleNamespace], store: Store, driver: dict[str, Any], kept: bool
) -> None:
    key = put(store, ATTACK)
    age(store, key, 20)
    remember(store, "tiny", [{"key": key, "needs": []}], driver=driver)
    bench("store", "gc", "--older-than", "1")
    assert store.has(key) is kept


def test_gc_keeps_what_a_held_job_needs(bench: Callable[..., SimpleNamespace], store: Store) -> None:
    held, need, other = put(store, ATTACK), put(store, changed(ATTACK, seed=1)), put(store, changed(ATTACK, seed=2))
    waiting = "d" * 64
    for key in (held, need, other):
        age(store, key, 20)
    remember(store, "tiny", [{"key": waiting, "needs": [need]}, {"key": other, "needs": []}])
    with store.lock(held), store.lock(waiting):
        bench("store", "gc", "--older-than", "1")
    assert [store.has(key) for key in (held, need, other)] == [True, True, False]
    bench("store", "gc", "--older-than", "1")
    assert not store.has(held) and not store.has(need)


def test_opening_an_artifact_notes_its_use_once_and_quietly(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store, ATTACK)
    age(store, key, 20)
    store.open_artifact(key)
    assert time.time() - next(entries(store)).used < 60 and store.verify(key) == []
    age(store, key, 20)
    store.open_artifact(key)
    assert time.time() - next(entries(store)).used > 86400, "once in a process is enough"

    def refused(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert Store(store.root).open_artifact(key) == store.artifact(key)
