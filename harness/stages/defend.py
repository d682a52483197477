"""Runs a defense on a model, and evaluates its screen on clean and triggered inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.capabilities import delivers
from harness.diffusion.events import progress
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.diffusion.training import prepared
from harness.stages.findings import Findings, stored
from harness.stages.inputs import evaluation_inputs
from harness.stages.knowledge import declared
from harness.stages.sample import stamped as with_trigger
from harness.types import DELIVERS, Defended, Defense, Inputs, Knowledge, Model, Trigger

SCREEN_BATCH = 50


@dataclass(frozen=True)
class Screening:
    """The inputs on which a screen is evaluated: n clean ones and n with the trigger, drawn by `evaluation_seed`."""

    trigger: Trigger
    n: int
    evaluation_seed: int = 0


def defend(
    plugin: Model,
    model: DiffusionModel,
    defense: Defense,
    knowledge: Knowledge,
    seed: int,
    screening: Screening | None,
    spec_of: Callable[[Any], str | None],
) -> tuple[DiffusionModel | None, Findings, dict[str, float]]:
    """(the purified model on the CPU, the findings of the defense, facts about the work).

    spec_of: returns the spec of a sampler that the defense returned. Raises UndeclaredKnowledge for a defense that
    fails on knowledge that it does not declare.
    """
    screened, facts = {}, {}
    with declared(defense, knowledge) as mine:
        done = defense.defend(prepared(plugin, model), mine, generator(seed, "defense"))
        check_delivered(defense, done)
        if done.screen is not None and screening is not None:
            wall, cpu = time.monotonic(), time.process_time()
            screened = screen(plugin, model, done.screen, screening, seed)
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            facts |= {"screen_s": wall / (2 * screening.n), "screening_wall_s": wall, "screening_cpu_s": cpu}
    findings = Findings(
        done.suspicion, done.flag_above, dict(done.features or {}), stored(done.trigger), dict(done.notes),
        spec_of(done.sampler), done.screen_above, screened,
    )  # fmt: skip
    return None if done.model is None else done.model.to("cpu"), findings, facts


def check_delivered(defense: Defense, done: Defended) -> None:
    """Raises unless a defense returns what its class declares, and a suspicion if it declares one."""
    for part in DELIVERS:
        if getattr(done, part) is not None and part not in delivers(defense):
            raise ValueError(
                f"defense '{defense.name}' delivers a {part} but does not declare it: delivers = {delivers(defense)}"
            )
    for part in ("suspicion", "screen"):
        if part in delivers(defense) and getattr(done, part) is None:
            raise ValueError(f"defense '{defense.name}' declares a {part} but delivered none")
    if done.suspicion is not None and not math.isfinite(done.suspicion):
        raise ArithmeticError(f"the suspicion of defense '{defense.name}' is {done.suspicion}")


def screen(
    plugin: Model, model: DiffusionModel, ask: Callable[[Inputs], Tensor], screening: Screening, seed: int
) -> dict[str, list[float]]:
    """The screen's scores of n clean and of n other, triggered evaluation inputs, which it gets shuffled together.

    No two inputs share noise or seed, so that only the trigger distinguishes them. Prompts in which the trigger has no
    place are left out, together with their counterparts in the other half. Raises ValueError if none is left.
    """
    n, trigger = screening.n, screening.trigger
    inputs = evaluation_inputs(plugin, model, 2 * n, screening.evaluation_seed)
    if trigger.modality == "text":
        model.check_trigger(trigger, inputs.prompts or ())
    stamped = with_trigger(trigger, inputs)
    pairs = range(n)
    if inputs.prompts is not None and stamped.prompts is not None:
        able = [plain != other for plain, other in zip(inputs.prompts, stamped.prompts, strict=True)]
        pairs = [i for i in pairs if able[i] and able[n + i]]
        if not pairs:
            raise ValueError(f"the trigger has a place in too few of {2 * n} prompts to screen any; use a larger n")
    order = torch.randperm(2 * n, generator=generator(seed, "screen")).tolist()
    scores: dict[int, float] = {}
    for start in range(0, 2 * n, SCREEN_BATCH):
        rows = order[start : start + SCREEN_BATCH]
        clean, other = inputs.pick(rows), stamped.pick(rows)
        noise = torch.stack([(clean if i < n else other).noise[k] for k, i in enumerate(rows)])
        mixed = clean.with_noise(noise.to(model.device))
        if clean.prompts is not None and other.prompts is not None:
            mixed = mixed.with_prompts([clean.prompts[k] if i < n else other.prompts[k] for k, i in enumerate(rows)])
        answer = torch.as_tensor(ask(mixed)).double().cpu()
        if answer.shape != (len(rows),) or not torch.isfinite(answer).all():
            raise ArithmeticError(f"the screen gave {tuple(answer.shape)} scores, not {len(rows)} finite ones")
        scores |= zip(rows, answer.tolist(), strict=True)
        progress("screen", start + len(rows), 2 * n)
    return {"clean": [scores[i] for i in pairs], "triggered": [scores[n + i] for i in pairs]}
