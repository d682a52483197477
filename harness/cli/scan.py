"""`bench scan`: what detectors say of a model of one's own."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import columns, echo, loaded, note, print_json, writable
from harness.cli.subject import Subject, known, listen, model_options, opened, unmet
from harness.runs.jsonable import to_jsonable

if TYPE_CHECKING:
    from torch import Tensor

    from harness.registry import Registry
    from harness.scan.verdict import Finding

SHOWN = 8  # samples in a row of a figure
MOST_LABEL = 2**16  # bytes of a bench.json
MOST_NAMED = 1000  # files in the report
EXITS = {"nothing found": Exit.ok, "suspicious": Exit.failed, "undecided": Exit.undecided}


@click.command(short_help="Check whether your own model is backdoored.")
@model_options
@click.option(
    "--detector",
    "detectors",
    multiple=True,
    metavar="DEFENSE",
    help="Detectors; a bare name uses the default scan's settings; default: all that apply.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="HTML file to write.")
def scan(
    model: str, revision: str, like: str | None, population: Path | None, data: Path | None, prompts: Path | None,
    seed: int, device: str | None, files: tuple[Path, ...], strict: bool, as_json: bool, detectors: tuple[str, ...],
    out: Path | None,
) -> int:  # fmt: skip
    """Ask detectors about MODEL, a diffusers directory or a hub id, and give a verdict with its evidence.

    Exit code: 0 nothing found, 1 suspicious, 4 cannot be loaded, 6 nothing to judge it by; a crash is 70, never 1.
    Pickles are refused.
    """
    from harness.scan import verdict as scanning

    if out is not None:
        writable(out, file=True)
    registry = loaded(files, strict)
    subject = opened(model, revision, like, device, registry, population)
    asked, skipped = applicable(subject, registry, detectors, given={"data": data, "prompts": prompts})
    knowledge = known(
        subject, data, prompts, seed, {need for each in asked.values() for need in each.needs} | {"prompts"}
    )
    listen(as_json)
    samples = scanning.pictures(subject.model, scanning.inputs_of(subject.model, 2 * SHOWN, knowledge.prompts))
    findings, figures = [], []
    if bool(samples.isfinite().all()):
        findings = scanning.examine(asked, subject.model, knowledge, subject.population, seed)
        findings, figures = shown(subject, findings, knowledge.prompts, samples)
    document = report(subject, findings, skipped)
    if as_json:
        print_json(document)
    else:
        _say(document)
    if out is not None:
        _write(document, figures, out.expanduser())
        if not as_json:
            echo(f"report: {out}")
    return EXITS[document["verdict"]]


def default_detectors(model: Any) -> list[str]:
    """The specs of leaderboard/scan.toml for what the model takes triggers in."""
    told = tomllib.loads(resources.files("leaderboard").joinpath("scan.toml").read_text(encoding="utf-8"))
    kind = "text" if model.conditional else "exploding" if model.family == "ve" else "noise"
    return list(told[kind]["detectors"])


def applicable(
    subject: Subject, registry: Registry, wanted: Sequence[str], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Detectors by canonical spec, and why others were left out. Asked for by name, one that cannot be asked is an
    error: click.UsageError."""
    modality = "text" if subject.model.conditional else "noise"
    usual = _unasked(subject, registry)
    specs = [each for spec in wanted for each in _meant(spec, usual)] if wanted else usual
    chosen, skipped = {}, []
    for spec in specs:
        detector = registry.build("defenses", spec)
        why = _unfit(detector, modality, subject, given)
        if why is None:
            canonical = registry.canonical("defenses", spec)
            chosen[canonical] = detector
            if wanted:
                _note_unknown(spec, canonical, subject)
        elif wanted:
            raise click.UsageError(f"{spec}: {why}")
        else:
            skipped.append(f"{spec} was not asked: {why}")
    return chosen, skipped


def _unasked(subject: Subject, registry: Registry) -> list[str]:
    """The detectors that the population knows, as they were asked there, and the defaults that it does not know."""
    from harness.registry import parse_spec

    compared = list(subject.population.suspicion) if subject.population is not None else []
    names = {parse_spec(spec)[0] for spec in compared}
    usual = default_detectors(subject.model) + ([] if compared else _third_party(registry))
    return compared + [spec for spec in usual if parse_spec(spec)[0] not in names]


def _meant(spec: str, usual: Sequence[str]) -> list[str]:
    """A bare name stands for how the default scan asks that detector; `name()` has the class's own defaults."""
    return [each for each in usual if each.partition("(")[0] == spec.strip()] or [spec]


def _note_unknown(spec: str, canonical: str, subject: Subject) -> None:
    """A line where the clean models were asked the same detector with other parameters."""
    name = canonical.partition("(")[0]
    compared = list(subject.population.suspicion) if subject.population is not None else []
    same = [known for known in compared if known.partition("(")[0] == name]
    if same and canonical not in same:
        asked = " and ".join(same)
        note(f"{spec} has no clean models to compare with; they were asked {asked}: give --detector {name}")


def _third_party(registry: Registry) -> list[str]:
    """Defenses of other distributions that give a suspicion as they stand."""
    from harness.capabilities import delivers
    from harness.registry import OWN

    names = registry.classes("defenses")
    foreign = [name for name in names if registry.distribution_of("defenses", name) != OWN]
    return [name for name in foreign if "suspicion" in delivers(registry.build("defenses", name))]


def _unfit(detector: Any, modality: str, subject: Subject, given: Mapping[str, Any]) -> str | None:
    from harness.capabilities import delivers

    if "suspicion" not in delivers(detector):
        return "it returns no suspicion for a model (see bench show)"
    if modality not in detector.accepts_triggers:
        return f"it looks for triggers in {' or '.join(detector.accepts_triggers)}, this model takes them in {modality}"
    return unmet(detector.needs, subject, given)


def shown(
    subject: Subject, findings: Sequence[Finding], prompts: Sequence[str] | None, plain_images: Tensor
) -> tuple[list[Finding], list[tuple[str, Tensor]]]:
    """The findings with how alike images of inverted triggers are, and captioned grids of samples.

    plain_images: (2 * SHOWN, C, H, W) of the scan's own inputs without a trigger.
    """
    from torch import Tensor

    from harness.diffusion.images import grid
    from harness.methods.trigger_placement import usable
    from harness.scan import verdict as scanning

    inputs = scanning.inputs_of(subject.model, 2 * SHOWN, prompts)
    scale = max(1, 96 // plain_images.shape[-1])
    figures = [("samples", grid([plain_images[:SHOWN], plain_images[SHOWN:]], scale))]
    told = []
    for finding in findings:
        trigger = finding.trigger
        if not usable(subject.model, trigger):
            told.append(finding)
            continue
        images = scanning.pictures(subject.model, inputs, trigger)
        told.append(replace(finding, alike=scanning.alikeness(images, plain_images)))
        figures.append(
            (f"the same noise with the trigger that {finding.detector} found", grid([images[:SHOWN]], scale))
        )
        if isinstance(trigger, Tensor) and subject.model.vae is None:
            figures.append((f"that trigger, {finding.detector}", grid([_visible(trigger)], scale)))
    return told, figures


def _visible(trigger: Tensor) -> Tensor:
    """A pattern (C, H, W) stretched over [-1, 1], as a batch of one with 1 or 3 channels."""
    low, high = trigger.min(), trigger.max()
    stretched = (trigger - low) / (high - low).clamp_min(1e-8) * 2 - 1
    return (stretched if stretched.shape[0] in (1, 3) else stretched.mean(0, keepdim=True)).unsqueeze(0).float()


def report(subject: Subject, findings: Sequence[Finding], skipped: Sequence[str]) -> dict[str, Any]:
    """What --json prints and the page shows."""
    from harness.judges import hub
    from harness.methods.trigger_placement import found_text
    from harness.scan.verdict import LEVEL, signature, verdict

    said = verdict(findings)
    unusable = not findings
    flagging = [finding.detector.partition("(")[0] for finding in findings if finding.flagged]
    broken = [finding.detector.partition("(")[0] for finding in findings if finding.error]
    reasons = {
        "unusable": "The model's samples hold NaN or infinity, so no detector was asked.",
        "suspicious": f"Flagged by {', '.join(flagging)}.",
        "nothing found": "No detector that could judge flagged it.",
        "undecided": f"Could not be asked: {', '.join(broken)}."
        if broken
        else ("No detector had clean models to compare with, or a threshold of its own."),
    }
    rows = []
    for finding in findings:
        row = {k: v for k, v in to_jsonable(replace(finding, trigger=None)).items() if k != "trigger"}
        rows.append({**row, "says": _says(finding), "trigger_text": found_text(finding.trigger)})
    facts = {
        **signature(subject.model),
        "directory": str(subject.directory),
        "compared with": None if subject.population is None else f"clean models of {subject.population.model}",
        "level": LEVEL,
        "its own label": _label(subject.directory),
    }
    limits = _limits(subject, said) + list(skipped)
    ignored = hub.ignored(subject.directory)
    limits += ignored.sentences()
    return {
        "model": subject.name,
        "verdict": said,
        "because": reasons["unusable" if unusable else said],
        "findings": rows,
        "limits": limits,
        "not_examined": [*ignored.code, *ignored.weights][:MOST_NAMED],
        "facts": facts,
    }


def _says(finding: Finding) -> str:
    if finding.error is not None:
        return f"failed: {finding.error}"
    return {True: "suspicious", False: "not suspicious", None: "nothing to compare with"}[finding.flagged]


def _label(directory: Path) -> str | None:
    """What a `bench.json` says of the model; shown, never believed."""
    from harness.diffusion.model_files import CheckpointError, ModelFiles

    files = ModelFiles(directory)
    try:
        return files.read("bench.json", MOST_LABEL).decode("utf-8", "replace")[:1000] if "bench.json" in files else None
    except CheckpointError:
        return None


def _limits(subject: Subject, said: str) -> list[str]:
    from harness.scan.verdict import signature

    lines = [
        "A model in which nothing was found may still be backdoored: each detector looks for backdoors of the "
        "kinds that its paper describes, and an attacker can train against it.",
        "A suspicious model may be clean: clean models are flagged at the rate that the level states, and one that was "
        "trained on other data than the models it is compared with more often.",
        "Only the denoiser's answers were examined; tokenizer, text encoder and autoencoder are taken as they are"
        + (", and prompts beside those that were tried may hide a trigger." if subject.model.conditional else "."),
    ]
    if subject.population is None:
        lines.append(
            "No population of clean models of this kind is known, so a suspicion says little by itself: "
            "bench calibrate makes one for a model plugin, and --like names it."
        )
    elif dict(subject.population.signature) != signature(subject.model):
        lines.append(
            f"This model has not the shape of the clean models of {subject.population.model} that it is compared with: "
            "they say little of it."
        )
    return lines


def _write(document: Mapping[str, Any], figures: Sequence[tuple[str, Tensor]], path: Path) -> None:
    from harness.scan.report import page

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(document, figures), encoding="utf-8")


def _say(document: Mapping[str, Any]) -> None:
    echo(f"{document['model']}: {document['verdict']}. {document['because']}")
    rows = [("detector", "suspicion", "clean models", "chance", "says")]
    for row in document["findings"]:
        clean = row["clean"]
        spread = f"{min(clean):.4g} to {max(clean):.4g}" if clean else "unknown"
        numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in ("suspicion", "chance")]
        rows.append((row["detector"].partition("(")[0], numbers[0], spread, numbers[1], row["says"]))
    echo(columns(rows, indent="  "))
    for line in document["limits"]:
        echo(f"- {line}")
