"""What one GPU does in a second: ours, beside a re-implementation of the official scripts. No test.

    python -m tests.benchmarks.gpu -o FILE [--part badt2i ...] [--limit 110] [--device cuda] [--tiny]

Weights are random and data are made, except in side-by-side, which starts from the weights and the data of
digits-ddpm. Ours run with the settings of a job (deterministic algorithms where torch
has them), the scripts' ways without. Parts:

badt2i: seconds per optimizer step at the size of Stable Diffusion 1.5, 512 pixels, 4 examples of two rows, which is
what one card of the official runs takes. script: zhaisf/BadT2I's badt2i_pixel.py with the options of its
scripts_Pixel.sh. One example at a time in fp32, accumulated; images encoded in the step; activations computed again;
the loss read for each example; a moving average of the weights. script, fp16: the same under autocast, as BackdoorDM.
skd-cag: seconds per step of one prompt, maps of side 128. script: fp32, attention by softmax and products, the loss
read in each step, a moving average of the weights. The gradient is clipped as in ours; the official code clips none.
ddpm: images per second at the size of ddpm-cifar10 under DDPM-1000. A stretch of the steps is run, and the time of the
call is extrapolated with its fixed costs. script: diffusers' pipeline as IBM/BadDiffusion uses it, batches of 256, the
noise of the steps drawn on the card. Ours draws its first noise within the clock, the script before it. ours, channels
last and ours, bf16: the same with that layout and under autocast. side-by-side: training steps per second of 16 models
of digits-ddpm's size: one training after another, and all in one process, where each is a CUDA graph on a stream of its
own if there is a card.

seconds or rate: the median, the least and the most of the repetitions after a warm-up. peak_bytes: the most that torch
allocated on the card. losses: of the first steps. difference: the largest between images of both ways from the same
noise. Each row is written when it is known. A part that takes longer than --limit seconds ends with an error in its
row; the default of four parts is less than 8 minutes. With --tiny networks, images and numbers are
small.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from harness.diffusion import events
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDPM
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import Batch, Examples, denoising_loss, draw, minimize
from harness.methods import distillation
from harness.methods.attention_guidance import Guidance
from harness.runs import stand_ins
from harness.types import Backdoor, Data, Inputs, Knowledge
from plugins.attacks import badt2i
from plugins.attacks.badt2i import BadT2I
from plugins.defenses.skd_cag import SKDCAG
from plugins.targets.patch import Patch
from plugins.triggers.text import Text

Row = dict[str, Any]
SEED, KEPT_LOSSES = 0, 3
SCRIPT_BATCH, SCRIPT_EMA = 256, 0.9999
TRIGGER = Text()


@dataclass(frozen=True)
class Size:
    """What is measured. window: steps of one repetition. stretch: steps of DDPM-1000 that are run. images: sampled by
    ours. trained: models side by side. full: whether the networks have the papers' sizes."""

    full: bool
    pixels: int = 512
    examples: int = 4
    map_side: int = 128
    window: int = 2
    windows: int = 4
    stretch: int = 10
    images: int = 1000
    trained: int = 16
    rows: int = 64
    steps: int = 20
    repetitions: int = 4


FULL = Size(True)
TINY = Size(
    False, pixels=32, examples=2, map_side=16, window=1, windows=2, stretch=3, images=4, trained=3, rows=4, steps=3,
    repetitions=2,
)  # fmt: skip


# ---- clocks, settings, models ---------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Windows:
    """Seconds per step, by windows of `length` steps; what precedes the end of the first window is a warm-up."""

    def __init__(self, device: torch.device, length: int) -> None:
        self.device, self.length, self.marks = device, length, list[float]()

    def done(self, steps: int) -> None:
        if steps % self.length == 0:
            wait(self.device)
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [(b - a) / self.length for a, b in itertools.pairwise(self.marks)]

    @contextmanager
    def heard(self, phase: str) -> Iterator[None]:
        """Count the steps of a training by its events."""
        before = events.listener()
        events.listen(lambda event: self.done(event["step"]) if event["phase"] == phase else None)
        try:
            yield
        finally:
            events.listen(before)


@contextmanager
def job_settings(ours: bool) -> Iterator[None]:
    """Torch's settings as in a job on a GPU, or its own."""
    fills: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(ours, warn_only=True)
    fills.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fills.fill_uninitialized_memory = filled


def spread(name: str, values: Sequence[float]) -> Row:
    """The median of the repetitions, the least and the most."""
    return {name: statistics.median(values), "least": min(values), "most": max(values), "repetitions": len(values)}


def sd(size: Size, device: torch.device, folder: Path) -> DiffusionModel:
    """A text-to-image model with random weights."""
    if not size.full:
        from tests.oracles import tiny_sd

        return tiny_sd(folder).to(device)
    from plugins.models.sd_v1_4 import StableDiffusion14

    return made(StableDiffusion14.architecture, device, stand_ins.tokenizer)


def made(architecture: Any, device: torch.device, tokens: Any = None) -> DiffusionModel:
    """The model of an architecture, its weights drawn on the device."""
    from harness.models.architectures import untrained

    with torch.device(device):
        drawn = untrained(architecture, None if tokens is None else lambda n: tokens((TRIGGER.text,), n))
    scheduler = type(drawn.scheduler).from_config(drawn.scheduler.config)  # on the host, where samplers look things up
    parts = drawn.vae, drawn.text_encoder, drawn.tokenizer
    return DiffusionModel(drawn.denoiser, scheduler, *parts).to(device)


def ddpm(size: Size, device: torch.device) -> DiffusionModel:
    """An unconditional model with random weights."""
    if not size.full:
        from tests.oracles import tiny_unet

        return tiny_unet().to(device)
    from plugins.models.ddpm_cifar10 import DDPMCifar10

    return made(DDPMCifar10.architecture, device)


def captioned(size: Size) -> Data:
    n = 2 * size.examples
    texts = (
        stand_ins.captions() if size.full else [f"a photo of a red {form}" for form in ("square", "circle", "cross")]
    )
    return Data(stand_ins.images(n, size.pixels, SEED), tuple(itertools.islice(itertools.cycle(texts), n)))


def channels_last(model: DiffusionModel) -> DiffusionModel:
    model = model.clone()
    model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@contextmanager
def noted(module: Any) -> Iterator[list[float]]:
    """The losses of the trainings that a module starts."""
    losses: list[float] = []

    def noting(*args: Any, **options: Any) -> list[float]:
        losses.extend(found := minimize(*args, **options))
        return found

    with patch.object(module, "minimize", noting):
        yield losses


class Average:
    """The moving average of the scripts, without their decay's fault, which costs no time."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params, self.kept = params, [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for kept, p in zip(self.kept, self.params, strict=True):
            kept.sub_((1 - SCRIPT_EMA) * (kept - p))


# ---- badt2i ---------------------------------------------------------------------------------------------------------


def ours_badt2i(model: DiffusionModel, data: Data, size: Size, bf16: bool) -> Row:
    clock = Windows(model.device, size.window)
    steps = size.window * (size.windows + 1)
    attack = BadT2I(steps=steps, batch=size.examples, lr=1e-5, bf16=bf16)
    with noted(badt2i) as losses, clock.heard("implant"):
        attack.implant(model, Backdoor(TRIGGER, Patch()), data, generator(SEED, "attack"))
    return {**spread("seconds", clock.seconds()), "losses": losses[:KEPT_LOSSES]}


def script_badt2i(model: DiffusionModel, data: Data, size: Size, fp16: bool) -> Row:
    """L of badt2i, example by example. Rows, t and ε are those of ours, and latents are means, so losses compare."""
    clean, model = model, model.clone()
    device, n, spec = model.device, size.examples, BadT2I()
    model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    params = [p.requires_grad_(True) for p in model.denoiser.parameters()]
    optimizer, average = torch.optim.AdamW(params, lr=1e-5, weight_decay=0.01), Average(params)
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    lessons, _ = badt2i.taught(Patch(), data, spec.examples)
    rng, sources = generator(SEED, "attack"), [Examples(model, each) for each in (lessons, data)]
    clock, losses = Windows(device, size.window), list[float]()
    for step in range(size.window * (size.windows + 1)):
        bad, plain = (source.batch(n, rng) for source in sources)
        assert bad.captions is not None and plain.captions is not None
        total = 0.0
        for i in range(n):
            images = torch.stack([lessons.images[bad.rows[i]], data.images[plain.rows[i]]])
            x_0 = model.encode(images.to(device))
            t, eps = torch.stack([bad.t[i], plain.t[i]]), torch.stack([bad.eps[i], plain.eps[i]])
            context = model.embed([TRIGGER.apply(bad.captions[i]), plain.captions[i]])
            with torch.autocast(device.type, torch.float16, enabled=fp16):
                z_t = model.add_noise(x_0, eps, t)
                out = model.eps(z_t, t, context)
                with torch.no_grad():
                    kept = clean.eps(z_t[1:], t[1:], context[1:])
            first, second = (out[:1] - eps[:1]).square().mean(), (out[1:] - kept).square().mean()
            loss = spec.lam * first + (1 - spec.lam) * second
            total += loss.item() / n
            scaler.scale(loss / n).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.step()
        losses.append(total)
        clock.done(step + 1)
    return {**spread("seconds", clock.seconds()), "losses": losses[:KEPT_LOSSES]}


def measure_badt2i(size: Size, device: torch.device, folder: Path) -> Iterable[tuple[str, bool, Callable[[], Row]]]:
    model, data = sd(size, device, folder), captioned(size)
    yield "ours", True, partial(ours_badt2i, model, data, size, True)
    yield "script", False, partial(script_badt2i, model, data, size, False)
    if device.type == "cuda":
        yield "script, fp16", False, partial(script_badt2i, model, data, size, True)
        yield "ours, channels last", True, lambda: ours_badt2i(channels_last(model), data, size, True)
    else:
        yield "ours, fp32", True, partial(ours_badt2i, model, data, size, False)


# ---- skd-cag --------------------------------------------------------------------------------------------------------


def guided(size: Size, bf16: bool) -> SKDCAG:
    return SKDCAG(steps=size.window * (size.windows + 1), batch=1, side=size.map_side, bf16=bf16)


def ours_skd_cag(model: DiffusionModel, prompts: Sequence[str], size: Size, bf16: bool) -> Row:
    clock = Windows(model.device, size.window)
    with noted(distillation) as losses, clock.heard("distil"):
        guided(size, bf16).defend(model, Knowledge(trigger=TRIGGER, prompts=tuple(prompts)), generator(SEED, "defend"))
    return {**spread("seconds", clock.seconds()), "losses": losses[:KEPT_LOSSES]}


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **unused: Any,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention whose probabilities are in memory."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


def script_skd_cag(model: DiffusionModel, prompts: Sequence[str], size: Size) -> Row:
    """L of skd-cag; prompts, latents and t are those of ours."""
    spec, rng = guided(size, False), generator(SEED, "defend")
    clock, losses, chosen = Windows(model.device, size.window), list[float](), list(prompts)
    triggered = [TRIGGER.apply(prompt) for prompt in chosen]
    with patch.object(nn.functional, "scaled_dot_product_attention", softmax_attention):
        source = distillation.LatentSource(spec.latents, model, chosen, triggered, rng.initial_seed())
        guide, student = Guidance(spec, model, chosen, TRIGGER.apply, None, rng), model.clone()
        params = [p.requires_grad_(True) for p in student.denoiser.parameters()]
        optimizer, average = torch.optim.AdamW(params, lr=spec.lr, weight_decay=0.01), Average(params)
        for step in range(spec.steps):
            rows = draw(1, len(chosen), rng)
            attn, prediction = guide.losses(student, rows, *source.draw(rows, rng))
            loss = spec.alpha * attn + (1 - spec.alpha) * prediction
            losses.append(loss.item())
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step()
            clock.done(step + 1)
    return {**spread("seconds", clock.seconds()), "losses": losses[:KEPT_LOSSES]}


def measure_skd_cag(size: Size, device: torch.device, folder: Path) -> Iterable[tuple[str, bool, Callable[[], Row]]]:
    model, prompts = sd(size, device, folder), captioned(size).captions or ()
    yield "ours", True, partial(ours_skd_cag, model, prompts, size, True)
    yield "script", False, partial(script_skd_cag, model, prompts, size)
    if device.type != "cuda":
        yield "ours, fp32", True, partial(ours_skd_cag, model, prompts, size, False)


# ---- ddpm -----------------------------------------------------------------------------------------------------------


@contextmanager
def stretched(stretch: int) -> Iterator[None]:
    """Samplers take their first `stretch` steps alone."""
    events.shorten(lambda phase, items, total: itertools.islice(items, stretch) if phase == "sampling" else items)
    try:
        yield
    finally:
        events.shorten(None)


def ours_ddpm(model: DiffusionModel, n: int, stretch: int, bf16: bool = False) -> Tensor:
    seeds = image_seeds(SEED, "images", n)
    with stretched(stretch):
        return model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), DDPM(bf16=bf16))


@torch.no_grad()
def script_ddpm(model: DiffusionModel, noise: Tensor, stretch: int, rngs: Any) -> Tensor:
    """The loop of diffusers' DDPMPipeline. rngs: a generator on the device, or one on the host for each image."""
    scheduler: Any = DDPM().scheduler(model.scheduler.config)
    x_t, denoiser = noise.to(model.device), model.denoiser
    for t in scheduler.timesteps[:stretch]:
        x_t = scheduler.step(denoiser(x_t, t).sample, t, x_t, generator=rngs).prev_sample
    return x_t.clamp(-1, 1).cpu()


def rate(images: Callable[[], Tensor], size: Size, device: torch.device) -> Row:
    """Images per second, extrapolated from the stretch to the 1000 steps."""
    images()
    rates = []
    for _ in range(size.repetitions):
        wait(device)
        began = time.perf_counter()
        n = len(images())
        rates.append(n / (time.perf_counter() - began) * size.stretch / 1000)
    return {**spread("images_per_s", rates), "images": n, "extrapolated_from_steps": size.stretch}


def measure_ddpm(size: Size, device: torch.device, folder: Path) -> Iterable[tuple[str, bool, Callable[[], Row]]]:
    model = ddpm(size, device)
    batch = min(SCRIPT_BATCH, size.images)
    noise = image_noise(image_seeds(SEED, "images", batch), model.shape)

    def script() -> Row:
        on_card = torch.Generator(device).manual_seed(SEED)
        found = rate(lambda: script_ddpm(model, noise, size.stretch, on_card), size, device)
        few = [generator(seed, "steps") for seed in image_seeds(SEED, "images", 4)]
        apart = script_ddpm(model, noise[:4], size.stretch, few) - ours_ddpm(model, 4, size.stretch)
        return {**found, "difference": apart.abs().max().item()}

    yield "ours", True, lambda: rate(lambda: ours_ddpm(model, size.images, size.stretch), size, device)
    yield "script", False, script
    if device.type == "cuda":
        last = channels_last(model)
        yield (
            "ours, channels last",
            True,
            lambda: rate(lambda: ours_ddpm(last, size.images, size.stretch), size, device),
        )
        yield "ours, bf16", True, lambda: rate(lambda: ours_ddpm(model, size.images, size.stretch, True), size, device)


# ---- side by side ---------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """One of the trainings that run side by side: on a card a CUDA graph of a step, on a stream of its own."""

    model: DiffusionModel
    examples: Examples
    rng: torch.Generator
    rows: int
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [p.requires_grad_(True) for p in self.model.denoiser.parameters()]
        on_card = self.model.device.type == "cuda"
        options: Any = {"fused": True, "capturable": True} if on_card else {}
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, **options)
        self.batch = self.drawn()
        self.graph = self.stream = None
        if on_card:
            self.capture()

    def drawn(self) -> Batch:
        return self.examples.batch(self.rows, self.rng)

    def compute(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = denoising_loss(self.model, self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        return loss.detach()

    def capture(self) -> None:
        """Steps to warm up, which are undone, and the graph."""
        before = [p.detach().clone() for p in self.params]
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self.compute()
        with torch.no_grad():
            for p, value in zip(self.params, before, strict=True):
                p.copy_(value)
                for moment in self.optimizer.state[p].values():
                    moment.zero_()
        torch.cuda.synchronize()

    def step(self, first: bool) -> None:
        if self.graph is None:
            self.batch = self.batch if first else self.drawn()
            self.losses.append(self.compute())
            return
        with torch.cuda.stream(self.stream):
            if not first:
                fresh = self.drawn()
                for name in ("x_0", "t", "eps"):
                    getattr(self.batch, name).copy_(getattr(fresh, name))
            self.graph.replay()
            self.losses.append(self.loss.clone())


def digits_model(size: Size, device: torch.device) -> tuple[DiffusionModel, Data]:
    if not size.full:
        from tests.oracles import tiny_unet

        return tiny_unet().to(device), Data(stand_ins.images(16, 16, SEED)[:, :1])
    from plugins.models.digits_ddpm import DigitsDDPM

    plugin = DigitsDDPM()
    return plugin.load().to(device), plugin.data()


def one_after_another(model: DiffusionModel, data: Data, size: Size) -> Row:
    def trained(seed: int) -> list[float]:
        copied, rng = model.clone(), generator(seed, "train")
        examples = Examples(copied, data)
        loss = partial(lambda: denoising_loss(copied, examples.batch(size.rows, rng)))
        return minimize(loss, copied.denoiser.parameters(), steps=size.steps, lr=1e-4)

    trained(0)
    rates, losses = [], list[list[float]]()
    for _ in range(size.repetitions):
        began = time.perf_counter()
        losses = [trained(seed) for seed in range(size.trained)]
        wait(model.device)
        rates.append(size.trained * size.steps / (time.perf_counter() - began))
    return {**spread("steps_per_s", rates), "losses": [each[:KEPT_LOSSES] for each in losses]}


def side_by_side(model: DiffusionModel, data: Data, size: Size) -> Row:
    """The rate is of the steps; making the models and graphs is in setup_s."""
    began = time.perf_counter()
    examples = Examples(model, data)
    every = [Trained(model.clone(), examples, generator(i, "train"), size.rows) for i in range(size.trained)]
    setup, rates = time.perf_counter() - began, []
    for repetition in range(size.repetitions + 1):
        wait(model.device)
        began = time.perf_counter()
        for step in range(size.steps):
            for each in every:
                each.step(first=repetition == step == 0)
        wait(model.device)
        rates.append(size.trained * size.steps / (time.perf_counter() - began))
    losses = [[value.item() for value in each.losses[:KEPT_LOSSES]] for each in every]
    return {**spread("steps_per_s", rates[1:]), "setup_s": setup, "losses": losses}


def measure_side_by_side(
    size: Size, device: torch.device, folder: Path
) -> Iterable[tuple[str, bool, Callable[[], Row]]]:  # fmt: skip
    model, data = digits_model(size, device)
    yield "one after another", True, partial(one_after_another, model, data, size)
    yield "side by side", True, partial(side_by_side, model, data, size)


# ---- all of them ----------------------------------------------------------------------------------------------------

PARTS = {"badt2i": measure_badt2i, "skd-cag": measure_skd_cag, "ddpm": measure_ddpm,
         "side-by-side": measure_side_by_side}  # fmt: skip


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds, and each second from then on: what is raised while an object is
    finalised is lost."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than the {seconds:g} s of a part")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(device: torch.device) -> Row:
    import diffusers

    card: Row = {}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        card = {
            "card": facts.name, "card_bytes": facts.total_memory, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return {
        "device": device.type, **card, "python": platform.python_version(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "processors": os.cpu_count(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def measured(part: str, size: Size, device: torch.device, seconds: float) -> Iterator[Row]:
    """The rows of a part. What fails is a row with its error; what is late ends the part."""
    way = "set-up"
    began = time.perf_counter()
    try:
        with ExitStack() as stack:
            stack.enter_context(limit(seconds))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for way, ours, run in PARTS[part](size, device, folder):
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                with job_settings(ours):
                    found = tried(run)
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                yield {"part": part, "way": way, **found, "peak_bytes": peak}
    except Exception as error:
        yield {"part": part, "way": way, **failed(error), "after_s": round(time.perf_counter() - began, 1)}


def tried(run: Callable[[], Row]) -> Row:
    """What a way gives; its error, such as too little memory, leaves the other ways of the part."""
    try:
        return run()
    except TimeoutError:
        raise
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"}


def main(arguments: Sequence[str] | None = None) -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-o", "--out", type=Path)
    words.add_argument("--part", action="append", choices=PARTS)
    words.add_argument("--limit", type=float, default=110.0, help="seconds of a part")
    words.add_argument("--device", default="cuda")
    words.add_argument("--tiny", action="store_true")
    told = words.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in a job
    if told.device == "cuda" and not torch.cuda.is_available():
        words.error("torch sees no GPU here; --device cpu --tiny shows what the benchmark writes")
    device, size = torch.device(told.device), TINY if told.tiny else FULL
    found: Row = {"machine": machine(device), "tiny": told.tiny, "rows": []}
    for part in told.part or PARTS:
        for row in measured(part, size, device, told.limit):
            print(json.dumps(row), flush=True)
            found["rows"].append(row)
            if told.out is not None:
                told.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
