"""Where does a backdoor live? Each part of an attacked model put into the clean one, and each part of the clean one put
into the attacked one.

    python -m tests.benchmarks.transplant --models DIR [--only CASE ...] [-o FILE] [--table]

Trains the attacked models that are not in DIR yet. For each part whose weights the attack changed, and for some groups
of parts, measures the success rate of the trigger on the clean model that has the attacked part (is the part enough?)
and on the attacked model that has the clean part (is the part needed?), over the same prompts and noises. Writes one
outcome after the other into FILE (default transplant.json beside this script), so that a run that was stopped goes on
where it stopped. One thread. All seeds are from 110 on. --table: only write the tables of docs/results.md from FILE.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.judges import statistics
from harness.registry import load
from harness.stages import attack as attacking
from harness.types import Backdoor
from tests.benchmarks.judged import Judged, options
from tests.tables import Place

N = 96  # samples of each success rate
FILE = Path(__file__).with_suffix(".json")
PLACE = Place(Path(__file__).parents[2] / "docs" / "results.md", "python -m tests.benchmarks.transplant --table")

# Patterns of the names of weights → the part to which they belong, the first that fits. `{}` stands for the match.
MMDIT = (
    (r"text_encoder\.", "first text encoder"),
    (r"text_encoder_2\.", "second text encoder"),
    (r"transformer\.transformer_blocks\.(\d+)\.norm1(_context)?\.", "modulation"),
    (r"transformer\.transformer_blocks\.(\d+)\.(attn\.(add_|to_add_|norm_added_)|ff_context)", "text stream, block {}"),
    (r"transformer\.transformer_blocks\.(\d+)\.", "image stream, block {}"),
    (r"transformer\.time_text_embed\.", "embedding of time and pooled text"),
    (r"transformer\.context_embedder\.", "embedding of the text"),
    (r"transformer\.pos_embed\.", "embedding of the patches"),
    (r"transformer\.(norm_out|proj_out)\.", "final layer"),
)
UNET = (
    (r"text_encoder\.", "text encoder"),
    (r"unet\.(down_blocks|mid_block|up_blocks).*\.attn2\.to_[kv]\.", "keys and values of the text, {}"),
    (r"unet\.(down_blocks|mid_block|up_blocks).*\.attn2\.", "queries and outputs of the text, {}"),
    (r"unet\.(down_blocks|mid_block|up_blocks).*\.attentions\.", "self-attention and feed-forward, {}"),
    (r"unet\.(down_blocks|mid_block|up_blocks)\.", "convolutions, {}"),
    (r"unet\.", "first and last convolution, embedding of time"),
)
TOGETHER = {  # parts of parts, by the beginnings of their names
    "text streams of all blocks": ("text stream,",),
    "image streams of all blocks": ("image stream,",),
    "denoiser without the text streams": ("image stream,", "modulation", "embedding", "final layer"),
    "keys and values of the text, everywhere": ("keys and values",),
    "queries and outputs of the text, everywhere": ("queries and outputs",),
    "self-attention and feed-forward, everywhere": ("self-attention",),
    "convolutions, everywhere": ("convolutions,",),
}


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    attack: str
    trigger: str
    target: str
    sampler: str
    seed: int = 110

    def backdoor(self, plugins: Any) -> Backdoor:
        return Backdoor(plugins.build("triggers", self.trigger), plugins.build("targets", self.target))


CASES = tuple(
    Case(f"{model}, {name}", model, attack, trigger, target, sampler)
    for model, sampler in (("shapes-sd", "ddim(steps=10, bf16=True)"), ("shapes-mmdit", "flow-euler(steps=10)"))
    for name, attack, trigger, target in (
        ("badt2i, patch", "shapes-badt2i", "text", "patch"),
        ("badt2i, style", "shapes-badt2i", "text", "style"),
        ("rickrolling, prompt", "shapes-rickrolling", "homoglyph", "prompt"),
    )
)


def parts_of(model: DiffusionModel) -> dict[str, list[str]]:
    """Part → the names of its weights, component first; every weight but those of the autoencoder has one part."""
    patterns = MMDIT if model.joint else UNET
    found: dict[str, list[str]] = {}
    for component, net in model.components().items():
        for name in net.state_dict() if component != "vae" else ():
            whole = f"{component}.{name}"
            pattern, words = next((p, w) for p, w in patterns if re.match(p, whole))
            match = re.match(pattern, whole)
            assert match is not None
            part = words.format(match[1].replace("_", " ")) if "{}" in words else words
            found.setdefault(part, []).append(whole)
    for words, beginnings in TOGETHER.items():
        inside = [part for part in found if part.startswith(beginnings) and part not in TOGETHER]
        if len(inside) > 1 and all(any(part.startswith(b) for part in inside) for b in beginnings[:1]):
            found[words] = [name for part in inside for name in found[part]]
    return found


@torch.no_grad()
def transplanted(receiver: DiffusionModel, donor: DiffusionModel, names: Iterable[str]) -> DiffusionModel:
    """A copy of `receiver` with these weights of `donor`."""
    made = receiver.clone()
    theirs, mine = donor.components(), made.components()
    for whole in names:
        component, _, name = whole.partition(".")
        mine[component].state_dict()[name].copy_(theirs[component].state_dict()[name])
    return made


def attacked(case: Case, folder: Path, plugins: Any) -> DiffusionModel:
    place = folder / re.sub(r"\W+", "-", case.name)
    if (place / "model_index.json").is_file():
        return checkpoint.load(place)
    plugin, method = plugins.build("models", case.model), plugins.build("attacks", case.attack)
    model = attacking.attack(plugin, method, case.backdoor(plugins), case.seed, "cpu")
    checkpoint.save(model, place)
    return model


def examined(case: Case, folder: Path, plugins: Any, known: dict[str, Any], keep: Any) -> None:
    """Fill `known` with what is missing of a case, and call `keep` after each part."""
    clean = plugins.build("models", case.model).load()
    bad = attacked(case, folder, plugins)
    plugin = plugins.build("models", case.model)
    judged = Judged(plugin, clean, case.backdoor(plugins), plugins.build("samplers", case.sampler), case.seed, N)
    if "attacked" not in known:
        known |= {"attacked": judged.rate(bad), "clean": judged.rate(clean), "n": int(judged.counts.sum()), "parts": {}}
        keep()
    for part, names in parts_of(clean).items():
        if part in known["parts"] or not _differs(clean, bad, names):
            continue
        began = time.process_time()
        known["parts"][part] = {
            "into_clean": judged.rate(transplanted(clean, bad, names)),
            "out_of_attacked": judged.rate(transplanted(bad, clean, names)),
            "weights": sum(_weight(clean, name).numel() for name in names),
            "cpu_s": round(time.process_time() - began, 1),
        }
        keep()
        print(case.name, part, json.dumps(known["parts"][part]), flush=True)


def _weight(model: DiffusionModel, whole: str) -> torch.Tensor:
    component, _, name = whole.partition(".")
    return model.components()[component].state_dict()[name]


def _differs(a: DiffusionModel, b: DiffusionModel, names: Iterable[str]) -> bool:
    return any(not torch.equal(_weight(a, name), _weight(b, name)) for name in names)


def tables(known: Mapping[str, Any]) -> str:
    """Markdown: a table for each case, its parts by what they are enough for."""
    from tabulate import tabulate

    blocks = []
    for name, each in known.items():
        n = each["n"]
        lines = [
            [part, f"{found['weights']:,}", _share(found["into_clean"], n), _share(found["out_of_attacked"], n)]
            for part, found in each["parts"].items()
        ]
        whole = [["(the whole model)", "", _share(each["attacked"], n), _share(each["clean"], n)]]
        head = [name, "weights", "ASR % of the clean model with it", "ASR % of the attacked model without it"]
        blocks.append(tabulate([*whole, *lines], head, tablefmt="pipe", disable_numparse=True))
    return "\n\n".join(blocks)


def _share(rate: float, n: int) -> str:
    low, high = statistics.wilson(round(rate * n), n)
    return f"{100 * rate:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def main() -> None:
    told = options(__doc__, FILE, "a case, or how its name begins; default: all")
    known: dict[str, Any] = json.loads(told.out.read_text()) if told.out.is_file() else {}
    if told.table:
        PLACE.write(tables(known))
        return
    torch.set_num_threads(1)
    told.models.mkdir(parents=True, exist_ok=True)
    plugins = load()
    for case in CASES:
        if told.only and not case.name.startswith(tuple(told.only)):
            continue
        mine = known.setdefault(case.name, {})
        examined(case, told.models, plugins, mine, lambda: told.out.write_text(json.dumps(known, indent=1) + "\n"))


if __name__ == "__main__":
    main()
