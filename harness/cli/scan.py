"""`bench scan`: what detectors say of a model of one's own."""

from __future__ import annotations

import os
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import check_device, loaded, note, outside, writable
from harness.cli.scan_targets import Target, pipeline_of, targets_of
from harness.cli.subject import (
    Subject,
    config_option,
    known as drawn,
    listen,
    opened,
    opened_base,
    options_of_kind,
    pictures,
    unmet,
)
from harness.runs.jsonable import to_jsonable

if TYPE_CHECKING:
    from torch import Tensor

    from harness.registry import Registry
    from harness.scan.verdict import Finding

SHOWN = 8  # samples in a row of a figure
MOST_LABEL = 2**16  # bytes of a bench.json
MOST_NAMED = 1000  # files in the report
FORMATS = ("text", "json", "sarif", "html")
EMBEDDED = (
    "The base {} is taken for clean: only the vectors of the embedding, and what its word does, are new. An embedding "
    "is made to change images, so that a word which does so is no proof of a backdoor"
)
EXITS = {"nothing found": Exit.ok, "suspicious": Exit.failed, "undecided": Exit.undecided}


@click.command(short_help="Check whether your own models are backdoored.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@options_of_kind
@click.option("--list", "listed", metavar="FILE", help="Also scan the models of FILE, one per line; - is stdin.")
@click.option("--known", is_flag=True, help="Scan the published backdoored models of known_backdoored.toml.")
@click.option("--only", metavar="TEXT", help="With --known: entries whose name or attack contains TEXT.")
@click.option(
    "--detector",
    "detectors",
    multiple=True,
    metavar="DEFENSE",
    help="A detector to run; repeatable. A name without parameters has the settings of the default scan. Default: all "
    "that apply.",
)
@click.option(
    "--base",
    metavar="DIR",
    help="The clean model from which MODEL was made, a directory or a hub id: MODEL is compared with it. An adapter "
    "(LoRA) and an embedding (textual inversion) need it.",
)
@config_option
@click.option(
    "--fail-on",
    type=click.Choice(["suspicious", "undecided"]),
    default="undecided",
    show_default=True,
    help="The mildest verdict whose exit code is not 0.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="The format of what is printed; default: text. --json prints JSON too, for a single MODEL its report alone.",
)
@click.option(
    "-o",
    "--out",
    "outs",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A file to write; repeatable. Its ending .html, .json, .sarif or .txt decides its format; for another ending "
    "--format decides, and without it the file is HTML.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no text and no progress; errors and the exit code remain.")
def scan(
    models: tuple[str, ...], revision: str, like: str | None, population: Path | None, data: Path | None,
    prompts: Path | None, seed: int, device: str | None, files: tuple[Path, ...], strict: bool, as_json: bool,
    listed: str | None, known: bool, only: str | None, detectors: tuple[str, ...], base: str | None,
    config: Path | None, fail_on: str, form: str | None, outs: tuple[Path, ...], quiet: bool,
) -> int:  # fmt: skip
    """Run the detectors that apply to each MODEL, and report a verdict with its evidence. MODEL is a diffusers
    directory, a .safetensors file, a hub id, or an adapter or an embedding with --base. Pickles are refused.

    A model that cannot be loaded does not stop the scan of the others. Exit code: 0 nothing found, 1 suspicious, 4 the
    model cannot be loaded or is refused, 6 undecided; a crash is 70, never 1. For several models, the exit code is the
    first of 1, 70, 4, 6, 0 that one of them has.
    """
    from harness.cli import scan_output as output

    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form}: give one of them")
    for out in outs:
        writable(out, file=True)
    form = "json" if as_json else form
    targets = targets_of(models, revision, listed, known, only)
    for out in outs:
        outside(out, [*(target.where for target in targets if target.entry is None), base, config], file=True)
    registry = loaded(files, strict)
    check_device(device)
    for spec in detectors:
        registry.build("defenses", spec)
    silent = quiet or form in ("json", "sarif", "html")
    listen(silent)
    asked = Asked(registry, like, population, data, prompts, seed, device, detectors, silent, base, config)
    started = output.now()
    outcomes = []
    for place, target in enumerate(targets, 1):
        if len(targets) > 1 and not silent:
            note(f"{place}/{len(targets)} {target.name}")
        outcomes.append(_outcome(target, asked, fail_on, alone=len(targets) == 1))
    found = output.scan_of([outcome.report for outcome in outcomes], started, seed, fail_on)
    single = as_json and len(targets) == 1 and listed is None and not known
    output.show(found, [outcome.figures for outcome in outcomes], form, outs, quiet, single)
    if len(outcomes) == 1 and outcomes[0].error is not None:
        raise outcomes[0].error
    return found.exit_code


@dataclass(frozen=True)
class Asked:
    """What each model of a call is asked with."""

    registry: Registry
    like: str | None
    population: Path | None
    data: Path | None
    prompts: Path | None
    seed: int
    device: str | None
    detectors: tuple[str, ...]
    silent: bool
    base: str | None
    config: Path | None


@dataclass(frozen=True)
class Outcome:
    """The report on one model, with captioned pictures; error: why it was not scanned."""

    report: dict[str, Any]
    figures: Sequence[tuple[str, Tensor]] = ()
    error: Exception | None = None


def _outcome(target: Target, asked: Asked, fail_on: str, alone: bool) -> Outcome:
    """Scan one model. A model that cannot be scanned gives a report that says why."""
    from harness.cli import exit_code_of, line_of

    try:
        report, figures = _scanned(target, asked)
    except Exception as error:
        code = exit_code_of(error)
        says = line_of(error) if code is not None else f"a bug: {type(error).__name__}: {line_of(error)}"
        if not alone:  # the error of one model alone is that of the command
            if code is None or os.environ.get("BENCH_DEBUG") == "1":
                traceback.print_exception(error)
            where = "" if says.startswith(target.name) else f"{target.name}: "
            note(f"bench: {where}{says}{'; please report it with the lines above' if code is None else ''}")
        return Outcome(unscanned(target, asked.seed, says, Exit.bug if code is None else code), error=error)
    code = EXITS[report["verdict"]]
    mild = code == Exit.undecided and fail_on == "suspicious"
    return Outcome({**report, "exit_code": int(Exit.ok if mild else code)}, figures)


def _scanned(target: Target, asked: Asked) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """The report on one model and its pictures. Raises what the loading of the model raises."""
    import tempfile

    from harness.scan import known as published

    if target.entry is None:
        return _examined(target, target.where, asked, None)
    with tempfile.TemporaryDirectory(prefix=".bench-known-", dir=published.room()) as folder:
        found = published.found(target.entry, Path(folder))
        with_base = asked if found.base is None else replace(asked, base=found.base)
        return _examined(replace(target, revision="main"), str(found.place), with_base, found.commit)


def _examined(
    target: Target, where: str, asked: Asked, commit: str | None
) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    from harness.diffusion import adapters, kept_scores
    from harness.registry.code_digest import closure
    from harness.registry.kept import cache_dir, digest_of
    from harness.scan import families, verdict as scanning
    from harness.scan.comparison import compared
    from harness.scan.false_alarms import false_alarms
    from harness.scan.next_steps import next_steps

    registry, data, prompts, seed = asked.registry, asked.data, asked.prompts, asked.seed
    like = asked.like or (None if target.entry is None else target.entry.like)
    place = None if asked.base is None else pipeline_of(asked.base)
    subject = opened(where, target.revision, like, asked.device, registry, asked.population, place, asked.config)
    subject = replace(subject, name=target.name)
    base = None
    if place is not None and subject.adapted:
        base = adapters.base_of(subject.model)
    elif place is not None and subject.embedding is None:
        base = opened_base(place, str(asked.base), subject.model)
    given = {"data": data, "prompts": prompts, "clean_model": base}
    asks, skipped = applicable(subject, registry, asked.detectors, given)
    needs = {need for each in asks.values() for need in each.needs} | {"prompts"}
    knowledge = drawn(subject, data, prompts, seed, needs, base=base)
    inputs = scanning.inputs_of(subject.model, 2 * SHOWN, knowledge.prompts)
    samples = pictures(subject.model, inputs, where)
    findings, figures, numbers = [], [], bool(samples.isfinite().all())
    if not asked.silent and numbers:
        _say_ahead(asks, skipped, subject, knowledge, seed)
    if numbers:
        cache = cache_dir()
        code = digest_of(str(closure(type(each) for each in asks.values())))
        with kept_scores.kept_in(cache and cache / "searches", code):
            findings = scanning.examine(asks, subject.model, knowledge, subject.population, seed)
        findings, figures = shown(subject, findings, knowledge.prompts, samples)
    unseen = families.unseen(asks, subject.model)
    document = report(subject, findings, skipped, numbers, asked.base)
    adapter = _adapter(subject)
    if target.entry is not None:
        document["facts"].pop("directory")
        adapter = None if adapter is None else adapter.model_copy(update={"file": Path(adapter.file).name})
    return {
        **document,
        "error": None,
        "seed": seed,
        "commit": commit or _commit(subject.directory),
        "digests": _digests(subject),
        "false_alarms": false_alarms(findings, subject.population),
        "next_steps": next_steps(
            target.name,
            document["verdict"],
            findings,
            document["not_examined"],
            seed,
            numbers,
            asked.base if subject.beside_a_base else None,
            subject.embedding is not None,
        ),
        "published": _published(target),
        "base": None if base is None else compared(subject.model, base, str(asked.base), knowledge.prompts),
        "adapter": adapter,
        "embedding": _embedding(subject, knowledge.prompts) if numbers else None,
        "unseen": unseen,
    }, figures


def _say_ahead(asks: Mapping[str, Any], skipped: Sequence[str], subject: Subject, knowledge: Any, seed: int) -> None:
    """Lines about what follows: the detectors that are asked and for how long, the others and what they lack, and
    whether a verdict is possible."""
    from harness.scan import ahead

    asked = ahead.asks(asks, subject.model, knowledge, subject.population, seed)
    for line in (*map(str, asked), *skipped, ahead.outlook(asked)):
        note(line)


def unscanned(target: Target, seed: int, error: str, code: int) -> dict[str, Any]:
    """The report on a model that was not scanned."""
    return {
        "model": target.name, "verdict": "not scanned", "because": error, "exit_code": int(code), "error": error,
        "seed": seed, "commit": None, "digests": {}, "false_alarms": None, "findings": (), "limits": (),
        "not_examined": (), "facts": {}, "published": _published(target), "base": None, "adapter": None, "unseen": (),
        "embedding": None,
        "next_steps": ["Nothing is known about this model. Do not read this outcome as a verdict."],
    }  # fmt: skip


def _published(target: Target) -> dict[str, str] | None:
    entry = target.entry
    if entry is None:
        return None
    return {"name": entry.name, "attack": entry.attack, "paper": entry.paper, "source": entry.source}


def _commit(directory: Path) -> str | None:
    """The commit of a directory in the hub's cache."""
    from harness.diffusion.model_files import SNAPSHOT

    return directory.name if SNAPSHOT.fullmatch(directory.absolute().as_posix()) else None


def _digests(subject: Subject) -> dict[str, str]:
    """File → sha256 of each weights file that was read."""
    from harness.diffusion import checkpoint, single_file
    from harness.diffusion.model_files import ModelFiles

    if subject.file is not None:
        laid_out = single_file.origin(subject.directory)
        beside = {} if laid_out is None else laid_out.beside
        return {subject.file.name: _digest(subject.file)} | {name: _digest(path) for name, path in beside.items()}
    files, found = ModelFiles(subject.directory), {}
    for name in checkpoint.read_files(subject.directory):
        if name.endswith(".safetensors"):
            found[name] = _digest(Path(os.path.realpath(files.path(name))))
    return found


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_detectors(model: Any) -> list[str]:
    """The specs of leaderboard/scan.toml for what the model takes triggers in, and for a model with an adapter."""
    told = tomllib.loads(resources.files("leaderboard").joinpath("scan.toml").read_text(encoding="utf-8"))
    prompted = "text" if model.adapter is None else "adapter"
    kind = prompted if model.conditional else "exploding" if model.family == "ve" else "noise"
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
    if subject.embedding is not None and "clean_model" in detector.needs:
        return "it compares weights with those of the base, and an embedding changes none of them"
    return unmet(detector.needs, subject, given)


def shown(
    subject: Subject, findings: Sequence[Finding], prompts: Sequence[str] | None, plain_images: Tensor
) -> tuple[list[Finding], list[tuple[str, Tensor]]]:
    """The findings with what images of inverted triggers show, and captioned grids of samples.

    plain_images: (2 * SHOWN, C, H, W) of the scan's own inputs without a trigger.
    """
    from torch import Tensor

    from harness.diffusion.images import grid
    from harness.methods.trigger_placement import usable
    from harness.scan import verdict as scanning

    inputs = scanning.inputs_of(subject.model, 2 * SHOWN, prompts)
    scale = max(1, 96 // plain_images.shape[-1])
    figures = [("samples without a trigger", grid([plain_images[:SHOWN], plain_images[SHOWN:]], scale))]
    told = []
    for finding in findings:
        trigger = finding.trigger
        if not usable(subject.model, trigger):
            told.append(finding)
            continue
        images = scanning.pictures(subject.model, inputs, trigger)
        other = None
        if isinstance(trigger, Tensor):
            beside = scanning.pictures(subject.model, inputs, scanning.shuffled(trigger))
            other = scanning.alikeness(beside, plain_images)
        told.append(
            replace(
                finding, alike=scanning.alikeness(images, plain_images), alike_shuffled=other,
                far=scanning.farness(images, plain_images),
            )
        )  # fmt: skip
        name = finding.detector.partition("(")[0]
        figures.append((f"the same noise with the trigger that {name} found", grid([images[:SHOWN]], scale)))
        if isinstance(trigger, Tensor) and subject.model.vae is None:
            figures.append((f"the trigger that {name} found", grid([_visible(trigger)], scale)))
    return told, figures


def _visible(trigger: Tensor) -> Tensor:
    """A pattern (C, H, W) stretched over [-1, 1], as a batch of one."""
    low, high = trigger.min(), trigger.max()
    stretched = (trigger - low) / (high - low).clamp_min(1e-8) * 2 - 1
    return stretched.unsqueeze(0).float()


def report(
    subject: Subject, findings: Sequence[Finding], skipped: Sequence[str], numbers: bool, base: str | None = None
) -> dict[str, Any]:
    """What the detectors found, the limits and the facts. numbers: whether the model's samples are finite. base: the
    name of the clean model, if one was given."""
    from harness.judges import hub
    from harness.methods.trigger_placement import found_text
    from harness.scan.remarks import remarks
    from harness.scan.verdict import LEVEL, signature, verdict

    said = verdict(findings)
    flagging = [finding.detector.partition("(")[0] for finding in findings if finding.flagged]
    broken = [finding.detector.partition("(")[0] for finding in findings if finding.error]
    reasons = {
        "suspicious": f"Flagged by {', '.join(flagging)}.",
        "nothing found": "No detector that could judge flagged it.",
        "undecided": f"Could not be asked: {', '.join(broken)}."
        if broken
        else ("No detector had clean models to compare with, or a threshold of its own."),
    }
    because = reasons[said]
    if not findings:
        because = "No detector could be asked." if numbers else "The model's samples hold NaN or infinity."
    rows = []
    for finding in findings:
        row = {k: v for k, v in to_jsonable(replace(finding, trigger=None)).items() if k != "trigger"}
        rows.append({**row, "says": _says(finding), "trigger_text": found_text(finding.trigger)})
    facts = {
        **signature(subject.model),
        "directory": str(subject.directory if subject.file is None else subject.file),
        "compared with": None if subject.population is None else f"clean models of {subject.population.model}",
        "level": LEVEL,
        "its own label": None if subject.beside_a_base else _label(subject.directory),
    }
    limits = _limits(subject, base) + list(skipped)
    ignored = hub.Ignored((), ()) if subject.beside_a_base else hub.ignored(subject.directory)
    limits += [] if subject.beside_a_base else remarks(subject.directory)
    limits += ignored.sentences()
    return {
        "model": subject.name,
        "verdict": said,
        "because": because,
        "findings": rows,
        "limits": limits,
        "not_examined": [*ignored.code, *ignored.weights, *ignored.tensors][:MOST_NAMED],
        "facts": facts,
    }


def _says(finding: Finding) -> str:
    if finding.error is not None:
        return f"failed: {finding.error}"
    return {True: "suspicious", False: "not suspicious", None: "nothing to compare with"}[finding.flagged]


def _adapter(subject: Subject) -> Any:
    """What the scanned adapter is made of; None for a whole model."""
    from harness.scan.lowrank import described

    adapter = subject.model.adapter
    if adapter is None or subject.embedding is not None:
        return None
    return described(adapter, str(subject.directory if subject.file is None else subject.file))


def _embedding(subject: Subject, prompts: Sequence[str] | None) -> Any:
    """What the scanned embedding is and does; None for anything else."""
    from harness.scan.embedding import described

    if subject.embedding is None:
        return None
    return described(subject.model, subject.embedding, prompts)


def _label(directory: Path) -> str | None:
    """What a `bench.json` says of the model; shown, never believed."""
    from harness.diffusion.model_files import CheckpointError, ModelFiles

    files = ModelFiles(directory)
    try:
        return files.read("bench.json", MOST_LABEL).decode("utf-8", "replace")[:1000] if "bench.json" in files else None
    except CheckpointError:
        return None


def _examined_parts(base: str | None) -> str:
    if base is None:
        return (
            "Only the denoiser's answers were examined; tokenizer, text encoder and autoencoder are taken as they are"
        )
    return (
        f"The model was compared with {base}, which is taken for clean: a backdoor that both share is not seen, and a "
        "difference is no proof of a backdoor"
    )


def _limits(subject: Subject, base: str | None) -> list[str]:
    from harness.scan.verdict import signature

    lines = [
        "A model in which nothing was found may still be backdoored: each detector looks for backdoors of the "
        "kinds that its paper describes, and an attacker can train against it.",
        "A suspicious model may be clean: clean models are flagged at the rate that the level states, and one that was "
        "trained on other data than the models it is compared with more often.",
        (_examined_parts(base) if subject.embedding is None else EMBEDDED.format(base))
        + (", and prompts beside those that were tried may hide a trigger." if subject.model.conditional else "."),
    ]
    if any(type(part).__name__ == "T5EncoderModel" for part in subject.model.components().values()):
        lines.append(
            "No detector examines T5's text encoder by itself: with --base it is compared with the base's, and no more."
        )
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
