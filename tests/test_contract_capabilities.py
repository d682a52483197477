"""Optional capabilities of plugins: their Protocols, registration, the suite, plugins of API 1, and the docs."""

import re
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from harness import capabilities, types
from harness.capabilities import CAPABILITIES, TRIGGER_CAPABILITIES, members, offers
from harness.judges.evidence import reachable
from harness.methods import learned_triggers
from harness.methods.trigger_placement import scale_of
from harness.registry import Registry, load
from harness.registry.contract import faults
from harness.registry.hookspecs import API_VERSION
from harness.runs.suite import impossible, load_suite
from harness.stages.sample import sample, wrapped
from harness.testing import tiny
from harness.testing.checks import case_of, examine
from harness.types import Backdoor, Inputs

DOCS = Path(__file__).parent.parent / "docs" / "plugins.md"


@dataclass(frozen=True)
class Word:
    """A text trigger with no optional capability."""

    name: ClassVar[str] = "word"
    version: ClassVar[int] = 1
    modality: ClassVar[str] = "text"

    start: str = "zq"

    def apply(self, prompt: str) -> str:
        return f"{self.start} {prompt}"

    def stamp(self, inputs: Inputs) -> Inputs:
        return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts or ()])

    def wrong(self, k: int) -> "Word":
        return replace(self, start=f"z{k}")


@dataclass(frozen=True)
class Tint:
    """A noise trigger with no optional capability."""

    name: ClassVar[str] = "tint"
    version: ClassVar[int] = 1
    modality: ClassVar[str] = "noise"

    level: float = 0.5

    def delta(self, shape: Any) -> torch.Tensor:
        return torch.full(tuple(shape), self.level)

    def stamp(self, inputs: Inputs) -> Inputs:
        return inputs.with_noise(inputs.noise + self.level)

    def wrong(self, k: int) -> "Tint":
        return replace(self, level=1.0 + k)


@dataclass(frozen=True)
class Grey:
    name: ClassVar[str] = "grey"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "image"
    hit_threshold: ClassVar[str] = "near"

    def distances(self, images: Any, context: Any) -> Any:
        return images.flatten(1).abs().mean(1)

    def thresholds(self, context: Any) -> dict[str, float]:
        return {"near": 0.1}

    def hits(self, images: Any, context: Any) -> Any:
        return self.distances(images, context) <= 0.1


@dataclass(frozen=True)
class Still:
    name: ClassVar[str] = "still"
    version: ClassVar[int] = 1
    nfe: ClassVar[int] = 1

    def run(self, model: Any, inputs: Inputs) -> torch.Tensor:
        return inputs.noise


@dataclass(frozen=True)
class Leave:
    name: ClassVar[str] = "leave"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ("trigger",)

    def defend(self, model: Any, knowledge: Any, rng: Any) -> types.Defended:
        return types.Defended(model=model.clone())


@dataclass(frozen=True)
class Count:
    name: ClassVar[str] = "count"
    version: ClassVar[int] = 1

    def measure(self, evidence: Any) -> dict[str, types.Score]:
        return {}


def extended(base: type, **more: Any) -> type:
    """A frozen dataclass: `base` with further attributes."""
    return dataclass(frozen=True)(type(f"Kit{base.__name__}", (base,), {"__annotations__": {}, **more}))


def told(self: Any, *given: Any) -> Any:
    raise NotImplementedError


# ---- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "base"),
    [("triggers", Word), ("triggers", Tint), ("targets", Grey), ("samplers", Still), ("defenses", Leave),
     ("metrics", Count)],
)  # fmt: skip
def test_a_plugin_needs_no_optional_capability(kind: str, base: type) -> None:
    assert faults(kind, extended(base)) == []


@pytest.mark.parametrize(
    ("kind", "base", "more", "says"),
    [
        ("triggers", Tint, {"biased_noise": True},
         r"biased_noise needs scale beside it \(ScalingTrigger\); write def scale\(self, shape\), or leave"),
        ("triggers", Tint, {"biased_noise": True, "scale": lambda self: 1},
         r"scale\(self\) cannot be called as scale\(shape\) .*; write def scale\(self, shape\)"),
        ("triggers", Tint, {"biased_noise": True, "scale": 0.5}, r"scale is not a method \(ScalingTrigger\)"),
        ("triggers", Tint, {"biased_noise": "yes", "scale": told},
         r"biased_noise: should be a valid boolean, got 'yes' \(ScalingTrigger\)"),
        ("triggers", Word, {"decoy": lambda self: self},
         r"decoy\(self\) cannot be called as decoy\(rng\) .*; write def decoy\(self, rng\)"),
        ("triggers", Word, {"decoy": 3}, "decoy is not a method"),
        ("triggers", Word, {"with_text": lambda self, text: self},
         r"with_text needs text beside it \(RewordableTrigger\); give it text, or leave with_text out"),
        ("triggers", Word, {"letter": "o"}, r"letter needs text beside it \(LetterTrigger\)"),
        ("triggers", Word, {"put": lambda self, prompt, places: prompt},
         r"put needs count beside it \(PlacedTrigger\); write def count\(self, prompt\)"),
        ("targets", Grey, {"of": lambda self: self}, r"write def of\(self, trigger\)"),
        ("targets", Grey, {"applicable_to": True}, "applicable_to is not a method"),
        ("targets", Grey, {"shown": lambda self: ""}, r"write def shown\(self, prompt\)"),
        ("targets", Grey, {"lesson": lambda self: None}, r"write def lesson\(self, caption\)"),
        ("targets", Grey, {"sources": "circle"}, "sources: 'str' instances are not allowed"),
        ("targets", Grey, {"relabelled": lambda self, caption: caption}, "relabelled needs label beside it"),
        ("targets", Grey, {"image": lambda self, shape: None}, "image needs region beside it"),
        ("targets", Grey, {"accepts_models": "shapes-sd"}, "accepts_models: 'str' instances are not allowed"),
        ("samplers", Still, {"vanilla": lambda self: self},
         r"vanilla needs with_trigger beside it \(AttackersSampler\); write def with_trigger\(self, trigger\)"),
        ("samplers", Still, {"with_trigger": lambda self, trigger: self},
         r"with_trigger needs vanilla beside it \(AttackersSampler\); write def vanilla\(self\)"),
        ("samplers", Still, {"around": lambda self: self}, r"write def around\(self, inner\)"),
        ("samplers", Still, {"family": "edm"}, "family: should be 'vp', 've' or 'flow', got 'edm'"),
        ("samplers", Still, {"biased_noise": 1}, "biased_noise: should be a valid boolean"),
        ("samplers", Still, {"accepts_triggers": ("sound",)}, "accepts_triggers: .*should be 'noise' or 'text'"),
        ("defenses", Leave, {"requires_trigger": ("decoi",)},
         "requires_trigger 'decoi'; did you mean 'decoy'.* a plugin may require: text, with_text, decoy"),
        ("defenses", Leave, {"requires_trigger": "decoy"}, "requires_trigger: 'str' instances are not allowed"),
        ("defenses", Leave, {"delivers": "model"}, "delivers"),
        ("defenses", Leave, {"keyed_libraries": "torch"}, "keyed_libraries: 'str' instances are not allowed"),
        ("metrics", Count, {"sets": ("backdoored/lost",)},
         "sets 'backdoored/lost'; did you mean 'backdoored/found'.* a metric may read: backdoored/found"),
    ],
)  # fmt: skip
def test_a_capability_that_is_half_there_is_a_fault_with_the_way_out(
    kind: str, base: type, more: dict[str, Any], says: str
) -> None:
    found = faults(kind, extended(base, **more))
    assert found and all("\n" not in fault for fault in found)
    assert re.search(says, found[0]), found


def test_a_model_that_says_its_work_says_all_of_it_and_a_recipe_takes_a_folder() -> None:
    sound = extended(tiny.Model, name="kit-model", __annotations__={"name": "ClassVar[str]"})
    assert faults("models", sound) == []
    (fault, _) = faults("models", extended(sound, work=1))
    assert "work needs latent beside it (MeasuredWork); give it latent, or leave work out" in fault
    (fault,) = faults("models", extended(sound, build=lambda self: {}))
    assert "write def build(self, out)" in fault


def test_a_whole_capability_is_none() -> None:
    whole: dict[str, Any] = {"text": "zq", "decoy": lambda self, rng: self, "with_text": lambda self, text: self}
    assert faults("triggers", extended(Word, **whole)) == []
    assert faults("triggers", extended(Tint, biased_noise=True, scale=lambda self, shape: shape)) == []
    off = extended(Tint, biased_noise=False)
    assert faults("triggers", off) == [] and scale_of(off(), (1, 2, 2)).tolist() == torch.ones(1, 2, 2).tolist()
    both: dict[str, Any] = {"vanilla": lambda self: self, "with_trigger": lambda self, trigger: self}
    assert faults("samplers", extended(Still, **both)) == []


def test_a_property_that_fails_is_the_plugins_fault() -> None:
    def required(self: Any) -> tuple[str, ...]:
        raise OSError("no such place")

    (fault,) = faults("defenses", extended(Leave, requires_trigger=property(required)))
    assert fault == "KitLeave: OSError: no such place"


# ---- who asks -------------------------------------------------------------------------------------------------------


def test_offers_takes_a_kinds_own_attributes_for_granted_and_sees_through_wrappers() -> None:
    shown = extended(Grey, shown=lambda self, prompt: f"grey {prompt}")()
    backdoor = reachable(Backdoor(extended(Word, apply=_where_there_is_an_o)(), shown), ("dog", "cat"))  # type: ignore[arg-type]
    target = backdoor.target
    assert type(target) is not type(shown)
    assert offers(target, capabilities.PromptTarget) and target.shown("cat") == "grey cat"
    assert offers(target, capabilities.ConditionalTarget) and target.applicable_to(("dog", "cat")).tolist() == [
        True,
        False,
    ]
    assert not offers(shown, capabilities.ConditionalTarget)


def _where_there_is_an_o(self: Any, prompt: str) -> str:
    return prompt.replace("o", "0")


def test_sampling_asks_for_an_attackers_process_and_a_defenders_wrapper() -> None:
    model, inputs = tiny.model("noise"), tiny.inputs(tiny.model("noise"), 2)

    def with_trigger(self: Any, trigger: Any) -> Any:
        return extended(Still, run=lambda self, model, inputs: torch.full_like(inputs.noise, trigger.level))()

    own: Any = extended(Still, vanilla=lambda self: Still(), with_trigger=with_trigger)()
    assert (sample(model, inputs, own, [Tint()]) == 0.5).all()  # type: ignore[list-item]
    assert not (sample(model, inputs, own, [None]) == 0.5).any()
    half: Any = extended(Still, with_trigger=with_trigger)()
    assert not (sample(model, inputs, half, [Tint()]) == 0.5).all()  # type: ignore[list-item]
    around: Any = extended(Still, around=lambda self, inner: ("around", inner))()
    plain: Any = Still()
    assert wrapped(plain, around) == ("around", plain)
    assert wrapped(plain, own) is own and wrapped(own, around) is own and wrapped(plain, None) is plain


@pytest.fixture(scope="module")
def real() -> Registry:
    return load(strict=True)


@pytest.mark.parametrize(
    ("attack", "defense", "target", "says"),
    [
        ("badt2i(decoys=0.2)", "none", "patch", "badt2i needs a trigger with decoy, word has none"),
        ("badt2i", "none", "patch", None),
        ("villan-caption(decoys=0.2)", "none", "cat", "villan-caption needs a trigger with decoy, word has none"),
        ("villan-caption", "none", "cat", None),
        ("eviledit(decoys=0.2)", "none", "object", "eviledit needs a trigger with decoy, word has none"),
        ("eviledit", "none", "object", None),
        ("rickrolling", "none", "style", "rickrolling needs a trigger with text, word has none"),
        ("rickrolling(decoys=0.2)", "none", "style", "rickrolling needs a trigger with text and decoy, word has none"),
        ("personalization", "none", "object", "personalization needs a trigger with text, word has none"),
        ("personalization(mode='dreambooth')", "none", "object", None),
        ("none", "skd-cag(target='random_words')", "patch", "skd-cag needs a trigger with with_text, word has none"),
        ("none", "skd-cag", "patch", None),
        ("none", "sau", "patch", "sau needs a trigger with text, word has none"),
    ],
)
def test_a_trigger_without_what_a_method_needs_of_it_is_impossible(
    real: Registry, attack: str, defense: str, target: str, says: str | None
) -> None:
    parts = {
        "model": real.build("models", "shapes-sd"),
        "attack": real.build("attacks", attack),
        "target": real.build("targets", target),
        "sampler": real.build("samplers", "ddim"),
        "defense": real.build("defenses", defense),
    }
    assert impossible(parts | {"trigger": Word()}) == says
    assert impossible(parts | {"trigger": real.build("triggers", "noun")}) is None


def test_an_expanded_suite_says_so_of_a_third_partys_trigger(tmp_path: Path) -> None:
    plugin = tmp_path / "wordy.py"
    plugin.write_text(
        textwrap.dedent("""
        from dataclasses import dataclass, replace
        from typing import ClassVar
        from harness import Inputs, hookimpl

        @dataclass(frozen=True)
        class Wordy:
            name: ClassVar[str] = "wordy"
            version: ClassVar[int] = 1
            modality: ClassVar[str] = "text"

            start: str = "zq"

            def apply(self, prompt):
                return f"{self.start} {prompt}"

            def stamp(self, inputs):
                return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts])

            def wrong(self, k):
                return replace(self, start=f"z{k}")

        @hookimpl
        def triggers():
            return [Wordy]
        """)
    )
    suite = tmp_path / "words.toml"
    suite.write_text(
        '[[grid]]\nmodel = "shapes-sd"\nattack = ["badt2i", "badt2i(decoys=0.2)"]\ntrigger = "wordy"\n'
        'target = "patch"\ndefense = ["none", "skd-cag(target=\'random_words\')"]\n'
    )
    found = load_suite(suite, load([plugin], strict=True))
    assert [cell.attack.partition("(")[0] for cell in found.cells] == ["badt2i"]
    assert [dropped.reason for dropped in found.dropped] == [
        "skd-cag needs a trigger with with_text, wordy has none",
        "badt2i needs a trigger with decoy, wordy has none",
        "badt2i needs a trigger with decoy, wordy has none",
    ]


def test_a_sampler_may_require_it_too(real: Registry) -> None:
    parts = {axis: real.build(f"{axis}s", spec) for axis, spec in
             {"model": "shapes-sd", "attack": "none", "target": "patch", "defense": "none"}.items()}  # fmt: skip
    sampler = extended(Still, requires_trigger=("letter",))()
    reason = impossible(parts | {"trigger": real.build("triggers", "text"), "sampler": sampler})
    assert reason == "still needs a trigger with letter, text has none"
    assert impossible(parts | {"trigger": real.build("triggers", "homoglyph"), "sampler": sampler}) is None


def test_the_kit_tries_a_defense_where_its_triggers_have_what_it_requires(real: Registry) -> None:
    able, more = (
        case_of("defenses", extended(Leave, requires_trigger=names), {}, real)
        for names in (("with_text", "decoy"), ("scale",))
    )
    assert [place.modality for place in able.places] == ["text"]
    assert examine(more, "returns in time").state == "n/a"


# ---- plugins of API 1 -----------------------------------------------------------------------------------------------


def renamed(base: type, **names: str) -> type:
    """A class as `base`, with no base, that says its attributes by the old names."""
    body = {k: v for k, v in vars(base).items() if not k.startswith("__") and k not in ("api",)}
    hints = {name: hint for name, hint in base.__annotations__.items() if name in body}
    for old, new in names.items():
        body[old] = body.pop(new)
        hints |= {old: hints.pop(new)} if new in hints else {}
    return dataclass(frozen=True)(type("Old", (), {"__annotations__": hints, **body}))


def test_a_class_of_api_1_gets_the_new_names_with_a_warning_that_names_them() -> None:
    old = renamed(Word, stamps="modality")
    with pytest.warns(DeprecationWarning, match=r"Old\.stamps is called modality since plugin API 2; write modality"):
        assert faults("triggers", old) == []
    assert old().modality == "text" == old.modality
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert faults("triggers", old) == []  # once

    target = renamed(extended_in_place(Grey), gate="hit_threshold", applies="applicable_to")
    with pytest.warns(DeprecationWarning) as heard:
        assert faults("targets", target) == []
    assert [re.findall(r"is called (\w+)", str(w.message))[0] for w in heard] == ["hit_threshold", "applicable_to"]
    made = target()
    assert made.hit_threshold == "near"
    assert offers(made, capabilities.ConditionalTarget) and made.applicable_to(("a", "b")).tolist() == [True, True]


def extended_in_place(base: type) -> type:
    """`base` with everything of its own in one class, and `applicable_to`."""
    body = {k: v for k, v in vars(base).items() if not k.startswith("__")}
    body["applicable_to"] = lambda self, prompts: torch.ones(len(prompts), dtype=torch.bool)
    return type("Target", (), {"__annotations__": dict(base.__annotations__), **body})


def test_a_parameter_by_the_old_name_is_read_from_the_instance() -> None:
    @dataclass(frozen=True)
    class Either(extended_in_place(Grey)):
        gate: str = "near"

    del Either.__mro__[1].hit_threshold
    with pytest.warns(DeprecationWarning, match="hit_threshold"):
        assert faults("targets", Either) == []
    assert Either("far").hit_threshold == "far"  # type: ignore[attr-defined]


def test_an_old_name_below_a_base_that_was_given_the_new_one_still_counts() -> None:
    base = renamed(extended_in_place(Grey), gate="hit_threshold")
    below = extended(base, gate="far")
    with pytest.warns(DeprecationWarning):
        assert faults("targets", base) == faults("targets", below) == []
    assert (base().hit_threshold, below().hit_threshold) == ("near", "far")


def test_a_class_that_says_both_or_the_new_names_alone_is_left_as_it_is() -> None:
    both = extended(Word, stamps="noise", modality="text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert faults("triggers", both) == [] == faults("triggers", extended(Word))
    assert both().modality == "text"


def test_api_2_does_not_know_the_old_names() -> None:
    assert API_VERSION == 2
    old = renamed(Word, stamps="modality")
    old.api = 2  # type: ignore[attr-defined]
    assert "Old: stamps is called modality since plugin API 2; rename it" in faults("triggers", old)
    old.api = 3  # type: ignore[attr-defined]
    (fault,) = faults("triggers", old)
    assert "written for plugin API 3, this harness supports 1 to 2; upgrade" in fault


# ---- the list -------------------------------------------------------------------------------------------------------


def protocols() -> dict[str, Any]:
    kinds = {"Trigger", "NoiseTrigger", "TextTrigger", "Target", "Judge", "TextImageScorer", "Model", "Sampler",
             "Attack", "Defense", "Metric"}  # fmt: skip
    every = [(module, vars(module)) for module in (capabilities, learned_triggers)]
    return {
        name: cls
        for module, names in every
        for name, cls in names.items()
        if isinstance(cls, type) and cls.__dict__.get("_is_protocol") and cls.__module__ == module.__name__
        if name not in kinds
    }


def test_every_optional_protocol_is_a_listed_capability_that_says_who_asks() -> None:
    listed = {capability.protocol.__name__ for capability in (*CAPABILITIES, *learned_triggers.CAPABILITIES)}
    assert listed == set(protocols())
    assert set(TRIGGER_CAPABILITIES.values()) <= {capability.protocol for capability in CAPABILITIES}
    for name, protocol in protocols().items():
        assert members(protocol) and set(_claims(protocol)) <= set(members(protocol)), name
        assert re.search(r"\bask", protocol.__doc__) and protocol.__doc__.count(". ") == 0, name


def _claims(protocol: type) -> tuple[str, ...]:
    every = (*CAPABILITIES, *learned_triggers.CAPABILITIES)
    return next(capability.claimed_by for capability in every if capability.protocol is protocol)


def test_the_docs_list_every_capability_with_its_attributes() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for name, protocol in protocols().items():
        row = next((row for row in rows if f"`{name}`" in row), None)
        assert row is not None, f"docs/plugins.md lists no {name}"
        missing = [member for member in members(protocol) if not re.search(rf"`{member}\b", row)]
        assert not missing, f"docs/plugins.md says of {name} no {missing}"


def test_the_docs_and_the_face_of_the_harness_name_the_api() -> None:
    import harness

    assert f"The current version is {API_VERSION}." in DOCS.read_text(encoding="utf-8")
    assert set(protocols()) <= set(dir(harness))
