"""Import paths and names of plugin API 1, as docs, templates and the built-in plugins had them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

from harness import _moved

SHOWN = """
from harness.training import Examples, denoising_loss, draw, minimize
from harness.seeds import derive, generator, image_noise, image_seeds
from harness.digits import data
from harness.diffusion import DDIM, DiffusionModel
from harness import checkpoint, digits
from harness.checkpoint import load
from harness.hookspecs import API_VERSION, hookimpl
from harness.events import progress
from harness.images import to_unit
from harness.evidence import ABSENT, Evidence, Given, Who, mean, rate, unmeasured
from harness.noise_backdoor import LearningRate, Rate, Steps, Weight, ancestral_coefficients, implant
from harness.stamping import other_place, scale_of, square, stamped
from harness.text_detection import Guide, MapRun, Share, benign, density, lengths, screened, threshold
from harness.recipes import shapes_judge, train_vae
from harness.features import CNNJudge
from harness.embedded import EmbeddedDigits
from harness.editing import edited, projections
from harness.distillation import Latents, LatentSource, distil
from harness.samplers import SAMPLERS, Family, PredictorCorrector, SchedulerSampler
from harness.pruning import Importance, Pruning, Rounding, Scope, accumulated, at_random, magnitude, taylor
from harness.prompts import LOOK_ALIKES, Insertion, Removal, Substitution, removal_of, with_decoys
from harness.pasting import Corner, at_most_one_percent, corner, dissimilarity
from harness.trojan import TrojanDDIM
from harness.published import Published, Work
from harness.shapes import SHAPES, STAR, STYLES, read
from harness.testing import contract
from harness.registry import Registry
import harness.guidance, harness.store, harness.jobs
"""


@pytest.mark.parametrize("line", SHOWN.split("\n")[1:-1])
def test_what_strangers_were_shown_can_still_be_imported(line: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(line, {})


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_an_old_path_gives_the_module_that_took_its_place(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = import_module(f"harness.{_moved.MOVED[old]}")
    spec = new.__spec__
    monkeypatch.delitem(sys.modules, f"harness.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"harness\.{old} is now {new.__name__}; import from harness") as seen:
        assert import_module(f"harness.{old}") is new
    assert seen[0].filename == __file__ or "importlib" in seen[0].filename
    assert new.__spec__ is spec and spec is not None and spec.name == new.__name__


def test_the_warning_points_at_the_line_that_imports() -> None:
    code = "import warnings; warnings.simplefilter('error', DeprecationWarning)\nfrom harness.training import minimize"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "harness.training is now harness.diffusion.training" in done.stderr
    always = "import warnings; warnings.simplefilter('always')\nfrom harness.events import progress\n"
    done = subprocess.run([sys.executable, "-c", always], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("<string>:2: DeprecationWarning: harness.events is now harness.diffusion.events")


def test_names_that_left_their_module_are_the_objects_they_were() -> None:
    from harness.judges.statistics import unmeasured
    from harness.methods.parameters import PositiveInt

    with pytest.warns(DeprecationWarning, match=r"\.Steps is now harness\.methods\.parameters\.PositiveInt"):
        assert import_module("harness.noise_backdoor").Steps is PositiveInt
    with pytest.warns(DeprecationWarning, match="is now"):
        assert import_module("harness.evidence").unmeasured is unmeasured
    with pytest.raises(AttributeError, match="no attribute 'unmeasurd'"):
        _ = import_module("harness.evidence").unmeasurd
    with pytest.raises(ImportError, match="cannot import name 'DDIN'"):
        exec("from harness.diffusion import DDIN", {})


@pytest.mark.parametrize("module", sorted(_moved.RENAMED))
def test_every_name_that_left_its_module_is_where_the_table_says(module: str) -> None:
    for old, new in _moved.RENAMED[module].items():
        home, _, name = new.rpartition(".")
        assert hasattr(import_module(home), name) and old not in vars(import_module(module))


def test_a_name_that_never_was_is_no_old_path() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"harness\.trainings"):
        import_module("harness.trainings")
