"""A job in its process, rehearsed: its loops take two passes, its networks few rows, and its time is extrapolated.

The clock of a rehearsal runs ahead. Where a loop of N passes ends after two, the clock gains the N - 2 passes that are
left out, each as long as the second. Loops inside others gain their time in every pass of those, so the clock shows
what the whole job takes. Where the denoiser or the autoencoder gets more rows than are taken, it computes the first
ones, repeats their answer, and the clock gains the time of the others, in the backward pass too. Three clocks run: with
the second pass, with the shorter and with the longer of both.

Numbers mean nothing in a rehearsal. What counts is that no code of the job is left out. On a processor networks run in
fp32 under autocast, because bf16 takes many times longer there, and the moments of all weights in AdamW share one
buffer. Both are told with the figures.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from harness.capabilities import LoopedMethod, MeasuredWork, SteppedMethod, offers
from harness.runs.job import AttackSpec, DefendSpec, JobSpec

if TYPE_CHECKING:
    from torch import Tensor

    from harness.registry import Registry
    from harness.runs.store import Store

PASSES = 2  # of each loop
GMACS = 25.0  # without a GPU a network gets as many rows at once as take this many 1e9 multiply-additions, at least 1
ROWS = 16  # of a network whose work is unknown
JUDGED = 4  # images that a judge gets at once without a GPU
_denoisers: set[type] = set()  # classes of denoisers that this process has met


class Unshortened(Exception):
    """A loop that a method runs by itself, past the passes of a rehearsal."""

    def __init__(self, phase: str, total: int) -> None:
        super().__init__(f"the loop '{phase}' of {total} passes is not one of harness.loop")
        self.phase, self.total = phase, total


@dataclass
class Loop:
    """A loop that was shortened. seconds: of its passes, with what loops inside them gained. outer: whether it is in no
    other loop."""

    phase: str
    total: int
    outer: bool
    seconds: list[float] = field(default_factory=list)

    @property
    def whole(self) -> float:
        return sum(self.seconds) + max(0, self.total - len(self.seconds)) * self.seconds[-1] if self.seconds else 0.0


class Clock:
    """Three clocks that run ahead, the loops that were shortened, and the memory that was left out.

    rows: how many a network gets at once, None for all. kind: of the job. images: how many times more images the whole
    job samples, screens or judges.
    """

    def __init__(self, rows: int | None, kind: str, images: float = 1.0) -> None:
        self.rows, self.kind, self.images = rows, kind, images
        self.time = _timer()
        self.begun = self.time()
        self.ahead = [0.0, 0.0, 0.0]  # with the shorter pass, with the second, with the longer
        self.loops: list[Loop] = []
        self.left_out = 0.0  # bytes of rows that were not computed, at most at once
        self.not_held = 0.0  # bytes of moments that share one buffer
        self.peak = 0.0  # bytes of main memory
        self.inside: list[str] = []  # phases of the loops that run now

    def now(self) -> list[float]:
        _wait()
        real = self.time()
        return [real + ahead for ahead in self.ahead]

    def gain(self, low: float, middle: float, high: float) -> None:
        self.ahead = [a + b for a, b in zip(self.ahead, (low, middle, high), strict=True)]

    def repeat(self, since: list[float], times: float) -> None:
        """Gain the time since then `times` more times."""
        self.gain(*(times * (b - a) for a, b in zip(since, self.now(), strict=True)))

    def shorten(self, phase: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        """The first two of `items`. A sampler through which gradients flow keeps all its steps and its memory."""
        import torch

        if phase == "sampling" and torch.is_grad_enabled():
            yield from items
            return
        loop = Loop(phase, total, not self.inside)
        self.loops.append(loop)
        self.inside.append(phase)
        marks = [self.now()]
        try:
            for item in itertools.islice(items, PASSES):
                yield item
                marks.append(self.now())
                loop.seconds.append(marks[-1][1] - marks[-2][1])
        finally:
            self.inside.remove(phase)
            rest = total - len(loop.seconds)
            if loop.seconds and rest > 0:
                passes = [[b - a for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(marks)]
                low, high = (pick(each[k] for each in passes) for pick, k in ((min, 0), (max, 2)))
                self.gain(rest * low, rest * passes[-1][1], rest * high)

    def hear(self, event: Mapping[str, Any], lengths: Iterable[int]) -> None:
        """Raises Unshortened at the third pass of a loop that is not shortened and as long as a method says."""
        phase, step, total = event["phase"], event["step"], event["total"]
        if phase in self.inside or total not in lengths:
            return
        if step > PASSES:
            raise Unshortened(phase, total)

    def weigh(self) -> tuple[float, float]:
        """(the most since the last look, now): bytes of main memory of this process."""
        found = _memory()
        self.peak = max(self.peak, *found)
        return found

    # ---- rows

    def few(self, call: Callable[..., Any], owner: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
        """call(x, *rest, **named) of the first rows alone; the answer in the given number of rows."""
        import torch

        rows, taken = len(x), len(x) if self.rows is None else min(self.rows, len(x))
        if taken == rows:
            return call(x, *rest, **named)

        def cut(value: Any) -> Any:
            batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows
            return value[:taken] if batched else value

        part = x[:taken]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in owner.parameters())
        if learns and not part.requires_grad:
            part = part.clone().requires_grad_(True)
        part = part.clone() if part is x else part
        begun, before = self.now(), self.weigh()[1]
        answer = call(part, *(cut(value) for value in rest), **{name: cut(value) for name, value in named.items()})
        times = rows / taken - 1
        self.repeat(begun, times)
        self.left_out = max(self.left_out, max(0.0, self.weigh()[0] - before) * times)
        index = torch.arange(rows, device=x.device) % taken

        def spread(tensor: Tensor) -> Tensor:
            if tensor.requires_grad and part.requires_grad:
                started: list[list[float]] = []
                tensor.register_hook(lambda grad: started.append(self.now()))
                part.register_hook(lambda grad: self.repeat(started.pop(), times) if started else None)
            return tensor[index]

        if isinstance(answer, torch.Tensor):
            return spread(answer)
        answer.sample = spread(answer.sample)
        return answer

    def features(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """The features of a judge: few images are judged, and the clock gains the time of the others."""
        import torch

        taken = len(images) if self.rows is None else min(len(images), JUDGED)
        begun = self.now()
        found = network(images[:taken])
        self.repeat(begun, len(images) * (self.images if self.kind == "measure" else 1.0) / taken - 1)
        return found[torch.arange(len(images)) % taken]


def _timer() -> Callable[[], float]:
    """What tells seconds: for one thread without a GPU the processor, whose time other programs do not lengthen."""
    import torch

    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


def _wait() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _memory() -> tuple[float, float]:
    """(the most since the last call, now): bytes of main memory of this process; the second alone where the system
    keeps no such peak."""
    import psutil

    now = float(psutil.Process().memory_info().rss)
    try:
        status = Path("/proc/self/status").read_text()
        peak = float(status.split("VmHWM:")[1].split()[0]) * 1024
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, IndexError, ValueError):
        return now, now
    return peak, now


# ---- what is replaced while a job is rehearsed ----------------------------------------------------------------------


@contextmanager
def rehearsed(clock: Clock) -> Iterator[None]:
    """Loops, networks, image sets, screens and AdamW as a rehearsal has them."""
    import torch

    from harness.diffusion import events
    from harness.diffusion.model import BATCH, SAMPLED, DiffusionModel
    from harness.stages import defend

    sample, encode, latents, decode = (
        DiffusionModel.sample, DiffusionModel.encode, DiffusionModel._latents, DiffusionModel.decode
    )  # fmt: skip
    made, screen = DiffusionModel.__post_init__, defend.screen
    scaled = clock.kind in ("sample", "control")
    wrapped: set[type] = set()
    stack = ExitStack()

    def first_batch(self: Any, inputs: Any, sampler: Any, batch: int | None = None, phase: str = "sample") -> Tensor:
        n, batch = len(inputs), batch or SAMPLED
        begun = clock.now()
        clock.inside.append(phase)
        try:
            images = sample(self, inputs[:batch], sampler, batch, phase)
        finally:
            clock.inside.remove(phase)
        times = n / len(images) * (clock.images if scaled and phase == "sample" else 1.0)
        loop = Loop(phase, max(1, round(times)), not clock.inside, [clock.now()[1] - begun[1]])
        clock.loops.append(loop)
        clock.repeat(begun, times - 1)
        return images[torch.arange(n) % len(images)]

    def first_images(self: Any, images: Tensor, batch: int = BATCH) -> Tensor:
        if self.vae is None:
            return encode(self, images, batch)
        some, begun = images[: batch if clock.rows is None else clock.rows], clock.now()
        found = encode(self, some, batch)
        clock.repeat(begun, len(images) / len(some) - 1)
        return found[torch.arange(len(images), device=found.device) % len(found)]

    def few_latents(self: Any, images: Tensor) -> Tensor:
        return clock.few(lambda x: latents(self, x), self.vae, images)

    def few_decoded(self: Any, x_0: Tensor, *more: Any) -> Tensor:
        if self.vae is None:
            return decode(self, x_0, *more)
        return clock.few(lambda x: decode(self, x, *more), self.vae, x_0)

    def with_few_rows(self: Any) -> None:
        made(self)
        wrap(type(self.denoiser))

    def wrap(cls: type) -> None:
        _denoisers.add(cls)
        if cls not in wrapped and clock.rows is not None:
            wrapped.add(cls)
            stack.enter_context(patch.object(cls, "forward", _forward(clock, cls)))

    def few_screened(*args: Any) -> dict[str, list[float]]:
        begun = clock.now()
        found = screen(*args)
        clock.repeat(begun, clock.images - 1)
        return found

    with stack:
        for cls in list(_denoisers):  # of a model that an earlier job of this process has loaded
            wrap(cls)
        stack.enter_context(patch.object(defend, "screen", few_screened))
        for name, instead in (
            ("sample", first_batch), ("encode", first_images), ("_latents", few_latents), ("decode", few_decoded),
            ("__post_init__", with_few_rows),
        ):  # fmt: skip
            stack.enter_context(patch.object(DiffusionModel, name, instead))
        if clock.rows is not None:
            stack.enter_context(patch.object(torch.optim, "AdamW", _lean(clock)))
        events.shorten(clock.shorten)
        try:
            yield
        finally:
            events.shorten(None)


def _forward(clock: Clock, cls: Any) -> Callable[..., Any]:
    """The forward pass of a class of denoisers: few rows, in fp32 on a processor. Attention maps that are captured are
    those of all rows."""
    import torch

    real: Any = cls.forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        x, *rest = (named.pop("sample"), *given) if "sample" in named else given
        half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")

        def call(x: Tensor, *rest: Any, **named: Any) -> Any:
            if not half:
                return real(self, x, *rest, **named)
            named = {name: _full(value) for name, value in named.items()}
            with torch.autocast("cpu", enabled=False):
                answer = real(self, _full(x), *(_full(value) for value in rest), **named)
            answer.sample = answer.sample.to(torch.get_autocast_dtype("cpu"))
            return answer

        captured = any(getattr(p, "maps", None) is not None for p in getattr(self, "attn_processors", {}).values())
        return call(x, *rest, **named) if captured else clock.few(call, self, x, *rest, **named)

    return forward


def _full(value: Any) -> Any:
    import torch

    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _lean(clock: Clock) -> Any:
    """AdamW whose moments share one buffer for each of both: as fast, and its weights are numbers without a meaning."""
    import torch

    class Lean(torch.optim.AdamW):
        def __init__(self, parameters: Any, *rest: Any, **named: Any) -> None:
            super().__init__(parameters, *rest, **named)
            every = [p for group in self.param_groups for p in group["params"]]
            most = max((p.numel() for p in every), default=0)
            moments = [torch.zeros(most, device=every[0].device) for _ in range(2)] if every else []
            for p in every:
                first, second = (each[: p.numel()].view_as(p) for each in moments)
                step = torch.zeros((), device=p.device if self.defaults["fused"] else "cpu")
                self.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
            clock.not_held = max(clock.not_held, 8.0 * (sum(p.numel() for p in every) - most))

    return Lean


# ---- the job --------------------------------------------------------------------------------------------------------


def execute(spec: Mapping[str, Any], store: Store, out: Path) -> dict[str, Any]:
    """Rehearse one job: fill the directory `out`, and return the facts of its manifest with its figures.

    spec: {"job": a spec as `harness.runs.execution.execute` takes it, "keep": whether a purified model is kept for jobs
    that need it, "images": how many times more images the job has in its suite, "rows": rows of a network at once, 0
    for a number by its work, -1 for all}.
    """
    from harness.registry import load
    from harness.runs import execution

    asked = execution.parsed(spec["job"])
    registry = load([Path(file) for file in asked.plugin_files])
    clock = Clock(_rows(spec["rows"], asked, registry), asked.kind, float(spec["images"]))
    _with_stand_ins(registry, clock)
    try:
        facts = _done(asked, registry, store, out, clock)
    except Unshortened as own:
        clock.__init__(clock.rows, asked.kind, clock.images)
        facts = _done(_cut(asked, registry, own), registry, store, out, clock, own)
    if not spec["keep"]:
        _forget(out)
    return {**facts, "versions": execution.versions(), "rehearsal": _figures(clock)}


def _done(
    asked: JobSpec, registry: Registry, store: Store, out: Path, clock: Clock, own: Unshortened | None = None
) -> dict[str, Any]:
    """Do the job. own: a loop of the method's own, which the spec has shortened."""
    from harness.diffusion import events
    from harness.runs import execution

    sink, lengths = events.listener(), _lengths(asked, registry) if own is None else set()
    marks: list[list[float]] = []

    def hear(event: dict[str, Any]) -> None:
        if own is not None and event["phase"] == own.phase:
            marks.append(clock.now())
        if sink is not None:
            sink(event)
        clock.hear(event, lengths)

    events.listen(hear)
    try:
        with rehearsed(clock):
            facts = execution._done(asked, registry, store, out)
    finally:
        events.listen(sink)
    if own is not None and len(marks) > 1:
        seconds = [b - a for a, b in zip(marks[-2], marks[-1], strict=True)]
        clock.loops.append(Loop(own.phase, own.total, True, seconds[1:2]))
        clock.gain(*((own.total - PASSES) * each for each in seconds))
    return facts


def _rows(asked: int, spec: JobSpec, registry: Registry) -> int | None:
    import torch

    if asked < 0 or (asked == 0 and torch.cuda.is_available()):
        return None
    model = registry.build("models", spec.model)
    return asked or (max(1, int(GMACS / model.work.gmacs)) if offers(model, MeasuredWork) else ROWS)


def _with_stand_ins(registry: Registry, clock: Clock) -> None:
    from harness.runs.stand_ins import StandIn, stands_in

    build = registry.build

    def built(kind: str, spec: str) -> Any:
        made = build(kind, spec)
        return StandIn(made, clock.features) if kind in ("model", "models") and stands_in(made) else made

    registry.build = built  # type: ignore[method-assign]


def loops_of(method: Any) -> tuple[str, ...]:
    """The fields of a method that are lengths of its loops."""
    own = {f.name for f in fields(method) if f.init}
    named = tuple(method.loops) if offers(method, LoopedMethod) else ()
    steps = ("steps",) if offers(method, SteppedMethod) and "steps" in own else ()
    return tuple(dict.fromkeys((*steps, *(name for name in named if name in own))))


def _method(spec: JobSpec, registry: Registry) -> tuple[str, Any]:
    """(the field of the spec that names it, the method); ("", None) for a job without one."""
    if isinstance(spec, AttackSpec):
        return "attack", registry.build("attacks", spec.attack)
    if isinstance(spec, DefendSpec):
        return "defense", registry.build("defenses", spec.defense)
    return "", None


def _lengths(spec: JobSpec, registry: Registry) -> set[int]:
    _, method = _method(spec, registry)
    found = () if method is None else (getattr(method, name) for name in loops_of(method))
    return {length for length in found if isinstance(length, int) and length > PASSES}


def _cut(spec: JobSpec, registry: Registry, own: Unshortened) -> Any:
    """The spec with the fields that are as long as the loop cut to two passes."""
    from harness.registry import spec_of

    place, method = _method(spec, registry)
    names = [name for name in loops_of(method) if getattr(method, name) == own.total]
    cut: Any = replace(method, **dict.fromkeys(names, PASSES))
    return replace(spec, **{place: spec_of(cut)})


def _forget(out: Path) -> None:
    """Remove a purified model that no job of the rehearsal needs, once it was written."""
    import shutil

    from harness.runs.execution import MODEL

    shutil.rmtree(out / MODEL, ignore_errors=True)


def _figures(clock: Clock) -> dict[str, Any]:
    import torch

    from harness.diffusion import gpu

    wall = clock.time() - clock.begun
    clock.weigh()
    outer = [loop for loop in clock.loops if loop.outer and loop.seconds]
    device = gpu.peak() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {
        "seconds": [wall + ahead for ahead in clock.ahead],
        "wall_s": wall,
        "loops": [
            {"phase": loop.phase, "total": loop.total, "seconds": loop.seconds, "whole_s": loop.whole} for loop in outer
        ],
        "rows": clock.rows,
        "host_bytes": clock.peak,
        "device_bytes": device,
        "left_out_bytes": clock.left_out + clock.not_held,
    }
