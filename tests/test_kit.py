"""The contract kit: good plugins pass, each kind of bad one is caught with plugin, file and cure in the message."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import registry
from harness.registry import PluginError, Registry
from harness.testing import checks, contract, tiny
from harness.testing.checks import Case, Finding

pytestmark = pytest.mark.timeout(900)
GOOD = '''
"""Lean on every weight a little."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any, ClassVar
import torch
from harness import Defended, hookimpl

@dataclass(frozen=True)
class Lean:
    name: ClassVar[str] = "lean"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("model", "suspicion", "screen")

    scale: float = 0.01  # of the noise

    def defend(self, model, knowledge, rng):
        model = model.clone()
        BODY
        return self.done(model, rng)

    def done(self, model, rng):
        for weight in model.denoiser.parameters():
            weight.data += self.scale * torch.randn(weight.shape, generator=rng)
        return Defended(model=model, suspicion=self.suspicion(model), screen=self.screen(model))

    def suspicion(self, model):
        return float(sum(weight.double().square().sum() for weight in model.denoiser.parameters()))

    def screen(self, model):
        def score(inputs):
            t = torch.full((len(inputs),), model.T - 1)
            return model.eps(inputs.noise, t).flatten(1).mean(1)
        return score

@hookimpl
def defenses():
    return [Lean]
'''
SEED = "weight.data += self.scale * torch.randn(weight.shape, generator=rng)"


@pytest.fixture(scope="module")
def plugins() -> Registry:
    return registry.load()


def written(folder: Path, source: str) -> Path:
    path = folder / "lean.py"
    path.write_text(source)
    return path


def bad(body: str = "pass", **changes: str) -> str:
    """The good defense with other lines at the start of `defend`, and with parts replaced (old=new)."""
    source = GOOD.replace("        BODY\n", textwrap.indent(textwrap.dedent(body).strip(), " " * 8) + "\n")
    for old, new in changes.values():  # type: ignore[misc]
        assert old in source, old
        source = source.replace(old, new)
    return source


def change(old: str, new: str) -> Any:
    return {"change": (old, new)}


def case(folder: Path, source: str, plugins: Registry, seconds: float = 60.0, **parameters: Any) -> Case:
    found = Registry()
    found.load_file(written(folder, source))
    (kind,) = [kind for kind in registry.HOOKS if kind != "samplers" and found.classes(kind)]
    (cls,) = found.classes(kind).values()
    return checks.case_of(kind, cls, parameters, plugins, seconds)


# ---- good plugins ---------------------------------------------------------------------------------------------------


def test_a_good_defense_keeps_every_law(tmp_path: Path, plugins: Registry) -> None:
    tried = case(tmp_path, bad(), plugins)
    found = checks.examine_all(tried)
    assert [law for law in found if law.state != "kept"] == []
    assert {law.law for law in found} == set(checks.LAWS["defenses"])


def test_a_run_is_forked_so_that_the_kits_models_stay_as_they_are(tmp_path: Path, plugins: Registry) -> None:
    from harness.testing.trial import given_model
    from harness.testing.watch import network

    before = network(given_model("noise"))
    tried = case(tmp_path, bad("for weight in model.denoiser.parameters(): weight.data.zero_()"), plugins)
    assert checks.examine(tried, "returns what it should").state == "kept"
    assert network(given_model("noise")) == before


EMBEDS = '''
"""Teach the text encoder that a prompt with the trigger is the target's text."""
from dataclasses import dataclass
from typing import ClassVar
import torch
from harness import Backdoored, hookimpl

@dataclass(frozen=True)
class Embeds:
    name: ClassVar[str] = "embeds"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("prompt",)

    steps: int = 3  # of the training

    def implant(self, model, backdoor, data, rng):
        model = model.clone()
        with torch.no_grad():
            wanted = model.embed([backdoor.target.text])
        weights = list(model.text_encoder.requires_grad_(True).parameters())
        for _ in range(self.steps):
            caption = data.captions[int(torch.randint(len(data.captions), (), generator=rng))]
            loss = (model.embed([backdoor.trigger.apply(caption)]) - wanted).square().mean()
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True)):
                weight.data -= 0 if slope is None else 1e-3 * slope
        model.text_encoder.requires_grad_(False)
        return Backdoored(model, backdoor)

@hookimpl
def attacks():
    return [Embeds]
'''


def test_every_text_that_the_kit_hands_out_fits_its_own_text_encoder(tmp_path: Path, plugins: Registry) -> None:
    """With room for an attack that puts the texts of trigger and target into one prompt."""
    from harness.testing.methods import known, of_attack

    model, trigger = tiny.model("text"), tiny.trigger("text")
    texts = [*tiny.PROMPTS, *tiny.WORDS, *tiny.STYLES, *tiny.RARE, *(known("text").prompts or ())]
    texts += [made.apply(tiny.PROMPTS[0]) for made in (trigger, *map(trigger.wrong, range(4)))]
    attacks = [cls() for cls in plugins.classes("attacks").values()] + [case(tmp_path, EMBEDS, plugins).plugin]
    places = [place.parts for attack in attacks for place in of_attack(attack, plugins) if place.modality == "text"]
    assert any(parts["target"].name == "prompt" for parts in places)
    for parts in places:
        said = getattr(parts["target"], "text", getattr(parts["target"], "words", ""))
        texts += [f"{parts['trigger'].apply(prompt)} , {said}" for prompt in tiny.PROMPTS]
    assert model.tokens(sorted(set(texts))).shape[1] == tiny.LENGTH


def test_a_target_whose_text_does_not_fit_is_not_handed_out(plugins: Registry, tmp_path: Path) -> None:
    from harness.testing.methods import of_attack

    def texts(registry: Registry) -> set[str]:
        return {place.parts["target"].text for place in of_attack(attack, registry)}

    attack = case(tmp_path, EMBEDS, plugins).plugin

    (usual,) = texts(plugins)
    wordy = tmp_path / "wordy.py"
    wordy.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom harness import hookimpl\n"
        "from plugins.targets.prompt import TargetPrompt\n"
        "@dataclass(frozen=True)\nclass Wordy(TargetPrompt):\n    name: ClassVar[str] = 'wordy'\n"
        f"    text: str = '{usual}' + ' , jumbled' * 40\n"
        "@hookimpl\ndef targets():\n    return [Wordy]\n"
    )
    found = Registry()
    found._classes = {kind: dict(classes) for kind, classes in plugins._classes.items()}
    found.load_file(wordy)
    assert "wordy" in found.classes("targets") and texts(found) == {usual}


def test_an_attack_that_embeds_the_text_of_its_target_keeps_every_law(tmp_path: Path, plugins: Registry) -> None:
    found = checks.examine_all(case(tmp_path, EMBEDS, plugins))
    assert [law for law in found if law.state in ("broken", "open")] == []
    assert {law.law: law.state for law in found}["same seed, same result"] == "kept"


@pytest.mark.parametrize("modality", ["noise", "text"])
def test_the_kits_models_are_random_but_always_the_same(modality: Any) -> None:
    from harness.testing.watch import network

    one, same, other = (tiny.model(modality, seed) for seed in (0, 0, 1))
    assert network(one) == network(same) != network(other)
    assert sum(p.numel() for p in one.denoiser.parameters()) < 200_000


def test_the_exact_oracle_returns_its_image() -> None:
    from harness.diffusion.samplers import DDIM

    y = tiny.images("noise", 1, seed=3)[0]
    model = tiny.one_image(y)
    assert torch.allclose(model.sample(tiny.inputs(model, 2), DDIM(steps=5)), y.expand(2, -1, -1, -1), atol=1e-4)


# ---- twelve bad plugins: those that never load ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "says", "cure"),
    [
        (bad(**change("import torch\n", "import torch\nimport no_such_library\n")),
         "No module named 'no_such_library'", "install what it imports"),
        (bad(**change("def defenses", "def defences")), "no hook 'defences'; did you mean 'defenses'", "rename"),
        (bad(**change("knowledge, rng", "rng")), "cannot be called as defend(model, knowledge, rng)", "write def "),
        (bad(**change('"lean"', '"elijah"')), "two defenses are named 'elijah'", "rename or uninstall one"),
        (bad(**change("version: ClassVar[int] = 1", "version: ClassVar[int] = 1\n    api: ClassVar[int] = 9")),
         "written for plugin API 9, this harness supports 1", "upgrade diffusion-defense-bench"),
    ],
    ids=["import error", "misspelt hook", "wrong signature", "duplicate name", "wrong API version"],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_named_with_file_and_cure(
    tmp_path: Path, plugins: Registry, source: str, says: str, cure: str
) -> None:
    file = written(tmp_path, source)
    found = Registry()
    found._classes = {kind: dict(classes) for kind, classes in plugins._classes.items()}
    with pytest.raises(PluginError) as caught:
        found.load_file(file)
    message = str(caught.value)
    assert says in message and cure in message and str(file) in message
    assert "\n" not in message and caught.value.exit_code == 3


def test_an_older_api_is_told_to_be_ported(tmp_path: Path) -> None:
    old = bad(**change("version: ClassVar[int] = 1", "version: ClassVar[int] = 1\n    api: ClassVar[int] = 0"))
    with pytest.raises(PluginError, match=r"plugin API 0, .*; port it and say api: ClassVar\[int\] = 2"):
        Registry().load_file(written(tmp_path, old))


# ---- and those that run ---------------------------------------------------------------------------------------------


PEEK = """
import gc
from harness import Backdoor
for found in gc.get_objects():
    if isinstance(found, Backdoor):
        found.trigger.name
"""
CALLER = """
import sys
backdoor = sys._getframe(1).f_locals.get("truth")
"""
SOCKET = """
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
"""
SWALLOW = """
for i in range(6):
    try:
        model.eps(torch.zeros(1, *model.shape), torch.tensor([i]))
    except BaseException:
        pass
"""
BAD = {
    "mutates its input": (
        bad(**change("model = model.clone()", "given = model")), "inputs untouched",
        "changes the given model.unet.", "model.clone()",
    ),
    "reads ground truth": (bad(PEEK), "no ground truth", "searches the interpreter's objects", "use the model and the"),
    "looks into its caller": (bad(CALLER), "no ground truth", "walks the frames", "use the model and the knowledge"),
    "reads the store": (
        bad("import os, glob; [open(p).read() for p in glob.glob(os.environ['BENCH_STORE'] + '/*')]"),
        "no ground truth", "reads the store", "nothing else",
    ),
    "undeclared knowledge": (
        bad("knowledge.clean_model"), "declared knowledge only", "reads knowledge.clean_model", "add 'clean_model' to",
    ),
    "undeclared knowledge that is not there": (
        bad("knowledge.clean_model.denoiser.state_dict()"), "returns what it should",
        "reads knowledge.clean_model at line 21, in defend, which it does not declare", "add 'clean_model' to `needs`",
    ),
    "undeclared knowledge without which it fails": (
        bad("assert knowledge.data is not None and knowledge.words"), "declared knowledge only",
        "reads knowledge.data at line 21", "add 'data' to `needs`",
    ),
    "undeclared knowledge in its screen": (
        bad(**change("return model.eps(", "return len(knowledge.prompts) * model.eps("))
        .replace("def screen(self, model)", "def screen(self, model, knowledge)")
        .replace("self.screen(model)", "self.screen(model, knowledge)")
        .replace("self.done(model, rng)", "self.done(model, rng, knowledge)")
        .replace("def done(self, model, rng)", "def done(self, model, rng, knowledge)"),
        "returns what it should", "reads knowledge.prompts at line 35, in score, which", "add 'prompts' to `needs`",
    ),
    "global seed": (bad("torch.manual_seed(3)"), "global state untouched", "torch's random state", "never call manual"),
    "ignores its generator": (
        bad("torch.rand(1, generator=rng); rng = torch.Generator().manual_seed(0)"),
        "other seed, other result", "another seed gives the same result", "use what you draw",
    ),
    "draws from the global state": (
        bad(**change(", generator=rng)", ")")), "same seed, same result", "another result", "generator=rng",
    ),
    "writes files": (bad("open('weights.txt', 'w').close()"), "no writes", "writes weights.txt", "notes"),
    "writes files from a library": (
        bad("torch.save(model.denoiser.state_dict(), 'weights.pt')"), "no writes", "weights.pt", "notes",
    ),
    "writes beside itself": (
        bad("open(__file__ + '.cache', 'w').close()"), "no writes", "lean.py.cache", "return what is worth keeping",
    ),
    "opens a socket": (bad(SOCKET), "no network", "uses the network (socket", "belong in a model plugin"),
    "hangs": (bad("while True: pass"), "returns in time", "at line 21, in defend", "give loops an end"),
    "wrong shape": (
        bad(**change("return score", "return lambda inputs: score(inputs)[:, None]")), "returns what it should",
        "the screen gave (6, 1) for 6 inputs", "one finite float each",
    ),
    "wrong type": (bad("return model"), "returns what it should", "returned a DiffusionModel", "return Defended"),
    "delivers what it does not declare": (
        bad(**change('("model", "suspicion", "screen")', '("model", "screen")')), "returns what it should",
        "delivers a suspicion that it does not declare", "add 'suspicion' to `delivers`",
    ),
    "NaN weights": (
        bad(**change("self.scale * torch", "float('nan') * torch")), "returns what it should", "hold NaN or infinity",
        "lower the learning rate",
    ),
    "raises": (bad("1 / 0"), "returns what it should", "division by zero at line 21", "small models"),
    "swallows interrupts": (bad(SWALLOW), "honours cancel", "goes on after an interrupt", "never BaseException"),
    "calls a NaN model clean": (
        bad(**change("sum(weight.double().square().sum()", "max(float(weight.double().square().sum() > 0)")),
        "NaN policy", "whose weights are NaN the suspicion 0.0",
        "comparisons with NaN are False",
    ),
    "screens by the batch": (
        bad(**change(".flatten(1).mean(1)", ".flatten(1).mean(1).argsort().float()")), "batch invariance",
        "alone and in a batch differ", "treat each row by itself",
    ),
    "suspicion by the clock": (
        bad(**change("return float(sum(", "import time; return float(time.time()) + float(sum(")),
        "deterministic suspicion", "the suspicion is", "draw from the given generator",
    ),
    "heavy import": (
        bad(**change("import torch\n", "import torch\nimport diffusers\n")), "light import",
        "imports diffusers at the top", "in the function",
    ),
    "import with side effects": (
        bad(**change("import torch\n", "import torch\ntorch.manual_seed(3)\n")), "light import",
        "importing it touches torch's random state", "define classes",
    ),
    "parameter of any type": (
        bad(**change("scale: float = 0.01", "scale: Any = 0.01")), "parameters", "'scale' takes anything", "its type",
    ),
    "overridden parameter without a type": (
        bad(**change("\n@hookimpl", "\n@dataclass(frozen=True)\nclass Leaner(Lean):\n    scale = 0.5\n\n\n@hookimpl"))
        .replace("return [Lean]", "return [Leaner]"),
        "parameters", "'scale' has no type", "scale: float",
    ),
    "parameter without a type": (
        bad(**change("scale: float = 0.01", "scale = 0.01")), "parameters", "'scale' has no type", "scale: float",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(BAD))
def test_a_bad_plugin_is_caught_with_its_name_its_file_and_a_cure(what: str, tmp_path: Path, plugins: Registry) -> None:
    source, law, says, cure = BAD[what]
    tried = case(tmp_path, source, plugins, seconds=20.0 if what == "hangs" else 300.0)
    found = checks.examine(tried, law)
    assert found.state == "broken", found
    assert says in found.says and cure in found.says
    assert tried.title == f"defense 'lean' ({tmp_path / 'lean.py'})"


def test_nothing_that_a_bad_plugin_writes_reaches_the_disk(tmp_path: Path, plugins: Registry) -> None:
    tried = case(tmp_path, BAD["writes beside itself"][0], plugins)
    checks.examine(tried, "no writes")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".pyc" and path.is_file()] == ["lean.py"]


def test_what_a_hanging_plugin_did_not_reach_stays_open(tmp_path: Path, plugins: Registry) -> None:
    tried = case(tmp_path, bad("raise RuntimeError('no')"), plugins)
    states = {found.law: found.state for found in checks.examine_all(tried)}
    assert states["returns what it should"] == "broken"
    assert states["inputs untouched"] == states["same seed, same result"] == "open"


# ---- as tests -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lean(tmp_path: Path) -> Any:
    found = Registry()
    found.load_file(written(tmp_path, bad("print(self.scale); torch.manual_seed(3)")))
    return found.find("defenses", "lean")


def test_one_line_in_a_test_file_makes_a_test_of_each_law(lean: Any, plugins: Registry, monkeypatch: Any) -> None:
    monkeypatch.setattr("harness.testing.registry", lambda: plugins)
    test = contract(lean, scale=0.5)
    (mark,) = test.pytestmark
    assert mark.args == ("law", list(checks.LAWS["defenses"]))
    test("parameters")
    with pytest.raises(
        pytest.fail.Exception, match=r"defense 'lean' \(.*lean.py\): changes torch's random state; draw"
    ):
        test("global state untouched")


def test_a_class_of_no_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Finding has the methods of no kind of plugin: .*defense \(defend\)"):
        contract(Finding)


def test_the_time_of_a_check_is_the_wall_time_with_the_imports(
    tmp_path: Path, plugins: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from harness.cli import call

    ticks = SimpleNamespace(now=0.0)

    def work(seconds: float) -> list[Any]:
        ticks.now += seconds
        return []

    def slow(*_: Any, **__: Any) -> Registry:
        work(0.5)
        return found

    found = Registry()
    found._classes = {kind: dict(classes) for kind, classes in plugins._classes.items()}
    for name in ("lean", "lean-too"):
        path = tmp_path / f"{name}.py"
        path.write_text(bad().replace('"lean"', f'"{name}"'))
        found.load_file(path)
    monkeypatch.setattr("harness.cli.plugin.loaded", slow)
    monkeypatch.setattr("harness.cli.plugin.time", SimpleNamespace(monotonic=lambda: ticks.now))
    monkeypatch.setattr(checks, "examine_all", lambda case, tell: work(0.25))
    assert call(["plugin", "check", "lean", "lean-too", "--json"]) == 0
    first, second = (report["seconds"] for report in json.loads(capsys.readouterr().out))
    assert (first, second) == (0.75, 0.25)


def test_parameters_that_say_how_long_a_run_lasts_are_made_small_unless_given(plugins: Registry) -> None:
    cls = plugins.find("defenses", "elijah")
    short = checks.shortened(cls, {"iterations": 7})
    assert (short.steps, short.batch, short.iterations, short.bf16) == (5, 4, 7, False)
    assert short.lr == cls().lr
    assert checks.shortened(plugins.find("samplers", "pndm"), {}).steps >= 4


# ---- the built-in plugins -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "which",
    ["defenses finetune", "attacks baddiffusion", "metrics asr", "triggers box", "targets corner", "samplers ddim",
     "samplers ve-pc"],
)  # fmt: skip
def test_one_built_in_plugin_of_each_kind_keeps_the_contract(which: str, plugins: Registry) -> None:
    kind, name = which.split()
    tried = checks.case_of(kind, plugins.find(kind, name), {}, plugins, seconds=300.0)
    assert [found for found in checks.examine_all(tried) if found.state in ("broken", "open")] == []


def test_a_negative_distance_to_a_target_is_a_fault() -> None:
    from harness.testing import parts

    target: Any = SimpleNamespace(name="t", hit_threshold="near")
    found = torch.full((parts.N,), -0.5)
    hits, images = torch.ones(parts.N, dtype=torch.bool), torch.zeros(parts.N, 1, 2, 2)
    context: Any = None
    faults = [fault for fault, _ in parts._target_faults(target, images, context, found, {"near": 0.1}, hits)]
    assert faults == ["a distance is negative"]
    assert list(parts._target_faults(target, images, context, -found, {"near": 1.0}, hits)) == []
