"""The registry of attacks that know a defense: its hook, what is left out, and the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import registry
from harness.cli import call
from harness.types import Adaptive

PLUGIN = """
from harness import Adaptive, hookimpl
@hookimpl
def adaptive():
    return RETURNED
"""


def loaded(tmp_path: Path, returned: str) -> registry.Registry:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace("RETURNED", returned))
    return registry.load([file])


def test_every_built_in_defense_has_an_attack_that_knows_it_or_a_reason() -> None:
    found = registry.load(strict=True)
    known = found.adaptive()
    assert {each.defense for each in known} == set(found.classes("defenses"))
    for each in known:
        assert each.because.endswith(".") and "No plugin declares" not in each.because
        for kind in ("attack", "trigger", "target"):
            if spec := getattr(each, kind):
                found.build(f"{kind}s", spec)


def test_a_strangers_declaration_stands_beside_the_built_in_ones(tmp_path: Path) -> None:
    found = loaded(tmp_path, "[Adaptive('terd', 'trojdiff(spare=3)', 'Mine.', trigger='blend')]")
    assert Adaptive("terd", "trojdiff(spare=3)", "Mine.", "blend") in found.adaptive()
    assert sum(each.defense == "terd" for each in found.adaptive()) == 2 and not found.warnings


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("Adaptive('tord', 'none', 'x.')", "no defense named 'tord'; did you mean 'terd'"),
        ("Adaptive('terd', 'baddiffusion(spair=3)', 'x.')", "no parameter 'spair'; did you mean 'spare'"),
        ("Adaptive('terd', 'none', 'x.', trigger='bux')", "no trigger named 'bux'"),
    ],
)
def test_a_declaration_that_cannot_be_built_is_left_out_with_a_warning(
    tmp_path: Path, declared: str, says: str
) -> None:
    found = loaded(tmp_path, f"[{declared}]")
    assert len(found.adaptive()) == len(registry.load().adaptive())
    (warning,) = found.warnings
    assert says in warning.error


@pytest.mark.parametrize(
    ("returned", "says"),
    [("3", "not a list of harness.Adaptive"), ("[Adaptive('terd', 'none', '')]", "fill `because`")],
)
def test_a_hook_that_declares_nothing_of_use_is_an_error(tmp_path: Path, returned: str, says: str) -> None:
    with pytest.raises(registry.PluginError, match=says):
        loaded(tmp_path, returned)


def test_the_list_shows_defense_attack_and_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace("RETURNED", "[Adaptive('terd', 'trojdiff(spare=3)', 'Mine.', trigger='blend')]"))
    assert call(("list", "adaptive", "--plugin-file", str(file))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["terd", "trojdiff(spare=3),", "blend"] and "Mine." in line for line in lines)
    assert any(line.split()[:2] == ["clip", "none"] and "No attack is written" in line for line in lines)
    assert call(("list", "adaptive", "--plugin-file", str(file), "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {
        "defense": "terd",
        "attack": "trojdiff(spare=3)",
        "because": "Mine.",
        "trigger": "blend",
        "target": "",
    } in rows
