"""What the README and the suites say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from harness import grid, registry
from harness.seeds import generator
from harness.types import Knowledge
from tests.oracles import tiny_unet

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load(strict=True)


def test_the_readmes_plugin_loads_and_defends(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    file = tmp_path / "jitter.py"
    file.write_text(code)
    defense = registry.load([file], strict=True).build("defenses", "jitter(scale=0.02)")
    model = tiny_unet()
    done = defense.defend(model, Knowledge(), generator(0, "x"))
    before, after = (next(m.denoiser.parameters()) for m in (model, done.model))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", ["attacks", "defenses", "models"])
def test_the_readme_names_every_built_in(kind: str, plugins: registry.Registry) -> None:
    for name in plugins.classes(kind):
        assert f"`{name}`" in README, f"README does not mention {name}"


@pytest.mark.parametrize("name", sorted(grid.suites()))
def test_every_shipped_suite_can_be_run(name: str, plugins: registry.Registry) -> None:
    suite = grid.load_suite(name, plugins)
    assert suite.cells and not suite.dropped
    assert f"`{name}`" in README


@pytest.mark.parametrize("kind", ["attacks", "defenses"])
def test_every_method_cites_its_source_and_says_how_it_differs(kind: str, plugins: registry.Registry) -> None:
    for entry in plugins.index().of_kind(kind):
        if entry.name in ("none", "finetune"):
            continue
        assert "arXiv:" in entry.docstring, entry.name
        assert "Differs from" in entry.docstring, entry.name


def test_every_parameter_says_what_it_is(plugins: registry.Registry) -> None:
    for entry in plugins.index().entries:
        for field in entry.fields:
            assert field.comment, f"{entry.name}.{field.name} has no trailing comment"
