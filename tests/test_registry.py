import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Ge, Le
from hypothesis import given, settings, strategies as st

from harness import registry
from harness.registry import (
    InvalidSpec,
    PluginError,
    Registry,
    RegistryError,
    UnknownName,
    literal,
    make,
    parse_spec,
    spec_of,
)
from harness.registry.code_digest import closure

index_module = importlib.import_module("harness.registry.index")  # the package has a function of that name

DEFENSE = '''
"""A module about rinsing."""
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar
from annotated_types import Ge, Le
from harness.registry.hookspecs import hookimpl
if TYPE_CHECKING:
    from somewhere import Modality

@dataclass(frozen=True)
class Base:
    batch: int = 8  # examples

@dataclass(frozen=True)
class Rinse(Base):
    name: ClassVar[str] = "NAME"
    version: ClassVar[int] = 3
    accepts_triggers: ClassVar[tuple[Modality, ...]] = ("noise",)

    share: Annotated[
        float, Ge(0), Le(1)
    ] = 0.1  # share of the data,
    # in the range 0 to 1
    asks: bool = False  # ask for the trigger

    @property
    def needs(self) -> tuple[str, ...]:
        return ("data", "trigger") if self.asks else ("data",)

    def defend(self, model, knowledge, rng):
        raise NotImplementedError

@hookimpl
def defenses():
    return [Rinse]
'''


def defense(name: str) -> str:
    return DEFENSE.replace("NAME", name)


@dataclass(frozen=True)
class Plugin:
    """A plugin of this file, for specs and validation."""

    name: ClassVar[str] = "plugin"

    rate: Annotated[float, Ge(0), Le(1)] = 0.1
    steps: Annotated[int, Ge(1)] = 5
    mode: Literal["near", "far"] = "near"
    flag: bool = False
    word: str | None = None
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("13 steps bring bad luck; use 12")


# ---- specs


def test_a_spec_is_a_name_with_literal_parameters() -> None:
    assert parse_spec("skd-cag") == ("skd-cag", {})
    assert parse_spec(" box( size = 4, at=[1, (2, 3)], word='a(b' ) ") == (
        "box",
        {"size": 4, "at": (1, (2, 3)), "word": "a(b"},
    )
    assert parse_spec("box()") == ("box", {})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "write name or name"),
        ("box(", "write name or name"),
        ("box(size=)", "cannot read"),
        ("box(4)", "give parameters by name"),
        ("box(**{'a': 1})", "give parameters by name"),
        ("box(a=1)+f(b=2)", "cannot read"),
        ("box(a=1)(b=2)", "cannot read"),
        ("box(size=1, size=2)", "size is given twice"),
        ("box(mode=fast)", "a text needs quotes: mode='fast'"),
        ("box(size=__import__('os'))", "not a literal"),
        ("box(a=1\0)", "cannot read"),
    ],
)
def test_a_spec_that_cannot_be_read_says_what_to_write(spec: str, says: str) -> None:
    with pytest.raises(InvalidSpec, match=f"(?s).*{says.replace('(', '.').replace('*', '.')}"):
        parse_spec(spec)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_every_literal_survives_a_spec(value: Any) -> None:
    assert parse_spec(f"x(a={literal(value)})") == ("x", {"a": value})


@settings(deadline=None)
@given(
    st.builds(
        Plugin,
        rate=st.floats(0, 1),
        steps=st.integers(14),
        mode=st.sampled_from(["near", "far"]),
        flag=st.booleans(),
        word=st.none() | st.text(),
        sizes=st.lists(st.integers()).map(tuple),
    )
)
def test_a_spec_round_trips(plugin: Plugin) -> None:
    name, parameters = parse_spec(spec_of(plugin))
    assert name == "plugin"
    assert make(Plugin, parameters) == plugin
    assert spec_of(make(Plugin, parameters)) == spec_of(plugin)


def test_a_canonical_spec_has_all_defaults_and_the_declared_types() -> None:
    made = make(Plugin, {"rate": 1})
    assert spec_of(made) == "plugin(rate=1.0, steps=5, mode='near', flag=False, word=None, sizes=(1, 2))"


# ---- validation


def test_all_wrong_parameters_are_named_at_once_in_the_callers_words() -> None:
    with pytest.raises(InvalidSpec) as caught:
        make(Plugin, {"rate": 1.7, "steps": 0, "mode": "odd"})
    assert str(caught.value) == (
        "plugin: rate: should be less than or equal to 1, got 1.7; steps: should be greater than or equal to 1, got 0; "
        "mode: should be 'near' or 'far', got 'odd'"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "parameters",
    [{"steps": True}, {"steps": "10"}, {"steps": 1.0}, {"flag": 1}, {"word": 3}, {"rate": "0.1"}, {"sizes": (1, "2")}],
)
def test_types_are_not_mixed_up(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match=f"plugin: {next(iter(parameters))}: .*, got "):
        make(Plugin, parameters)


def test_an_unknown_parameter_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="plugin: no parameter 'stepz'; did you mean 'steps'\\? parameters: rate, "):
        make(Plugin, {"stepz": 3})


def test_what_the_plugin_itself_refuses_is_the_callers_error() -> None:
    with pytest.raises(InvalidSpec, match="plugin: 13 steps bring bad luck"):
        make(Plugin, {"steps": 13})


def test_where_no_plugin_is_installed_the_error_says_how_to_install_them() -> None:
    """As by `python -m harness` in a checkout that was never installed."""
    with pytest.raises(UnknownName, match="no plugin is installed, not even digits-ddpm; pip install"):
        Registry().build("models", "digits-ddpm")


def test_an_unknown_name_gets_a_suggestion_and_the_command_that_lists_the_names(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(defense("rinse"))
    found = Registry()
    found.load_file(tmp_path / "x.py")
    with pytest.raises(UnknownName) as near:
        found.build("defenses", "Rince")
    assert str(near.value) == (
        "no defense named 'Rince'; did you mean 'rinse'? bench list defenses and bench list presets show what there "
        "is; for a plugin of your own: pip install -e DIR, or --plugin-file FILE"
    )
    with pytest.raises(UnknownName, match=r"^no trigger named 'xyz'; bench list triggers shows what there is; for a "):
        found.build("triggers", "xyz")
    with pytest.raises(UnknownName, match="no kind 'defences'; did you mean 'defenses'"):
        found.build("defences", "rinse")
    assert found.canonical("defense", "rinse(asks=True)") == "rinse(batch=8, share=0.1, asks=True)"


# ---- loading


def test_every_module_below_a_package_is_a_plugin_and_stands_alone(distribution) -> None:
    distribution(
        "strange",
        "strange_pkg",
        {
            "strange_pkg/__init__.py": "",
            "strange_pkg/good.py": defense("good"),
            "strange_pkg/helper.py": "X = 1\n",
            "strange_pkg/_private.py": "raise RuntimeError('never imported')\n",
            "strange_pkg/sub/__init__.py": "",
            "strange_pkg/sub/deep.py": defense("deep"),
            "strange_pkg/missing.py": "import no_such_module_anywhere\n",
            "strange_pkg/syntax.py": "def f(:\n",
            "strange_pkg/leaves.py": "raise SystemExit(3)\n",
            "strange_pkg/raises.py": (
                "from harness.registry.hookspecs import hookimpl\n@hookimpl\ndef attacks():\n    raise KeyError('no')\n"
            ),
            "strange_pkg/wrong.py": "from harness import hookimpl\n@hookimpl\ndef attacks():\n    return 3\n",
            "strange_pkg/arguments.py": (
                "from harness.registry.hookspecs import hookimpl\n@hookimpl\ndef attacks(model):\n    return []\n"
            ),
            "strange_pkg/plain.py": (
                "from harness.registry.hookspecs import hookimpl\nclass A:\n    name = 'a'\n"
                "@hookimpl\ndef attacks():\n    return [A]\n"
            ),
        },
    )
    found = registry.load()
    assert list(found.classes("defenses")) == ["deep", "good"]
    assert found.distribution_of("defenses", "good") == "strange"
    errors = {warning.module.rpartition(".")[2]: warning for warning in found.warnings}
    assert set(errors) == {"missing", "syntax", "leaves", "raises", "wrong", "arguments", "plain"}
    assert all(warning.distribution == "strange" for warning in errors.values())
    assert all(Path(warning.file).is_file() for warning in errors.values())
    assert "no_such_module_anywhere" in errors["missing"].error
    assert "not a list of classes" in errors["wrong"].error
    assert "A is not a frozen dataclass" in errors["plain"].error
    with pytest.raises(PluginError, match=r"strange_pkg\.arguments of strange left out") as caught:
        registry.load(strict=True)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    def defend(", "    def protect(", "no method defend"),
        ("frozen=True)\nclass Rinse", "frozen=False)\nclass Rinse", "frozen"),
        ("version: ClassVar[int] = 3", "version: ClassVar[int] = 'x'", "version: should be a valid integer, got 'x'"),
        ("name: ClassVar[str]", "name: str", "name is a parameter; make it a ClassVar"),
        ('("noise",)', '("sound",)', "accepts_triggers: .*should be 'noise' or 'text'"),
        ('("data",)\n', '("date",)\n', "needs 'date'; did you mean 'data'"),
        ("asks: bool = False", "asks: bool", "Error: "),
        ('"NAME"', '"a name"', "cannot be written in a spec"),
        ('"NAME"', '"skd-c\u0430g"', "cannot be written in a spec; use A-Z, a-z"),
    ],
)
def test_a_class_that_lacks_something_is_left_out_with_the_reason(
    distribution, old: str, new: str, says: str, request: pytest.FixtureRequest
) -> None:
    module = f"faulty_{abs(hash(request.node.name))}"
    assert old in DEFENSE
    distribution("faulty", module, {f"{module}.py": DEFENSE.replace(old, new)})
    found = registry.load()
    assert not found.classes("defenses")
    (warning,) = found.warnings
    assert re.search(says, warning.error), warning.error


def test_a_misspelt_hook_is_an_error_that_names_the_nearest(distribution) -> None:
    distribution("typo", "typo_plugin", {"typo_plugin.py": DEFENSE.replace("def defenses", "def defences")})
    with pytest.raises(PluginError, match="typo_plugin of typo: no hook 'defences'; did you mean 'defenses'"):
        registry.load()


def test_two_plugins_of_one_name_are_an_error_that_names_both(distribution) -> None:
    distribution("one", "twin_one", {"twin_one.py": defense("twin")})
    distribution("two", "twin_two", {"twin_two.py": defense("twin")})
    with pytest.raises(PluginError, match=r"two defenses are named 'twin': twin_one of one .* twin_two of two"):
        registry.load()


def test_a_module_that_an_entry_point_names_must_have_a_hook(distribution) -> None:
    distribution("empty", "empty_plugin", {"empty_plugin.py": "X = 1\n"})
    distribution("gone", "gone_plugin:Missing", {"gone_plugin.py": defense("gone")})
    found = registry.load()
    assert [(w.distribution, w.error.partition(":")[0]) for w in found.warnings] == [
        ("empty", "LookupError"),
        ("gone", "AttributeError"),
    ]


def test_a_plugin_file_is_loaded_or_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        Registry().load_file(tmp_path / "bad.py")
    with pytest.raises(RegistryError, match="no such plugin file"):
        registry.load([tmp_path / "none.py"])


def test_the_source_digest_follows_the_file(tmp_path: Path) -> None:
    digests = []
    for i, text in enumerate([defense("rinse"), "# of rinsing\n" + defense("rinse"), defense("rinse") + "A = 1\n"]):
        path = tmp_path / str(i) / "x.py"
        path.parent.mkdir()
        path.write_text(text)
        found = Registry()
        found.load_file(path)
        digests.append(closure([found.find("defenses", "rinse")]))
    assert digests[0] == digests[1] != digests[2]


# ---- index


def test_an_entry_shows_fields_with_their_comments_also_inherited_ones(distribution) -> None:
    distribution("shown", "shown_plugin", {"shown_plugin.py": defense("shown")})
    (entry,) = registry.load().index().of_kind("defenses")
    assert entry.summary == entry.docstring == "A module about rinsing."
    assert (entry.version, entry.distribution, entry.module) == (3, "shown", "shown_plugin")
    assert entry.facts == {"accepts_triggers": ["noise"], "needs": ["data"]}
    assert [(f.name, f.default, f.comment) for f in entry.fields] == [
        ("batch", "8", "examples"),
        ("share", "0.1", "share of the data, in the range 0 to 1"),
        ("asks", "False", "ask for the trigger"),
    ]
    assert entry.fields[1].type == "Annotated[float, Ge(0), Le(1)]"


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How often the index was derived; in this process, so that it is quick. The cache is below tmp_path."""
    calls: list[int] = []

    def derived() -> dict[str, Any]:
        calls.append(1)
        index_module.write_index(tmp_path / "derived.json")
        return json.loads((tmp_path / "derived.json").read_text())

    monkeypatch.setattr(index_module, "_derived", derived)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_the_index_is_kept_until_a_plugin_file_changes(distribution, derivations: list[int]) -> None:
    root = distribution("kept", "kept_pkg", {"kept_pkg/__init__.py": "", "kept_pkg/a.py": defense("kept")})
    first = registry.index()
    assert registry.index() == first
    assert len(derivations) == 1
    (root / "kept_pkg" / "a.py").write_text(defense("kept") + "\n# longer\n")
    assert registry.index().of_kind("defenses") == first.of_kind("defenses")
    assert len(derivations) == 2
    (root / "kept_pkg" / "b.py").write_text("import no_such_module_anywhere\n")
    assert [w.module for w in registry.index().warnings] == ["kept_pkg.b"]
    assert len(derivations) == 3
    registry.index(refresh=True)
    assert len(derivations) == 4


def test_a_corrupt_or_unwritable_cache_only_costs_time(
    distribution, derivations: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution("kept", "kept_module", {"kept_module.py": defense("kept")})
    first = registry.index()
    (file,) = (tmp_path / "cache").rglob("plugins-*.json")
    for text in ("", "[]", "null", '{"key": 1}', file.read_text()[:-9]):
        file.write_text(text)
        assert registry.index() == first
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert registry.index() == first


def test_an_error_of_loading_reaches_whoever_asks_for_the_index(distribution, derivations: list[int]) -> None:
    distribution("typo", "typo_again", {"typo_again.py": DEFENSE.replace("def defenses", "def defence")})
    with pytest.raises(PluginError, match="no hook 'defence'"):
        registry.index()
