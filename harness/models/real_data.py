"""Base of the models of real data whose weights are in the package and whose data are not.

The data are a data set of the hub. They are read from the directory that BENCH_DATA names, if it is set, else fetched
from the hub; `data_path` names other data. The first two must have the content on which the weights were trained: its
digest is in the weights' provenance, and it takes the place of the files in the model's digest. A run can therefore be
planned, and its records checked, on a machine without the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from harness.capabilities import encoders_of
from harness.diffusion import checkpoint
from harness.diffusion.interrupted import UNFINISHED, Kept
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, DPMSolverPP
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import Examples, denoising_loss, minimize
from harness.judges import classifiers, fidelity, image_folders, public_encoders
from harness.judges.hub import Source
from harness.judges.image_folders import DataError
from harness.models import provenance
from harness.models.embedded_models import Embedded
from harness.types import Data, Inputs

DATA = "BENCH_DATA"  # environment variable: a directory with a folder for each data set, in the layout of the hub
SAMPLES = 2048  # of which distances are measured
Split = Literal["train", "test"]


@dataclass(frozen=True)
class RealData(Embedded):
    """A model plugin with weights in the package and data from `data_path`, BENCH_DATA or the hub, in this order."""

    hub_data: ClassVar[str]  # hub id of the data set; the part after the slash is the name of its folder in BENCH_DATA
    side: ClassVar[int]  # pixels
    channels: ClassVar[int]  # 1: the first channel of the images; 3: all
    images: ClassVar[int] = 0  # images of the split train that are read, from the first; 0 = all

    data_path: str = ""  # directory of parquet files or images, or hub id, of other data; '' = those of the weights
    references: Annotated[int, Ge(0)] = 0  # held-out images for distances, from the first; 0 = all

    def digest(self) -> str:
        data = Source(self.data_path, kind="dataset").identity() if self.data_path else json.dumps(self._trained_on())
        return hashlib.sha256(f"{super().digest()}\n{data}".encode()).hexdigest()

    def data(self) -> Data:
        return self.read("train")

    def reference(self) -> Tensor:
        return self.read("test").images

    def read(self, split: Split, checked: bool = True) -> Data:
        """The images of a split, (N, channels, side, side), with their classes. checked: the content must be that on
        which the weights were trained, unless `data_path` is set. Raises DataError."""
        found = self._raw(split, self.images if split == "train" else 0)
        if checked and not self.data_path and content(found) != self._trained_on()[split]:
            raise DataError(
                f"{self.source()}: the split {split} is not the data that the weights of {self.name} were trained on; "
                f"{DATA} must name a directory whose folder {self._folder} is {self.hub_data} of the hub, or name "
                f"other data on purpose, {self.name}(data_path='DIRECTORY')"
            )
        most = self.references if split == "test" else 0
        return found.rows(torch.arange(min(most, len(found)))) if most else found

    def _raw(self, split: Split, most: int) -> Data:
        source = self.source()
        try:
            found = image_folders.read(source.fetch(), (split,), self.side, most)
        except checkpoint.CheckpointError as error:
            raise DataError(
                f"{error}, or set {DATA} to a directory whose folder {self._folder} holds the parquet files of "
                f"{self.hub_data}"
            ) from error
        return Data(found.images[:, : self.channels].contiguous(), labels=found.labels)

    @property
    def _folder(self) -> str:
        return self.hub_data.rpartition("/")[2]

    def source(self) -> Source:
        """Where the data are read from. Raises DataError if BENCH_DATA names a directory without them."""
        if self.data_path:
            return Source(self.data_path, kind="dataset")
        named = os.environ.get(DATA, "").strip()
        if not named:
            return Source(self.hub_data, kind="dataset")
        folder = Path(named).expanduser() / self._folder
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such directory; {DATA} must name a directory with the folder {self._folder} in it, "
                f"which is {self.hub_data} of the hub"
            )
        return Source(str(folder.absolute()), kind="dataset")

    def _trained_on(self) -> Mapping[str, str]:
        """Digests of the splits on which the weights were trained and measured, from their provenance."""
        try:
            known = provenance.facts(self.folder)["data"]
            return {split: str(known[split]) for split in ("train", "test")}
        except (checkpoint.CheckpointError, KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(
                f"{self.folder / provenance.FILE}: does not say on which data the weights were trained; `bench build "
                f"{self.name}` makes it anew"
            ) from error


class Recipe:
    """What the recipes of these models share: both splits of the data, a judge of their classes, and the facts.

    out: the folder to write. state: the folder for the states of the trainings.
    """

    def __init__(self, plugin: RealData, out: Path) -> None:
        self.plugin, self.out, self.state = plugin, out, out / UNFINISHED
        self.train, self.test = (plugin.read(split, checked=False) for split in ("train", "test"))

    def kept(self, name: str, rng: torch.Generator) -> Kept:
        return Kept(self.state / f"{name}.safetensors", rng)

    def train_judge(self, name: str, head: str, **options: Any) -> None:
        """Trains the judge; options as those of `classifiers.class_judge`."""
        rng = generator(self.plugin.name, "judge")
        kept = self.kept("judge", rng)
        self.judge, self.judged = classifiers.class_judge(name, self.train, self.test, head, rng, kept=kept, **options)

    def earlier(self, start: Path) -> tuple[DiffusionModel, dict[str, Any]]:
        """The model in the folder `start`, which `bench build` wrote, and where it comes from; the recipe takes its
        judge over. Raises CheckpointError."""
        facts = provenance.facts(start)
        model = checkpoint.load(start / "model")
        model.denoiser.requires_grad_(True)
        self.judge = classifiers.load_judge(start / "judge")
        self.judged = {name: value for name, value in facts.items() if name.startswith("judge_")}
        known = ("steps", "batch", "trained_s", "trained_on", "started_from", "before")
        before = {name: facts[name] for name in known if name in facts}
        return model, {"started_from": checkpoint.digest(start), "before": before}

    def finished(self, model: DiffusionModel, trained: Mapping[str, Any]) -> dict[str, Any]:
        """Writes model and judge; what was trained, on which data, how well the judge recognises samples, and how far
        they are from the held-out images."""
        checkpoint.save(model.to("cpu"), self.out / "model", fp16=True)
        classifiers.save_judge(self.judge, self.out / "judge")
        data = {"train": content(self.train), "test": content(self.test)}
        quality = classifiers.quality(model, self.judge, DDIM(steps=50))
        return {**trained, "data": data, **self.judged, **quality, **self.distances(model)}

    def distances(self, model: DiffusionModel) -> dict[str, Any]:
        """Fréchet and kernel distance, precision and recall of SAMPLES samples against the held-out images, in the
        features of the judge and of the public encoders."""
        n = SAMPLES
        seeds = image_seeds(0, "distances", n)
        sampler = DPMSolverPP(steps=10)
        images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), sampler)
        encoders = [self.judge, *map(public_encoders.load, encoders_of(self.plugin))]
        found: dict[str, Any] = {"distances_n": n, "distances_sampler": f"{sampler.name}(steps={sampler.steps})"}
        for encoder in encoders:
            found |= fidelity.facts(encoder, images, self.test.images)
        return found


def content(data: Data) -> str:
    """sha256 over the shape, the 8-bit images and the classes of a data set."""
    from harness.diffusion.images import to_uint8

    total = hashlib.sha256(str(tuple(data.images.shape)).encode())
    for part in data.images.split(1000):
        total.update(to_uint8(part).numpy().tobytes())
    if data.labels is not None:
        total.update(data.labels.numpy().tobytes())
    return total.hexdigest()


def with_mirrored(images: Tensor) -> Tensor:
    """Images (N, C, H, W) and their mirror images, (2N, C, H, W)."""
    return torch.cat([images, images.flip(3)])


WARM_UP, PACED = 10, 20  # steps before the pace is taken, and steps of which it is taken


def train_denoiser(
    model: DiffusionModel,
    examples: Examples,
    rng: torch.Generator,
    state: Path,
    *,
    batch: int,
    lr: float,
    ema: float,
    minutes: float,
) -> dict[str, Any]:
    """Trains a denoiser on L_simple in bf16 for about `minutes`, and returns what it took.

    The learning rate rises for a tenth of the steps and falls to nothing over the others. The number of steps follows
    from the pace of the first ones; it and the state of the training are kept below `state`, from which an interrupted
    training goes on. On a GPU the network is compiled and works with channels last; if it cannot be compiled it runs as
    it is.
    """

    def loss() -> Tensor:
        return denoising_loss(model, examples.batch(batch, rng))

    began = time.monotonic()
    model.denoiser.train()
    if model.device.type == "cuda":
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        model.denoiser.to(memory_format=torch.channels_last)
        model.denoiser.compile()
    steps = _steps(state / "steps.json", minutes, lambda: _pace(model, loss, rng))
    kept = Kept(state / "model.safetensors", rng)
    losses = minimize(
        loss, model.denoiser.parameters(), steps=steps, lr=lr, schedule="one-cycle", ema=ema, bf16=True, kept=kept
    )
    model.denoiser.eval().requires_grad_(False)
    model.denoiser._compiled_call_impl = None
    return {
        "steps": steps, "batch": batch, "minutes": minutes, "final_loss": sum(losses[-200:]) / len(losses[-200:]),
        "trained_s": time.monotonic() - began, "trained_on": _processor(model.device),
    }  # fmt: skip


def _steps(place: Path, minutes: float, pace: Callable[[], float]) -> int:
    """How many steps fit `minutes`: those that an interrupted training had planned, or 60 minutes / pace()."""
    try:
        known: Any = json.loads(place.read_text(encoding="utf-8"))
        if known["minutes"] == minutes:
            return int(known["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    steps = max(PACED, int(60 * minutes / pace()))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"minutes": minutes, "steps": steps}), encoding="utf-8")
    return steps


def _pace(model: DiffusionModel, loss: Callable[[], Tensor], rng: torch.Generator) -> float:
    """Seconds a step of a training that leaves weights and generator as they were."""
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    drawn = rng.get_state()

    def steps(n: int) -> float:
        began = time.monotonic()
        minimize(loss, model.denoiser.parameters(), steps=n, lr=1e-6, bf16=True, phase="pace")
        return time.monotonic() - began

    steps(WARM_UP)
    seconds = steps(PACED) / PACED
    model.denoiser.load_state_dict(before)
    rng.set_state(drawn)
    return seconds


def _processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
