"""The benchmark of transplants: every weight has one part, and a transplant moves a part's weights alone."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from harness.diffusion.model import DiffusionModel
from harness.registry import load
from plugins.models import shapes_mmdit
from tests.benchmarks import transplant


@pytest.fixture(scope="module")
def unet() -> DiffusionModel:
    plugin: Any = load().build("models", "shapes-sd")
    return plugin.load()


@pytest.fixture(scope="module", params=["unet", "mmdit"])
def pair(request: pytest.FixtureRequest, unet: DiffusionModel) -> tuple[DiffusionModel, DiffusionModel]:
    """A model, and a copy of which every weight is another."""
    model = unet if request.param == "unet" else shapes_mmdit.untrained(unet)
    other = model.clone()
    with torch.no_grad():
        for net in other.components().values():
            for value in net.state_dict().values():
                if value.is_floating_point():
                    value.add_(1.0)
    return model, other


def single(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    return {part: names for part, names in parts.items() if part not in transplant.TOGETHER}


def test_every_weight_but_the_autoencoders_is_in_one_part(pair: tuple[DiffusionModel, DiffusionModel]) -> None:
    found = Counter(name for names in single(transplant.parts_of(pair[0])).values() for name in names)
    every = {
        f"{component}.{name}"
        for component, net in pair[0].components().items()
        for name in net.state_dict()
        if component != "vae"
    }
    assert set(found) == every and set(found.values()) == {1}
    assert len(single(transplant.parts_of(pair[0]))) >= 12


def test_a_transplant_moves_the_weights_of_its_part_alone(pair: tuple[DiffusionModel, DiffusionModel]) -> None:
    model, other = pair
    for part, names in list(transplant.parts_of(model).items())[::6]:
        made = transplant.transplanted(model, other, names)
        for component, net in made.components().items():
            theirs, mine = (each.components()[component].state_dict() for each in (other, model))
            for name, value in net.state_dict().items():
                wanted = theirs if f"{component}.{name}" in names else mine
                assert torch.equal(value, wanted[name]), (part, name)


def test_all_parts_together_are_the_donor(pair: tuple[DiffusionModel, DiffusionModel]) -> None:
    model, other = pair
    names = [name for found in single(transplant.parts_of(model)).values() for name in found]
    made = transplant.transplanted(model, other, names)
    for component, net in made.components().items():
        theirs = other.components()[component].state_dict()
        assert component == "vae" or all(torch.equal(value, theirs[name]) for name, value in net.state_dict().items())


def test_the_tables_are_those_of_the_committed_values() -> None:
    """If this fails after a change of the values: python -m tests.benchmarks.transplant --table"""
    written = transplant.PLACE.written()
    assert "modulation" in written and written == transplant.tables(json.loads(transplant.FILE.read_text()))


def test_the_table_has_a_row_for_each_part_and_its_intervals() -> None:
    known = {"shapes-sd, x": {"attacked": 1.0, "clean": 0.0, "n": 96, "parts": {
        "text encoder": {"into_clean": 0.5, "out_of_attacked": 1.0, "weights": 1234, "cpu_s": 1.0}}}}  # fmt: skip
    lines = transplant.tables(known).splitlines()
    assert (
        "text encoder" in lines[3] and "1,234" in lines[3] and "50 (40–60)" in lines[3] and "100 (96–100)" in lines[3]
    )
