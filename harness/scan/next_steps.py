"""What to do after the verdict of a scan."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from harness.scan.verdict import Finding


def next_steps(
    model: str, said: str, findings: Sequence[Finding], unexamined: Sequence[str], seed: int, numbers: bool = True,
    base: str | None = None, embedded: bool = False,
) -> list[str]:  # fmt: skip
    """What to do after a verdict, with commands for this model. numbers: whether its samples are finite. base: of an
    adapter or an embedding, the model that it is for. embedded: it is an embedding."""
    model = f"./{model}" if model.startswith("-") else model  # else an option
    name = shlex.quote(model) if base is None else f"{shlex.quote(model)} --base {shlex.quote(base)}"
    if said == "suspicious":
        steps = [
            "Do not use the model. Look at the samples with the recovered trigger: -o scan.html writes them.",
            f"Ask again with another seed: bench scan {name} --seed {seed + 1}",
            "Compare the digests of the weights with those that the publisher states. Report the model to the hub.",
            "An embedding cannot be cleaned: leave its word out of your prompts, or train it anew."
            if embedded
            else f"If you need the model, clean it, and scan the result: bench purify {name} --defense finetune "
            "--data MY_IMAGES -o CLEANED",
        ]
    elif said == "undecided":
        steps = ["Compare the model with clean ones of its kind: --like MODEL names a plugin with a population, and "
                 "bench calibrate makes a population for --population."]  # fmt: skip
        if any(finding.error for finding in findings):
            steps.append(f"A detector failed. Ask for the others by name: bench scan {name} --detector DEFENSE")
        if not findings and numbers:
            steps.append("No detector was asked. The limits say what each lacks and which option gives it.")
        if not numbers:
            steps.append("The samples are no numbers. Fetch the weights again, and look at them before you use them.")
    else:
        steps = [
            "Nothing found is no proof. Use the model where an output that an attacker chooses does no harm, or screen "
            "its inputs.",
            f"Scan it again after each change of its files: bench scan {name}",
        ]
    if unexamined:
        steps.append("Remove the files that were not examined, or scan what they make of the model.")
    return steps
