"""The store: what is published is whole, what is damaged is found, what is half-written is never seen."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from harness.runs.jsonable import canonical, key_of, to_jsonable
from harness.runs.record import Record
from harness.runs.store import CorruptArtifact, MissingArtifact, Store, StoreError, default_root
from harness.types import Cell, Score

KEY = key_of({"what": "an artifact"})


def record(key: str, **more: Any) -> Record:
    cell = Cell("digits-ddpm", "none", "box", "hat", "none", "ddim", seed=0)
    return Record(key=key, cell=cell, **more)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(out: Path, text: str = "weights") -> dict[str, Any]:
    (out / "model").mkdir()
    (out / "model" / "unet.txt").write_text(text)
    (out / "job.json").write_text("{}")
    return {"loss": 0.5, "curve": [1, float("nan")], "by step": {7: 0.1}}


def publish(store: Store, key: str = KEY, text: str = "weights") -> Path:
    return store.publish(key, lambda out: fill(out, text), {"kind": "attack", "label": "an attack"})


def leftovers(store: Store) -> list[Path]:
    return [*store.root.rglob(".tmp-*")]


def test_making_a_store_touches_no_disk(store: Store) -> None:
    assert not store.has(KEY) and store.record(KEY) is None and list(store.records()) == [] and store.gc() == []
    assert not store.root.exists()


def test_a_published_artifact_is_complete_and_verifies(store: Store) -> None:
    path = publish(store)
    assert path == store.artifact(KEY) and store.has(KEY) and store.verify(KEY) == []
    manifest = store.manifest(KEY)
    assert (manifest["kind"], manifest["label"], manifest["facts"]["loss"]) == ("attack", "an attack", 0.5)
    assert sorted(manifest["files"]) == ["job.json", "model/unet.txt"]
    assert store.open_artifact(KEY) == path
    assert list(store.keys()) == [KEY] and leftovers(store) == []


def test_an_artifact_is_invisible_until_it_is_whole(store: Store) -> None:
    def look(out: Path) -> dict[str, Any]:
        fill(out)
        assert not store.has(KEY) and list(store.keys()) == []
        with pytest.raises(MissingArtifact):
            store.open_artifact(KEY)
        return {}

    store.publish(KEY, look, {})
    assert store.has(KEY)


def test_a_folder_without_its_manifest_does_not_exist_and_gives_way(store: Store) -> None:
    publish(store)
    (store.artifact(KEY) / "manifest.json").unlink()
    assert not store.has(KEY)
    publish(store)
    assert store.has(KEY) and store.verify(KEY) == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "emptied manifest"])
def test_visible_damage_is_a_miss(store: Store, damage: str) -> None:
    path = publish(store)
    if damage == "truncate":
        (path / "model" / "unet.txt").write_text("wei")
    elif damage == "remove":
        (path / "job.json").unlink()
    else:
        (path / "manifest.json").write_text("{" if damage == "manifest" else "")
    assert not store.has(KEY)
    publish(store)
    assert store.has(KEY) and store.verify(KEY) == []


def test_changed_bytes_are_found_at_the_first_use_and_the_artifact_is_set_aside(store: Store) -> None:
    path = publish(store)
    (path / "model" / "unet.txt").write_text("WEIGHTS")
    assert store.has(KEY) and store.verify(KEY) == ["model/unet.txt"]
    assert store.verify_all() == {KEY: ["model/unet.txt"]}
    with pytest.raises(CorruptArtifact, match=r"unet\.txt") as caught:
        store.open_artifact(KEY)
    assert (caught.value.key, caught.value.file) == (KEY, "model/unet.txt")
    assert not store.has(KEY)
    publish(store)
    assert store.open_artifact(KEY)
    assert len(store.gc()) == 1 and not list(store.root.glob("quarantine/*"))


def test_a_changed_fact_in_the_manifest_is_damage(store: Store) -> None:
    manifest = publish(store) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.5", "0.1"))
    assert store.verify(KEY) == ["manifest.json"]


def test_a_fill_that_raises_leaves_nothing(store: Store) -> None:
    def broken(out: Path) -> dict[str, Any]:
        fill(out)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.publish(KEY, broken, {})
    assert not store.has(KEY) and leftovers(store) == []


def test_facts_that_are_not_json_leave_nothing(store: Store) -> None:
    with pytest.raises(TypeError):
        store.publish(KEY, lambda out: {"model": object()}, {})
    assert not store.has(KEY) and leftovers(store) == []


def test_the_first_of_two_writers_wins(store: Store) -> None:
    def outrun(out: Path) -> dict[str, Any]:
        publish(store, text="first")
        return fill(out, "second")

    store.publish(KEY, outrun, {})
    assert (store.open_artifact(KEY) / "model" / "unet.txt").read_text() == "first"
    assert leftovers(store) == []


def _race(root: Path, number: int) -> None:
    store = Store(root)
    for round_ in range(5):
        publish(store, key_of({"round": round_}), str(number) * 100_000)


def test_racing_writers_leave_one_uniform_artifact(store: Store) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_race, args=(store.root, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    for round_ in range(5):
        text = (store.open_artifact(key_of({"round": round_})) / "model" / "unet.txt").read_text()
        assert len(set(text)) == 1
    assert leftovers(store) == []


def _publish_for_ever(root: Path) -> None:
    store = Store(root)
    for i in range(10**6):
        publish(store, key_of({"i": i}), "x" * 10_000)


def test_a_killed_writer_leaves_whole_artifacts_and_a_draft_that_gc_removes(store: Store) -> None:
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_publish_for_ever, args=(store.root,))
        writer.start()
        while not any(store.keys()):
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        assert store.verify_all() == {}
    store.gc(older_than=0)
    assert leftovers(store) == [] and any(store.keys())


def test_gc_leaves_drafts_that_are_young_or_whose_writer_lives(store: Store) -> None:
    folder = store.artifact(KEY).parent
    ours, dead = folder / f".tmp-{os.getpid()}-aa", folder / ".tmp-4194305-bb"
    ours.mkdir(parents=True)
    dead.mkdir()
    assert store.gc() == []
    assert store.gc(older_than=0) == [dead] and ours.exists()


@pytest.mark.parametrize("where", ["fsync", "write"])
def test_a_full_disk_is_one_clear_error_and_nothing_half_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(out: Path) -> dict[str, Any]:
        if where == "write":
            full()
        return fill(out)

    publish(store)
    other = key_of({"another": 1})
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"no space left; free some, delete .*--store") as caught:
        store.publish(other, broken, {})
    assert f"delete {store.artifact(KEY).parents[1]} (" in str(caught.value)
    if where == "fsync":
        with pytest.raises(StoreError, match="no space left"):
            store.write_record(other, record(other))
    assert not store.has(other) and store.record(other) is None and leftovers(store) == []
    assert store.has(KEY)


def test_a_root_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match=r"cannot be written.*--store or BENCH_STORE"):
        publish(store)
    with pytest.raises(StoreError, match="cannot be written"):
        store.write_record(KEY, record(KEY))
    with pytest.raises(StoreError, match="cannot be written"):
        store.run_dir("quick")


def test_an_error_of_the_job_about_its_own_files_is_not_blamed_on_the_store(store: Store) -> None:
    def denied(out: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/data.npz")

    with pytest.raises(PermissionError):
        store.publish(KEY, denied, {})


def test_records_are_written_whole_and_read_back(store: Store) -> None:
    other = key_of({"cell": 2})
    kept = record(KEY, scores={"asr": Score(float("nan"), 2, False, per_sample=(0.5, float("nan")), warning="why")})
    store.write_record(KEY, kept)
    store.write_record(other, record(other))
    (store.root / "records" / "zz.json").write_text('{"half')
    again = store.record(KEY)
    assert again is not None and to_jsonable(again.model_dump()) == to_jsonable(kept.model_dump())
    assert sorted(record.key for record in store.records()) == sorted([KEY, other])


def test_a_lock_is_exclusive(store: Store) -> None:
    from filelock import Timeout

    with store.lock(KEY), pytest.raises(Timeout):
        store.lock(KEY).acquire(timeout=0)


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b"])
def test_names_that_would_leave_the_store_are_refused(store: Store, name: str) -> None:
    with pytest.raises(ValueError):
        store.run_dir(name)
    with pytest.raises(ValueError):
        store.artifact(name)


def test_the_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BENCH_STORE", raising=False)
    assert default_root() == tmp_path / "diffusion-defense-bench"
    monkeypatch.setenv("BENCH_STORE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_keys_ignore_the_order_of_names_and_survive_json(ingredients: dict[str, Any]) -> None:
    backwards = dict(reversed(ingredients.items()))
    assert key_of(backwards) == key_of(ingredients) == key_of(json.loads(canonical(ingredients)))


def test_each_changed_ingredient_changes_the_key() -> None:
    base = {"plugin": "elijah", "version": 1, "steps": 600, "lr": 1e-3, "seed": 0, "needs": ["a", "b"]}
    changed = [{**base, name: "other"} for name in base] + [{**base, "more": None}, {**base, "needs": ["b", "a"]}]
    assert len({key_of(one) for one in (base, *changed)}) == len(changed) + 1
    assert key_of({**base, "needs": ("a", "b")}) == key_of(base)


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError), ({1: 2}, TypeError)])
def test_what_is_not_json_cannot_be_part_of_a_key(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        key_of({"a": value})
