"""How long a suite of the papers' models may take on a GPU and how much memory, said before anything is downloaded.

An estimate counts evaluations of the denoiser: a training step is three for each row (forward, and twice that for the
gradients), an image is one for each network evaluation of its sampler, two under guidance. What else a method does
(teachers, inversions, autoencoders, judges) is not counted, so a job may take a few times longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.capabilities import BatchedMethod, CountedData, GuidedSampler, MeasuredWork, SteppedMethod, offers
from harness.registry import Registry, parse_spec
from harness.runs.evaluations import nfe_of
from harness.runs.job import AttackSpec, DefendSpec, SampleSpec

SUSTAINED = 20e12  # operations a second: what such networks reach in bf16 on a data-centre GPU of the A100's class
SAMPLED = 50  # images at once when sampling


@dataclass(frozen=True)
class Need:
    """What one job needs: hours of a GPU, bytes of its memory, bytes of the host's."""

    hours: float
    gpu_bytes: float
    host_bytes: float


def tolerant(registry: Registry) -> list[str]:
    """Let a plan be made where a model's weights or data are not here: its keys are provisional then, and the list that
    is returned says why. For plans, never for runs."""
    build, notes = registry.build, []

    def built(kind: str, spec: str) -> Any:
        made = build(kind, spec)
        if kind in ("model", "models"):
            digest = made.digest
            object.__setattr__(made, "digest", lambda: _digest(digest, spec, notes))
        return made

    registry.build = built  # type: ignore[method-assign]
    return notes


def _digest(digest: Callable[[], str], spec: str, notes: list[str]) -> str:
    from harness.diffusion.checkpoint import CheckpointError

    try:
        return digest()
    except (CheckpointError, OSError) as error:
        says = f"{parse_spec(spec)[0]} is not here, so nothing of it can be in the store: {error}"
        notes += [] if says in notes else [says]
        return f"not here: {spec}"


def needs(jobs: Mapping[str, Any], registry: Registry) -> dict[str, Need]:
    """The need of each job, by key, whose model says what its work is (the papers' models do)."""
    found = {}
    for key, job in jobs.items():
        model = registry.build("models", job.spec.model)
        if offers(model, MeasuredWork):
            found[key] = _need(job, model, registry)
    return found


def _need(job: Any, model: Any, registry: Registry) -> Need:
    work = model.work
    weights = 4.0 * work.parameters
    evaluations, rows = 0.0, 0
    spec = job.spec
    plugin = None
    if isinstance(spec, AttackSpec):
        plugin = registry.build("attacks", spec.attack)
    if isinstance(spec, DefendSpec):
        plugin = registry.build("defenses", spec.defense)
    if plugin is not None:
        steps = _whole(plugin.steps, 0) if offers(plugin, SteppedMethod) else 0
        rows = _whole(plugin.batch, 1) if offers(plugin, BatchedMethod) else 1
        evaluations = 3.0 * steps * rows
    if isinstance(spec, SampleSpec):
        sampler = registry.build("samplers", spec.sampler)
        guided = 2 if model.conditional and offers(sampler, GuidedSampler) and sampler.guidance != 1 else 1
        evaluations = float(spec.n * max(1, len(spec.stamps)) * nfe_of(sampler) * guided)
    hours = evaluations * 2e9 * work.gmacs / SUSTAINED / 3600
    pixels = 3 * 4 * model.side**2
    data = float(pixels * _images(model))
    if rows:  # weights, a frozen copy, gradients, two moments; activations kept in bf16; the data beside the model
        return Need(hours, 5 * weights + 2.0 * rows * work.activations + (0 if model.latent else data), 2 * data)
    n = spec.n if isinstance(spec, DefendSpec | SampleSpec) else 0
    return Need(hours, weights + 4.0 * SAMPLED * work.activations / 8, 4e9 + pixels * n)


def data_bytes(spec: AttackSpec | DefendSpec, model: Any, registry: Registry) -> float:
    """Bytes of main memory of the training data that a job reads, once as they are read and once as numbers."""
    reads = isinstance(spec, AttackSpec) or "data" in registry.build("defenses", spec.defense).needs
    return 2.0 * 3 * 4 * model.side**2 * _images(model) if reads else 0.0


def _whole(value: Any, otherwise: int) -> int:
    """A plugin's number, if it is a whole one."""
    return value if isinstance(value, int) else otherwise


def _images(model: Any) -> int:
    """Images that are read: those that the model counts, else all of the published data set."""
    usual = 60_000 if model.side == 32 else 30_000
    return (model.images if offers(model, CountedData) else 0) or usual


def total(jobs: Mapping[str, Any], missing: Iterable[str], registry: Registry) -> dict[str, Any]:
    """hours (the sum), gpu_bytes and host_bytes (the most of a job), longest (label and hours), assumed (operations a
    second) over the jobs that are still to be computed; {} where no model says what its work is."""
    wanted = set(missing)
    found = {key: need for key, need in needs(jobs, registry).items() if key in wanted}
    if not found:
        return {}
    longest = max(found, key=lambda key: found[key].hours)
    return {
        "hours": sum(need.hours for need in found.values()),
        "gpu_bytes": max(need.gpu_bytes for need in found.values()),
        "host_bytes": max(need.host_bytes for need in found.values()),
        "longest": {"label": jobs[longest].label, "hours": found[longest].hours},
        "assumed": SUSTAINED,
    }


def lines(jobs: Mapping[str, Any], missing: Iterable[str], registry: Registry) -> list[str]:
    """The total in words."""
    found = total(jobs, missing, registry)
    if not found:
        return []
    gpu, host, longest = found["gpu_bytes"] / 2**30, found["host_bytes"] / 2**30, found["longest"]
    return [
        f"with the published networks, on one GPU: about {found['hours']:,.0f} hours at {SUSTAINED / 1e12:.0f} TFLOP/s "
        f"of training and sampling alone; {gpu:,.0f} GiB of its memory, {host:,.0f} GiB of the host's",
        f"the longest job, {longest['label']}: about {longest['hours']:,.1f} hours; run with --timeout in seconds",
    ]
