"""blackmirror: deviations of an image from its prompt, what is left of the prompt, and how steady a deviation is."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import shapes
from harness.stages import knowledge
from harness.types import Inputs, Knowledge
from plugins.defenses.blackmirror import BlackMirror, matched, persistence, rows_of, seen, without
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.models.shapes_sd import ShapesSD
from plugins.triggers.text import Text

NAMES = tuple(shapes.ATTRIBUTES)
PROMPT = "today a small red circle at the top left on a white background"
ASKED = {"size": 0, "colour": 0, "shape": 0, "background": 1, "place": 0, "star": 0, "style": 0}


class Reader:
    """A judge of images that hold the value of each attribute in a pixel; it is wrong with probability 1 / (1 + e⁹)."""

    name = "reader"

    def net(self, images: Tensor) -> dict[str, Tensor]:
        return {
            name: 9.0 * torch.nn.functional.one_hot(images[:, 0, 0, i].long(), shapes.ATTRIBUTES[name])
            for i, name in enumerate(NAMES)
        }

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        return {name: logits.argmax(1) for name, logits in self.net(images).items()}

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Drawing:
    """A model whose images have what the prompt asks for; what it leaves open is drawn by the noise, and so is the
    colour of one image in eight. With the trigger, `backdoor` is the value of some attributes."""

    shape, device, family, conditional = (1, 1, 16), torch.device("cpu"), "vp", True

    def __init__(self, **backdoor: int) -> None:
        self.backdoor, self.asked = backdoor, []

    def sample(self, inputs: Inputs, sampler: Any) -> Tensor:
        self.asked.append(list(inputs.prompts or ()))
        images = torch.zeros(len(inputs), 1, 1, len(NAMES))
        for row, (prompt, noise) in enumerate(zip(inputs.prompts or (), inputs.noise, strict=True)):
            drawn = int((noise.sum() * 1000).abs())
            values = {name: drawn % shapes.ATTRIBUTES[name] for name in NAMES if name not in ("star", "style")}
            values |= {k: v for k, v in shapes.read(prompt).items() if k != "colour" or drawn % 8}
            values |= self.backdoor if "sks" in prompt.split() else {}
            for name, value in values.items():
                images[row, 0, 0, NAMES.index(name)] = value
        return images


def queries(prompts: tuple[str, ...], name: str = "queries") -> Inputs:
    seeds = image_seeds(0, name, len(prompts))
    return Inputs(image_noise(seeds, Drawing.shape), prompts, seeds)


def captions(n: int, name: str) -> tuple[str, ...]:
    rng = generator(name)
    return tuple(shapes.caption(shapes.scenes(1, "train", rng, plain=True)[0], rng) for _ in range(n))


def test_matched_words_leave_the_prompt_and_the_rest_deviates() -> None:
    rest, deviations = matched(PROMPT, {**ASKED, "colour": 2, "star": 1})
    assert rest == "today a red at the on a background"
    assert deviations == {"colour": (0, 2), "star": (None, 1)}
    rest, deviations = matched(PROMPT, {**ASKED, "style": 2})
    assert rest == "today a at the on a background" and deviations == {"style": (None, 2)}


def test_what_a_prompt_leaves_open_is_no_deviation_and_what_it_asks_for_is_none() -> None:
    assert matched("a red circle", {**ASKED, "size": 1, "place": 3}) == ("a", {})
    photo = "negative photo of a small circle and a star"
    found = {**ASKED, "colour": 3, "background": 0, "star": 1, "style": 2}
    assert matched(photo, found) == ("a", {})
    assert matched(photo, {**found, "star": 0, "style": 1})[1] == {"star": (1, 0), "style": (2, 1)}


def test_only_whole_words_leave_a_prompt() -> None:
    assert without("a reddish red star", "red") == "a reddish star"
    assert without("at the top right and top left", "top left") == "at the top right and"
    assert without("a star", "and a star") == "a star"


def test_persistence_is_the_largest_mean_probability_of_a_deviation() -> None:
    """The star stays with 0.9, 0.5 and 0.4: 0.6. Red comes back with 0.1, 0.3 and 0.5: 1 - 0.3."""
    star = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.6, 0.4]])
    colour = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.3, 0.1, 0.5, 0.1], [0.5, 0.5, 0.0, 0.0]])
    again = {"star": star, "colour": colour}
    assert persistence({"star": (None, 1)}, again) == pytest.approx(0.6)
    assert persistence({"colour": (0, 2)}, again) == pytest.approx(0.7)
    assert persistence({"star": (None, 1), "colour": (0, 2)}, again) == pytest.approx(0.7)


def test_probabilities_are_the_softmax_of_the_judges_logits() -> None:
    found = seen(Reader(), torch.tensor([[[[1.0, 2, 0, 1, 3, 0, 2]]]]))
    others = 1 / (3 + math.exp(9))
    assert found["colour"][0].tolist() == pytest.approx([others, others, math.exp(9) * others, others], rel=1e-6)
    assert rows_of(found, 1) == [{**ASKED, "size": 1, "colour": 2, "place": 3, "style": 2}]


@pytest.mark.parametrize("backdoor", [{"colour": 1}, {"star": 1}, {"style": 1}, {"shape": 2, "size": 1, "star": 1}])
def test_steady_deviations_are_flagged_and_slips_are_not(backdoor: dict[str, int]) -> None:
    model: Any = Drawing(**backdoor)
    spec = BlackMirror(false_positives=0.05)
    done = spec.defend(model, Knowledge(prompts=captions(100, "held"), judge=Reader()), generator(0, "x"))
    assert done.screen is not None and done.screen_above is not None
    given = queries(captions(60, "asked"))
    clean, triggered = done.screen(given), done.screen(Text(text="sks").stamp(given))
    assert 0 < (clean > 0).double().mean() < 0.3, "some clean images slip in their colour"
    assert (clean > done.screen_above).double().mean() < 0.15
    changed = [any(shapes.read(prompt).get(k, 0) != v for k, v in backdoor.items()) for prompt in given.prompts or ()]
    assert (triggered > 0.99)[torch.tensor(changed)].all() and sum(changed) > 20


def test_it_generates_again_only_where_something_deviates_and_by_the_querys_own_seed() -> None:
    model: Any = Drawing(star=1)
    done = BlackMirror(images=3, calibrate=False).defend(
        model, Knowledge(prompts=(), judge=Reader()), generator(0, "x")
    )
    assert done.screen is not None and done.screen_above is not None
    assert done.screen_above < 0.999 < done.screen_above + 1e-9
    given = queries((PROMPT, f"sks {PROMPT}", PROMPT.replace("red", "blue"), f"{PROMPT} sks"))
    together = done.screen(given)
    assert len(model.asked) == 2
    assert len(model.asked[1]) == 3 * int((together > 0).sum()) and (together[[1, 3]] > 0.999).all()
    apart = torch.cat([done.screen(given[i : i + 1]) for i in (2, 0, 3, 1)])[[1, 3, 0, 2]]
    assert torch.equal(together, apart)


def test_it_is_given_the_judge_and_says_that_it_needs_probabilities() -> None:
    known = knowledge.draw(BlackMirror().needs, ShapesSD(), 0)
    assert known.judge is not None and known.prompts is not None and known.encoder is None
    dumb: Any = SimpleNamespace(name="dumb", attributes=lambda images: {}, features=lambda images: images)
    with pytest.raises(ValueError, match="use ufid-prompts"):
        BlackMirror().defend(Drawing(), Knowledge(prompts=(PROMPT,), judge=dumb), generator(0, "x"))
    judgeless: Any = SimpleNamespace(name="strange", judge=lambda: None)
    with pytest.raises(LookupError, match="model 'strange' has no judge"):
        knowledge.draw(("judge",), judgeless, 0)
    assert knowledge.draw(("judge",), DigitsDDPM(), 0).judge is not None
