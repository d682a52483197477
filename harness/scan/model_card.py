"""The model card (README.md) of what `bench purify` writes: what was done, how it is loaded, and what is not known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.judges.hub import REPOSITORY
from harness.runs.printable import printable
from harness.scan.adapter_change import LEAST_KEPT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CARD = "README.md"
SHOWN = 20  # names of a list


def write(folder: Path, facts: Mapping[str, Any], subject: str, base: str | None) -> None:
    """facts: of `bench purify --json`. subject: the name of the model that was purified. base: of an adapter, the model
    that it is for."""
    tags = ["diffusers", "purified", *(["lora"] if base else [])]
    front = {"library_name": "diffusers", "tags": tags}
    if base and re.fullmatch(REPOSITORY, base):
        front["base_model"] = base
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    lines = [
        f"# {_code(Path(subject).name)}, purified", "",
        f"`bench purify` of diffusion-defense-bench ran the defense {_code(facts['defense'])} with seed "
        f"{facts['seed']}. A backdoor may remain: scan the result, and look at its samples "
        "(`before-and-after.png`; the upper row is the model before).", "",
        f"The samples drift by {facts['drift']:.4g} (mean squared difference in [0, 1]).",
    ]  # fmt: skip
    if base:
        lines += ["", *_of_adapter(facts, base)]
    else:
        lines += ["", f"The directory {facts['loads']}."]
    if facts["stock"]:
        lines += ["", f"It was loaded with diffusers {facts['diffusers']}. Older versions were not tried."]
    (folder / CARD).write_text(f"---\n{head}\n---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _of_adapter(facts: Mapping[str, Any], base: str) -> list[str]:
    lines = [
        f"This is a low-rank adapter of {_code(base)}. `load_lora_weights` of diffusers puts it onto the untouched "
        "base.",
        "",
        "| | |",
        "|---|---|",
        f"| rank | {facts['rank']} |",
        f"| layers | {facts['layers']} |",
        f"| share of the change from the base that the rank keeps | {facts['kept']:.4f} |",
        f"| share of what the defense changed in these layers that is kept | {facts['purification']:.4f} |",
        f"| answers: distance to the purified model, in units of what the defense moved | {facts['left']:.4f} |",
    ]
    for says in facts["says"]:
        lines += ["", f"{says[0].upper()}{says[1:]}."]
    if facts["added"]:
        lines += ["", "Layers that only the defense changed:", "", *_listed(facts["added"])]
    if facts["lost"]:
        named = [f"{each['tensor']} (by {each['relative']:.2g} of its norm)" for each in facts["lost"]]
        lines += ["", "Changed by the defense, and not in the adapter:", "", *_listed(named)]
    return lines


def says(facts: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of an adapter that was written, one line each."""
    lines = []
    if facts["added"]:
        lines.append(f"{len(facts['added'])} of its layers were changed by the defense alone")
    if facts["lost"]:
        lines.append(
            f"{len(facts['lost'])} tensors that the defense changed have no place in an adapter (biases, norms, "
            "embeddings, the autoencoder), and are not in it"
        )
    if min(facts["kept"], facts["purification"]) < LEAST_KEPT:
        lines.append(
            f"rank {facts['rank']} keeps {facts['kept']:.1%} of the change from the base and "
            f"{facts['purification']:.1%} of what the defense changed: --rank gives a larger one, --whole writes the "
            "whole pipeline"
        )
    elif facts["left"] > 1 - LEAST_KEPT:
        lines.append(
            f"its answers on the base are away from the purified model's by {facts['left']:.1%} of what the defense "
            "moved: --whole writes the whole pipeline"
        )
    return lines


def _listed(names: Sequence[str]) -> list[str]:
    more = [f"- and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"- {_code(name)}" for name in names[:SHOWN]] + more


def _code(text: str) -> str:
    """A name in a code span, on one line and with nothing that could end the span."""
    return f"`{printable(text).replace('`', chr(39))}`"
