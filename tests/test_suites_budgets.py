"""What stands beside what in the shipped suites: controls with the budget, the data and the loss of the defenses."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from harness import Pruning
from harness.capabilities import delivers
from harness.registry import Registry, load
from harness.runs import suite as suites
from harness.types import Cell

STEPS = ("steps", "iterations")  # a method whose steps have another name: anp trains masks for `iterations`
GIVEN_TEXT = {"sau", "skd", "skd-cag"}  # whoever is given a text trigger can also take it out of the prompt
SUITES = sorted(suites.suites())
CONTROLS = {
    "noise": {"decoy", "decoy-2", "decoy-3", "opposite", "zero"},
    "text": {"decoy", "decoy-2", "decoy-3", "zero"},
}
PAPER_TABLES = {"controls", "removal", "sealing-pixel", "sealing-style", "paper-cifar10", "paper-sd14"}

COMMENT = r"(\d+) x (\d+), (constant|cosine|one-cycle)(?:, average (0\.\d+))?"
PAGE = (Path(__file__).parents[1] / "docs" / "paper_tables.md").read_text()
PARTS = re.findall(r"^\|[^|]+\|[^|]+\| `([\w-]+)` \| ([`\"].+[`\"]) \|$", PAGE, re.MULTILINE)  # (suite, part)

Budget = tuple[int, str, float]  # steps x batch, schedule of the learning rate, decay of the average

# Suites in which several budgets stand side by side, because each paper has its own; every defense still has a
# fine-tuning of its budget.
SEVERAL_BUDGETS = {
    "paper-cifar10": "Elijah's 11 or 50 epochs beside Diff-Cleanse's 40 epochs of other images",
    "paper-celebahq": "the same at 256 pixels",
    "budget": "it shows what the budget does",
}
# Cells whose defense has no schedule and no average to set, by the definition of the method.
OWN_OPTIMIZER = {"anp": "its masks are trained by SGD with momentum, and the masks themselves are the result"}
# Suites with one decoy, and why.
FEW_CONTROLS = {
    "budget": "it shows what the budget does; the suites controls and v1 have the controls",
    "few-steps": "a decoy; the suite controls has more on shapes-sd",
    "mmdit": "a decoy; the suite controls has more on shapes-sd",
    "v1": "a decoy; the suite controls has three, −r and zero",
    "quick": "it has to stay short",
}


@pytest.fixture(scope="module")
def plugins() -> Registry:
    return load(strict=True)


class Shipped:
    """The cells of a suite by what the rows of one table have in common, with their defenses built."""

    def __init__(self, name: str, registry: Registry) -> None:
        self.suite = suites.load_suite(name, registry)
        self.build = cache(lambda spec: registry.build("defenses", spec))
        self.groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
        for cell in self.suite.cells:
            self.groups[cell.model, cell.attack, cell.trigger, cell.target, cell.sampler].append(cell)

    def defenses(self, group: list[Cell]) -> Iterator[Any]:
        yield from (self.build(spec) for spec in dict.fromkeys(cell.defense for cell in group))


@pytest.fixture(scope="module")
def shipped(plugins: Registry) -> Any:
    return cache(lambda name: Shipped(name, plugins))


def rows(defense: Any) -> int:
    """Steps x batch of a defense that trains the model it returns; 0 if it trains none."""
    if "model" not in delivers(defense) or not hasattr(defense, "batch"):
        return 0
    return next(getattr(defense, name) for name in STEPS if hasattr(defense, name)) * defense.batch


def budget(defense: Any) -> Budget:
    return rows(defense), getattr(defense, "schedule", "constant"), getattr(defense, "ema", 0.0)


@pytest.mark.parametrize("name", SUITES)
def test_every_defense_that_trains_has_a_finetuning_of_its_budget_beside_it(name: str, shipped: Any) -> None:
    suite = shipped(name)
    for group in suite.groups.values():
        trained = [defense for defense in suite.defenses(group) if rows(defense)]
        controls = {budget(defense) for defense in trained if defense.name == "finetune"}
        for defense in trained:
            same = {c[0] for c in controls} if defense.name in OWN_OPTIMIZER else controls
            mine = rows(defense) if defense.name in OWN_OPTIMIZER else budget(defense)
            assert mine in same, f"{defense} has {mine}, the fine-tunings beside it {controls or 'do not exist'}"
        assert len(controls) <= 1 or name in SEVERAL_BUDGETS, f"several budgets in one table: {controls}"


@pytest.mark.parametrize("name", SUITES)
def test_a_comment_of_each_grid_says_its_budget(name: str, plugins: Registry) -> None:
    path = suites.find_suite(name)
    texts = path.read_text().split("[[grid]]\n")[1:]
    for text, grid in zip(texts, suites.read(path).grids, strict=True):
        built = [plugins.build("defenses", spec) for spec in grid.axes["defense"]]
        trained = {budget(defense) for defense in built if rows(defense) and defense.name not in OWN_OPTIMIZER}
        said = re.findall(r"^# budgets?: (.+)$", text, re.MULTILINE)
        parts = [re.fullmatch(COMMENT, part) for line in said for part in line.split("; ")]
        assert {(int(p[1]) * int(p[2]), p[3], float(p[4] or 0)) for p in parts if p} == trained, grid.place
        assert all(parts) and len(parts) == len(trained), f"{grid.place}: {said}"


@pytest.mark.parametrize("name", SUITES)
def test_every_pruning_by_diff_cleanse_has_random_pruning_with_its_data_and_loss_beside_it(
    name: str, shipped: Any
) -> None:
    shared = [field.name for field in fields(Pruning)]
    suite = shipped(name)
    for group in suite.groups.values():
        defenses = list(suite.defenses(group))
        random = [[getattr(d, field) for field in shared] for d in defenses if d.name == "random-pruning"]
        for defense in defenses:
            if defense.name == "diff-cleanse" and "model" in delivers(defense):
                assert [getattr(defense, field) for field in shared] in random, f"{defense} has no random pruning"


@pytest.mark.parametrize("name", SUITES)
def test_every_defense_that_is_given_a_text_trigger_has_drop_trigger_beside_it(name: str, shipped: Any) -> None:
    suite = shipped(name)
    left_out = {
        (c.model, c.attack, c.trigger, c.target, c.sampler, c.defense.partition("(")[0])
        for c in (entry.cell for entry in suite.suite.dropped)
    }
    for group, cells in suite.groups.items():
        names = {cell.defense.partition("(")[0] for cell in cells}
        names |= {"drop-trigger"} if (*group, "drop-trigger") in left_out else set()  # the trigger is no text
        assert not names & GIVEN_TEXT or "drop-trigger" in names, f"{names & GIVEN_TEXT} stand alone"


@pytest.mark.parametrize("name", SUITES)
def test_what_has_a_control_trigger_has_them_all(name: str, shipped: Any, plugins: Registry) -> None:
    """Variants of a defense may have none; each paper's table has them for the defenses that it is about."""
    suite = shipped(name)
    given: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for group, cells in suite.groups.items():
        for cell in cells:
            if "trigger" in suite.build(cell.defense).needs:
                given[*group, cell.defense, cell.seed].add(cell.trigger_given)
    for (model, _, trigger, *rest), found in given.items():
        every = CONTROLS[plugins.build("triggers", trigger).modality]
        wanted = {"decoy"} if name in FEW_CONTROLS else every
        assert found in ({"true"}, {"true"} | wanted), f"{rest} on {model} is given {found}"
    if name in PAPER_TABLES:
        assert any(len(found) > 1 for found in given.values())


def test_the_budgets_see_what_a_suite_gets_wrong(plugins: Registry, tmp_path: Any, shipped: Any) -> None:
    """A table whose control has fewer steps, and one without a control, are both seen."""
    text = """
    [[grid]]
    model = ["digits-ddpm"]
    attack = ["none"]
    trigger = ["box"]
    target = ["hat"]
    defense = [{defense}]
    """
    tuned = '"elijah(steps=150, batch=32)"'
    for defenses in (f'"finetune(steps=100)", {tuned}', tuned):
        path = tmp_path / "mine.toml"
        path.write_text(text.format(defense=defenses))
        with pytest.raises(AssertionError, match="the fine-tunings beside it"):
            test_every_defense_that_trains_has_a_finetuning_of_its_budget_beside_it(
                "mine", lambda _, path=path: Shipped(str(path), plugins)
            )


# ---- the page of the papers' tables ---------------------------------------------------------------------------------


def test_the_page_of_the_papers_tables_is_read() -> None:
    assert len(PARTS) == PAGE.count("\n|") - 2 * PAGE.count("|---|---|---|---|") >= 30


@pytest.mark.parametrize(("suite", "part"), sorted(set(PARTS)))
def test_each_part_of_a_suite_that_the_page_names_is_there(suite: str, part: str, plugins: Registry) -> None:
    """A filter keeps cells of the suite; a quotation is how the comment of one of its grids begins."""
    if part.startswith("`"):
        only = shlex.split(part.strip("`"))[1::2]
        assert suites.load_suite(suite, plugins, only=only).cells
    else:
        comments = re.findall(r"^\[\[grid\]\]\n# (.*)", suites.find_suite(suite).read_text(), re.MULTILINE)
        assert sum(comment.startswith(part.strip('"')) for comment in comments) == 1, comments
