"""README, documentation and suites: commands, options, links, code blocks and the table are true."""

from __future__ import annotations

import ast
import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

import harness
from harness import registry
from harness.cli import COMMANDS, bench, pages
from harness.diffusion.seeds import generator
from harness.registry import presets
from harness.runs import suite as suites
from harness.runs.record import Dropped, bare
from harness.types import KNOWLEDGE, Knowledge
from leaderboard import recompute, wellformed
from leaderboard.results import Results
from tests import (
    controls_table,
    few_steps_table,
    older_tables,
    readme_table,
    real_small_table,
    strangers_table,
    v1_tables,
)
from tests.benchmarks import adapters, before_after, detectors, encoders
from tests.oracles import tiny_unet

ROOT = Path(__file__).parent.parent
TEXTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")  # beside docs/
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
EVERY = {f"docs/{name}.md": text for name, text in DOCS.items()} | {name: (ROOT / name).read_text() for name in TEXTS}
LONGEST_README = 180  # lines
LEFT_OUT = {"v1": {("drop-trigger", "syntax"), ("sau", "syntax")}}  # suite → (defense, trigger) that do not apply


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load(strict=True)


# ---- README ---------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST_README


def test_the_table_of_the_readme_is_what_the_records_give(published: list[Results]) -> None:
    """If this fails after a change of the records: python -m tests.readme_table"""
    assert readme_table.PLACE.written() == readme_table.table(published)


def test_the_tables_of_controls_are_those_of_the_published_records(published: list[Results]) -> None:
    """If this fails after a change of the records: python -m tests.controls_table"""
    written = controls_table.PLACE.written()
    assert "| `elijah` |" in written
    assert written == controls_table.tables(published)


def test_the_table_of_real_pictures_is_that_of_the_published_records(published: list[Results]) -> None:
    """If this fails after a change of the records: python -m tests.real_small_table"""
    written = real_small_table.PLACE.written()
    assert "| `elijah` |" in written
    assert written == real_small_table.table(published)


def test_the_tables_of_the_benchmark_are_those_of_the_published_records(published: list[Results]) -> None:
    """If this fails after a change of the records: python -m tests.v1_tables"""
    written = v1_tables.PLACE.written()
    assert "| `skd-cag-text` |" in written
    assert written == v1_tables.tables(published)


def test_the_table_of_models_of_few_steps_is_that_of_the_published_records(published: list[Results]) -> None:
    """If this fails after a change of the records: python -m tests.few_steps_table"""
    written = few_steps_table.PLACE.written()
    assert "| `perflow` |" in written
    assert written == few_steps_table.table(published)


@pytest.mark.parametrize("name", sorted(older_tables.TABLES))
def test_the_tables_of_older_studies_are_those_of_the_published_records(name: str, published: list[Results]) -> None:
    """If this fails after a change of the records: python -m tests.older_tables"""
    written = older_tables.place(name).written()
    assert written.startswith("| ") and written == older_tables.TABLES[name](published)


def test_what_the_readme_says_can_be_checked_is_what_the_records_give(published: list[Results]) -> None:
    records = [record for suite in published for record in suite.records]
    older = sum(map(wellformed.unverifiable, records))
    assert all(recompute.level(record.scores, reproduced=False) == "recomputed" for record in records)
    said = " ".join(README.split())
    assert f"The keys of {len(records) - older} of the {len(records)} rows are verified; the other {older} rows" in said


def test_the_page_of_suites_says_of_which_rows_are_published(published: list[Results]) -> None:
    said = " ".join(DOCS["suites"].split())
    new, older = re.findall(r"Rows of the suites (.+?) are published, and older rows of (.+?) \(", said)[0]
    made = {suite.suite for suite in published if not any(map(wellformed.unverifiable, suite.records))}
    assert set(re.findall(r"`([\w-]+)`", new)) == made
    assert set(re.findall(r"`([\w-]+)`", older)) == {suite.suite for suite in published} - made


def test_the_results_name_a_commit_and_a_command_for_each_older_study(published: list[Results]) -> None:
    said = " ".join(DOCS["results"].split())
    named = {suite: commit for commit, suite in re.findall(r"`git checkout (\w+)` and `bench run ([\w-]+)`", said)}
    made = {
        suite.suite: {record.provenance.commit for record in suite.records if wellformed.unverifiable(record)}
        for suite in published
    }
    older = {suite: commits for suite, commits in made.items() if commits}
    assert set(named) == set(older)
    for suite, commits in older.items():
        assert any(commit is not None and commit.startswith(named[suite]) for commit in commits), suite


def test_the_table_of_strangers_models_is_that_of_the_committed_outcomes() -> None:
    """If this fails after a change of the outcomes: python -m tests.strangers_table"""
    written = strangers_table.PLACE.written()
    assert "| `trojan-1` |" in written
    assert written == strangers_table.table()
    models = strangers_table.outcomes()["models"].values()
    rights = [model["right"] for model in models]
    assert strangers_table.outcomes()["right"] == f"{sum(rights)} of {len(rights)}"
    assert all(rights) and sum(model["clean"] for model in models) == 4, "what the page says above the table"


# ---- what there is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "kind"), [("methods", "attacks"), ("methods", "defenses"), ("methods", "samplers"), ("models", "models")]
)
def test_the_pages_list_every_built_in_method_and_model(page: str, kind: str, plugins: registry.Registry) -> None:
    missing = [name for name in plugins.classes(kind) if f"`{name}`" not in DOCS[page]]
    assert not missing


@pytest.mark.parametrize("name", sorted(suites.suites()))
def test_every_shipped_suite_can_be_run_and_is_listed(name: str, plugins: registry.Registry) -> None:
    suite = suites.load_suite(name, plugins)
    assert suite.cells and {_short(entry) for entry in suite.dropped} == LEFT_OUT.get(name, set())
    assert f"`{name}`" in DOCS["suites"]


def _short(entry: Dropped) -> tuple[str, str]:
    return bare(entry.cell.defense), bare(entry.cell.trigger)


@pytest.mark.parametrize("kind", ["attacks", "defenses"])
def test_every_method_cites_its_source_and_says_how_it_differs(kind: str, plugins: registry.Registry) -> None:
    for entry in plugins.index().of_kind(kind):
        if entry.name in ("none", "finetune"):
            continue
        assert "arXiv:" in entry.docstring, entry.name
        assert "Differs from" in entry.docstring or "of our own" in entry.docstring, entry.name


def test_every_parameter_says_what_it_is(plugins: registry.Registry) -> None:
    for entry in plugins.index().entries:
        for field in entry.fields:
            assert field.comment, f"{entry.name}.{field.name} has no trailing comment"


def test_the_tables_of_detectors_are_those_of_the_committed_values() -> None:
    """If this fails after a change of the values: python -m tests.benchmarks.detectors digits --table"""
    population = detectors.POPULATIONS["digits"]
    values = json.loads((ROOT / "tests/benchmarks/detectors_digits.json").read_text())
    written = detectors.place("digits").written()
    assert written == detectors.tables(population, values) and written.count("clean-") >= 5


def test_the_table_of_costs_before_and_after_is_that_of_the_committed_measurements() -> None:
    """If this fails after a measurement: python -m tests.benchmarks.before_after --table"""
    known = json.loads((ROOT / "tests/benchmarks/before_after.json").read_text())
    written = before_after.place().written()
    assert known["parts"] and written == before_after.table(known)
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + sum(len(before_after.PARTS[name].figures) for name in known["parts"])
    for name, found in known["parts"].items():  # a benchmark that was changed is measured again
        for figure in before_after.PARTS[name].figures:
            assert found["before"][figure.name] > 0 and found["after"][figure.name] > 0, (name, figure.name)


def test_the_table_of_scanned_adapters_is_that_of_the_committed_outcomes() -> None:
    """If this fails after a change of the outcomes: python -m tests.benchmarks.adapters --table"""
    known = json.loads((ROOT / "tests/benchmarks/adapters.json").read_text())
    assert adapters.place().written() == adapters.table(known)
    assert all(adapters.table(known).count(f"`{case.name}`") >= 1 for case in adapters.CASES)


def test_the_table_of_compared_encoders_is_that_of_the_committed_outcomes() -> None:
    """If this fails after a change of the outcomes: python -m tests.benchmarks.encoders --table"""
    known = json.loads(encoders.FILE.read_text())
    assert encoders.PLACE.written() == encoders.table(known)
    assert list(known) == [case.name for case in encoders.CASES]
    assert all(each["clean"] or "asr" in each for each in known.values())


# ---- the site -------------------------------------------------------------------------------------------------------


class Fetched(html.parser.HTMLParser):
    """What a page makes a browser fetch: addresses of scripts, styles, fonts and pictures, not of links to follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = tag in ("script", "img", "iframe", "source") or (tag == "link" and given.get("rel") != "canonical")
        self.addresses += [str(given[name]) for name in ("src", "href") if loads and given.get(name)]


def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(
    tmp_path: Path, plugins: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setattr(registry, "index", lambda **_: plugins.index())
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(DOCS) + len(registry.HOOKS)
    for page in built:
        foreign = [at for at in Fetched(page.read_text()).addresses if at.startswith(("http:", "https:", "//"))]
        assert not foreign, f"{page.name}: {foreign}"
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"url\(\s*['\"]?https?:", sheet.read_text()), sheet


def test_the_reference_has_every_plugin_with_its_parameters(plugins: registry.Registry) -> None:
    entries = plugins.index().entries
    made = pages.reference(entries)
    assert set(made) == {f"reference/{kind}.md" for kind in registry.HOOKS}
    for entry in entries:
        page = made[f"reference/{entry.kind}.md"]
        part = page.partition(f"## `{entry.name}` {{ #")[2].partition("\n## ")[0]
        assert entry.docstring in part
        assert all(f"| `{field.name}` | `" in part for field in entry.fields)


def test_the_page_of_the_command_line_has_every_command_and_option() -> None:
    page = pages.commands()
    for name in COMMANDS:
        assert f"\n## bench {name}\n" in page
    assert "### bench plugin new" in page and "### bench plugin check" in page
    assert "| `--only KEY=TEXT` | Keep cells that match; repeatable. |" in page


# ---- the pages ------------------------------------------------------------------------------------------------------


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(title, code) of the fenced blocks of a language."""
    found = re.findall(r"```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)```", DOCS[page], re.DOTALL)
    return [(title, code) for named, title, code in found if named == language]


@pytest.mark.parametrize("page", sorted(DOCS))
def test_the_code_in_the_pages_is_python_and_imports_names_that_exist(page: str) -> None:
    for _, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "harness":
                assert {alias.name for alias in node.names} <= set(harness.homes())


def test_the_defense_of_its_page_loads_and_defends(tmp_path: Path) -> None:
    (title, code), *_ = blocks("defense", "python")
    file = tmp_path / title
    file.write_text(code)
    defense = registry.load([file], strict=True).build("defenses", "jitter(scale=0.02)")
    model = tiny_unet()
    done = defense.defend(model, Knowledge(), generator(0, "x"))
    before, after = (next(m.denoiser.parameters()) for m in (model, done.model))
    assert not torch.equal(before, after)


def test_the_metric_of_its_page_measures(plugins: registry.Registry) -> None:
    from harness.testing import parts

    ((_, code),) = blocks("metric", "python")
    names: dict[str, object] = {}
    head = "from collections.abc import Mapping\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
    exec(f"{head}from harness import Evidence, Score, mean, unmeasured\n{code}", names)
    made: object = names["Moved"]()  # type: ignore[operator]
    place = parts.of_metric(made, plugins)[0]
    for whole in (True, False):
        evidence, _ = parts.evidence(place, whole)
        score = made.measure(evidence)["moved"]  # type: ignore[attr-defined]
        assert (score.value > 0) if whole else score.warning == "the defense returned no model"


def test_the_suite_of_its_page_can_be_run(tmp_path: Path, plugins: registry.Registry) -> None:
    (_, text), _ = blocks("suites", "toml")
    (tmp_path / "mine.toml").write_text(text)
    suite = suites.load_suite(tmp_path / "mine.toml", plugins)
    assert len(suite.cells) == 2 * 2 * 3 * 3 and not suite.dropped
    assert set(tomllib.loads(text)["grid"][0]) == set(suites.GRID_KEYS)


def test_the_presets_of_the_page_of_suites_are_well_formed(tmp_path: Path, plugins: registry.Registry) -> None:
    _, (_, text) = blocks("suites", "toml")
    (tmp_path / "mine.toml").write_text(text)
    (preset,) = presets.read(tmp_path / "mine.toml")
    assert plugins.build(preset.kind, preset.spec).steps == 1200


def lines_of_code(text: str) -> Iterator[str]:
    """Commands in a page: lines of its fenced blocks and inline code, without prompts and comments."""
    fenced = re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in (line for part in (*fenced, *inline) for line in part.splitlines()):
        yield re.split(r"\s+#\s", line.strip())[0]


def bench_calls(text: str) -> list[list[str]]:
    """The words of each `bench ...` command in a page, after `bench`; without what its text leaves open."""
    calls = (line.removeprefix(".venv/bin/") for line in lines_of_code(text))
    return [shlex.split(line.replace("...", ""))[1:] for line in calls if re.match(r"bench [a-z]", line)]


def command_of(words: list[str]) -> tuple[click.Command | None, list[str]]:
    """The command that the words name, and the words after its name; None if there is no such command."""
    command: click.Command | None = bench
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command, words = command.get_command(click.Context(command), words[0]), words[1:]
    return command, words


@pytest.mark.parametrize("page", sorted(EVERY))
def test_every_command_and_option_in_the_pages_exists(page: str) -> None:
    for words in bench_calls(EVERY[page]):
        command, rest = command_of(words)
        assert command is not None, f"bench {shlex.join(words)}: no such command"
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
        assert not unknown, f"bench {shlex.join(words)}: no option {unknown[0]}"


def test_the_test_of_commands_finds_them() -> None:
    assert ["plan", "quick"] in bench_calls(
        "Run `bench plan quick`, or:\n```text\nbench plan quick   # the jobs\n```\n"
    )
    assert command_of(["plan", "quick"])[0] is not None and command_of(["plam"])[0] is None
    assert sum(len(bench_calls(text)) for text in EVERY.values()) > 100


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", sorted(EVERY))
def test_every_relative_link_resolves(page: str) -> None:
    made = {f"docs/{path}": text for path, text in pages.written(registry.index().entries).items()}
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", EVERY[page], flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = os.path.normpath(Path(page).parent / path) if path else page
        assert there in made or (ROOT / there).is_file(), f"{page}: {target}"
        assert not anchor or there in made or anchor in anchors(EVERY[there]), f"{page}: {target}"


def test_the_changes_of_quick_in_the_pages_are_accepted(plugins: registry.Registry) -> None:
    calls = [words[2:] for text in EVERY.values() for words in bench_calls(text) if words[:2] == ["run", "quick"]]
    changes = [words for words in calls if {"--set", "--only"} & set(words)]
    assert len(changes) >= 5
    for words in changes:
        sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        only = [words[i + 1] for i, word in enumerate(words) if word == "--only"]
        draft = suites.read(suites.find_suite("quick"), [text.replace(', "hush"', "") for text in sets])
        assert suites.expand(draft, plugins, only).cells


def names_of(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, with its whole name."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for each in command.list_commands(click.Context(command)):
        inner = command.get_command(click.Context(command), each)
        assert inner is not None
        yield from names_of(inner, f"{name} {each}")


def test_the_commands_without_json_are_those_that_the_page_names() -> None:
    mute = {name for name, each in names_of(bench, "bench") if not any("--json" in param.opts for param in each.params)}
    (named,) = re.findall(r"Every command accepts `--json`, except (.*?)\.\s", DOCS["run"], re.DOTALL)
    assert set(re.findall(r"`(.*?)`", named)) == mute


@pytest.mark.parametrize("page", ["run", "defense"])
def test_the_pages_list_all_that_a_defense_may_need(page: str) -> None:
    for name in KNOWLEDGE:
        assert re.search(rf"^\| `{name}` \|", DOCS[page], re.MULTILINE), name


# ---- the tutorial ---------------------------------------------------------------------------------------------------


class Workplace:
    """A folder and an environment as a stranger has them, in which the tutorial's blocks are done.

    `git clone` makes a repository of the files that are here, with one commit. `pip install` of it puts it on the path,
    and that of a package goes to a folder on the path, without dependencies and without a network.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder / "work", folder / "site"
        self.folder.mkdir()
        self.site.mkdir()
        self.checkout = self.folder / "diffusion-defense-bench"
        somebody = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.site), str(self.checkout)]), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"), "BENCH_STORE": str(folder / "store"),
            "PYTHONDONTWRITEBYTECODE": "1", **somebody,
        }  # fmt: skip
        self.output: dict[str, str] = {}

    def clone(self) -> None:
        def git(folder: Path, *words: str) -> str:
            done = subprocess.run(["git", *words], cwd=folder, env=self.environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            if name and (ROOT / name).is_file():  # neither a file that was removed nor a linked environment
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.checkout / name)
        git(self.checkout, "init", "-q", "-b", "main")
        git(self.checkout, "add", "-A")
        git(self.checkout, "-c", "commit.gpgsign=false", "commit", "-q", "-m", "Begin")

    def do(self, line: str) -> None:
        words = shlex.split(line)
        if words[:2] == ["git", "clone"]:
            assert words[2].endswith(f"/{self.checkout.name}")
            self.clone()
            return
        if words == ["pip", "install", "-e", f"./{self.checkout.name}", "pytest"]:
            return
        python = [sys.executable, "-P", "-m"]
        own = {
            "bench": [sys.executable, "-P", "-c", "from harness.cli import main; main()"],
            "pytest": [*python, "pytest", "-q", "-p", "no:cacheprovider", "-k", "parameters"],  # the check did the rest
            "pip": [*python, "pip"],
        }
        command = [*own[words[0]], *words[1:]]
        if words[:2] == ["pip", "install"]:
            offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(self.site)]
            command = [*own["pip"], "install", *offline, *(word for word in words[2:] if word != "-e")]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        self.output[line] = done.stdout


def steps(page: str) -> Iterator[tuple[str, str]]:
    """("file:<path>", code) and ("do", line) in the page's order."""
    for language, title, code in re.findall(r"```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)```", DOCS[page], re.DOTALL):
        if title:
            yield f"file:{title}", code
        elif language == "bash":
            yield from (("do", line) for line in code.splitlines() if line)


def smaller(suite: str) -> str:
    """The tutorial's suite with a shorter attack, fewer samples and one seed."""
    for old, new in (
        ("steps=1000", "steps=20"), ("batch=48", "batch=16"), ("seed = [0, 1, 2]", "seed = [0]"),
        ("n = 256", "n = 16"), ('"hush"', '"hush(steps=4)"'), ("steps=100, batch=16", "steps=4, batch=16"),
        ("ddim(steps=20)", "ddim(steps=5)"),
    ):  # fmt: skip
        assert suite.count(old) == 1
        suite = suite.replace(old, new)
    return suite


TWIN = """
from dataclasses import dataclass
from typing import ClassVar
from harness import Defended, hookimpl
from plugins.helper import FACTOR

@dataclass(frozen=True)
class Twin:
    name: ClassVar[str] = "twin"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()

    def defend(self, model, knowledge, rng):
        model = model.clone()
        for weight in model.denoiser.parameters():
            weight.data *= FACTOR
        return Defended(model=model)

@hookimpl
def defenses():
    return [Twin]
"""


def stranger(site: Path) -> None:
    """Install a distribution whose package is called `plugins`, as ours is."""
    files = {
        "plugins/__init__.py": "", "plugins/helper.py": "FACTOR = 0.99\n", "plugins/twin.py": TWIN,
        "stranger-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
        "stranger-1.0.dist-info/entry_points.txt": "[bench.plugins]\nmain = plugins.twin\n",
    }  # fmt: skip
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_goes_from_nothing_to_a_row_also_beside_packages_of_our_names(tmp_path: Path) -> None:
    """Every block of the tutorial, done in a folder that holds folders `plugins` and `harness`, with another
    distribution installed whose package is called `plugins`; its defense gets a row too. The suites are made smaller,
    and their rows are rows that the check accepts."""
    place = Workplace(tmp_path)
    for name in ("plugins", "harness"):
        (place.folder / name).mkdir()
        (place.folder / name / "__init__.py").write_text("raise RuntimeError('the folder in which one works')\n")
    stranger(place.site)
    for what, text in steps("tutorial"):
        if what == "do":
            place.do(text)
        else:
            (place.folder / what.removeprefix("file:")).write_text(smaller(text) if what.endswith(".toml") else text)
        if text.startswith("bench plugin new"):
            suite = place.folder / "bench-hush" / "try.toml"
            assert suites.read(suite).grids[0].axes["defense"] == ("none", "finetune(steps=4, batch=8)", "hush")
            suite.write_text(suite.read_text().replace('"hush"]', '"hush(steps=4)", "twin"]'))
    listed = place.output["bench list defenses"]
    assert {"hush", "twin", "elijah"} <= {line.split()[0] for line in listed.splitlines()}
    assert "coarse pattern" in place.output["bench show hush"]
    laws = [line.split()[0] for line in place.output["bench plugin check hush"].splitlines()[1:]]
    assert set(laws) == {"kept", "n/a"} and laws.count("kept") >= 12
    document = json.loads((place.folder / "report" / "report.json").read_text())
    rows = {
        (r["cell"]["attack"].partition("(")[0], r["cell"]["defense"].partition("(")[0]) for r in document["records"]
    }
    assert rows == {(a, d) for a in ("none", "villandiffusion") for d in ("none", "finetune", "hush", "twin")}
    assert all(record["error"] is None and record["scores"]["asr"]["n"] == 16 for record in document["records"])
    assert "hush" in place.output["bench report report"]
    (asked,) = (text for line, text in place.output.items() if line.startswith("bench leaderboard submit "))
    assert asked.startswith("# Add 3 rows of hush: hush\n")
    place.do(f"bench leaderboard check --results {place.checkout}/leaderboard/results/hush --json")
    (told,) = (json.loads(text) for line, text in place.output.items() if line.startswith("bench leaderboard check "))
    assert (told["records"], told["problems"], told["notes"], told["unverifiable"]) == (3, [], [], [])
