"""The drawings of `bench analyse` as a folder: index.html, analysis.json, pictures and charts beside it. It needs no
network and no script; every text in it is escaped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.runs.jsonable import to_jsonable
from leaderboard import charts
from leaderboard.rendering import asset, environment, policy
from leaderboard.results import ResultsError, write_text

if TYPE_CHECKING:
    from PIL import Image

    from harness.stages.analyse import Analysis, Attended, Neurons, Norms

DATA, PAGE = "analysis.json", "index.html"
MODELS = ("clean", "attacked", "defended")
TOKEN = 72  # side of a drawn map
FIELD = (24, 5)  # width and height of a drawn field of layers × steps
TOP = 12  # layers with the largest change that the page names


@dataclass(frozen=True)
class Picture:
    """file: beside the page."""

    file: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """The maps of a prompt in one model, one a token."""

    model: str
    prompt: str
    tokens: Sequence[str]
    spread: float
    picture: Picture


@dataclass(frozen=True)
class Histogram:
    layer: str
    channel: int
    removed: float
    plain: float
    chart: str


def write(analysis: Analysis, cell: Mapping[str, Any], out: Path) -> list[str]:
    """Write the folder, and return the names of its files. cell: facts of the cell, its record's key as `key`. Figures
    of an earlier analysis are removed. Raises ResultsError for a folder that holds something else."""
    if out.is_dir() and any(out.iterdir()) and not (out / DATA).is_file():
        raise ResultsError(f"{out}: holds files of another kind; name a new folder, or one that bench analyse wrote")
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.png"), *out.glob("*.svg")]:
        old.unlink()
    data = {"format": 1, "cell": dict(cell), **to_jsonable(asdict(analysis))}
    write_text(out / DATA, json.dumps(data, ensure_ascii=False, sort_keys=True) + "\n")
    figures: list[tuple[str, str]] = []
    heat = [_heat(name, analysis.norms[name], out) for name in MODELS if name in analysis.norms]
    strips = [_strip(name, i, each, out) for name in MODELS for i, each in enumerate(analysis.attended.get(name, ()))]
    curve = _changes(analysis.norms)
    figures.append(("changes.svg", curve))
    histograms = [] if analysis.neurons is None else [_histogram(neuron) for neuron in analysis.neurons.most]
    figures += [(f"neuron-{i}.svg", each.chart) for i, each in enumerate(histograms)]
    if analysis.neurons is not None:
        figures.append(("neurons.svg", _ranked(analysis.neurons)))
    for file, drawn in figures:
        write_text(out / file, drawn)
    style = asset("page.css")
    page = environment().get_template("analysis.html.jinja").render(
        cell=cell, analysis=analysis, heat=heat, strips=strips, histograms=histograms, root="", styles=[style],
        policy=policy([style], []), changed=_changed(analysis.norms), missing=sorted(analysis.missing.items()),
        size=(charts.WIDTH, charts.HEIGHT),
    )  # fmt: skip
    write_text(out / PAGE, page)
    pictures = [*heat, *(strip.picture for strip in strips)]
    return [PAGE, DATA, *(file for file, _ in figures), *(picture.file for picture in pictures)]


def found(folder: Path) -> dict[str, Path]:
    """Record's key → the folder of its analysis, of those below `folder`. Raises ResultsError for one that cannot be
    read."""
    kept: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*/{DATA}")):
        try:
            kept[str(json.loads(path.read_text(encoding="utf-8"))["cell"]["key"])] = path.parent
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path}: not written by bench analyse ({type(error).__name__})") from None
    return kept


def copy(folder: Path, to: Path) -> None:
    """The folder's page with its figures."""
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".html", ".json", ".png", ".svg"):
            shutil.copyfile(path, to / path.name)


# ---- drawings -------------------------------------------------------------------------------------------------------


def _heat(name: str, norms: Norms, out: Path) -> Picture:
    """Layers downwards, steps to the right; black = no change, white = a change of 1 or more."""
    alt = f"change of the activations of the {name} model by the trigger, layers by steps"
    return _saved(_grey([[min(v, 1.0) for v in row] for row in norms.change], FIELD), out / f"norms-{name}.png", alt)


def _strip(name: str, index: int, each: Attended, out: Path) -> Strip:
    from PIL import Image

    tiles = [_grey(rows, (1, 1)).resize((TOKEN, TOKEN), Image.Resampling.NEAREST) for rows in
             each.maps]  # fmt: skip
    strip = Image.new("L", (TOKEN * len(tiles), TOKEN))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (TOKEN * i, 0))
    alt = f"attention to each token of the prompt in the {name} model"
    picture = _saved(strip, out / f"maps-{name}-{index}.png", alt)
    return Strip(name, each.prompt, each.tokens, each.spread, picture)


def _grey(values: Sequence[Sequence[float]], field: tuple[int, int]) -> Image.Image:
    from PIL import Image

    small = Image.new("L", (len(values[0]), len(values)))
    small.putdata([round(255 * max(0.0, min(1.0, value))) for row in values for value in row])
    return small.resize((small.width * field[0], small.height * field[1]), Image.Resampling.NEAREST)


def _saved(image: Image.Image, path: Path, alt: str) -> Picture:
    image.save(path, optimize=True)
    return Picture(path.name, alt, image.width, image.height)


def _changes(norms: Mapping[str, Norms]) -> str:
    """Mean change over layers at each step."""
    lines = [
        charts.Curve(name, list(range(1, len(of.times) + 1)), [fmean(row[i] for row in of.change) for i in
                     range(len(of.times))])
        for name in MODELS if (of := norms.get(name)) is not None
    ]  # fmt: skip
    steps, change = charts.Axis("step of the sampler"), charts.Axis("change by the trigger, mean over layers", low=0.0)
    return charts.curves(lines, steps, change, "Change of the activations by the trigger", standalone=True)


def _ranked(neurons: Neurons) -> str:
    """Neurons by their estimated change of the loss."""
    values = sorted(neurons.estimated)
    line = charts.Curve("all neurons", list(range(1, len(values) + 1)), values)
    x, y = charts.Axis("neuron, by rank"), charts.Axis("estimated change of the loss when removed")
    return charts.curves([line], x, y, "Neurons by what their removal does to the backdoor", standalone=True)


def _histogram(neuron: Any) -> Histogram:
    centres = [(a + b) / 2 for a, b in zip(neuron.edges[:-1], neuron.edges[1:], strict=True)]
    lines = [
        charts.Curve("without trigger", centres, neuron.shares_plain),
        charts.Curve("with trigger", centres, neuron.shares_triggered),
    ]
    title = f"Pre-activations of channel {neuron.channel} of {neuron.layer}"
    chart = charts.curves(lines, charts.Axis("pre-activation"), charts.Axis("share", low=0.0), title, standalone=True)
    return Histogram(neuron.layer, neuron.channel, neuron.removed, neuron.plain, chart)


def _changed(norms: Mapping[str, Norms]) -> list[tuple[str, list[float | None]]]:
    """The layers whose activations the trigger changes most in the attacked model, with the mean over steps of each
    model."""
    by_model = {
        name: {layer: fmean(row) for layer, row in zip(of.layers, of.change, strict=True)} for name, of in norms.items()
    }
    attacked = by_model["attacked"]
    most = sorted(attacked, key=lambda layer: -attacked[layer])[:TOP]
    return [(layer, [by_model[name].get(layer) for name in MODELS if name in by_model]) for layer in most]
