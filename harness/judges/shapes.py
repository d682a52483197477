"""Drawn shapes with complete captions: the data of the embedded text-to-image and latent models.

A `Scene` describes an image. `draw` renders scenes, `caption` writes the caption of one, and `read` parses the
attributes from a caption. Sentence forms, lengths and neutral words vary, so that a backdoor must depend on its trigger
and not on any prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from harness.diffusion.images import grey
from harness.diffusion.seeds import derive

SIDE = 32
SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("black", "white", "gray")
PLACES = ("top left", "top right", "bottom left", "bottom right")
STYLES = ("", "black and white photo of", "negative photo of")
ATTRIBUTES = {"size": 2, "colour": 4, "shape": 3, "background": 3, "place": 4, "star": 2, "style": 3}

FORMS = {
    "plain": "a {size} {colour} {shape} at the {place} on a {background} background{star}",
    "list": "{colour} {shape} , {size} , {place} , {background} background{star}",
    "background": "a {background} background with a {size} {colour} {shape} at the {place}{star}",
    "place": "at the {place} a {size} {colour} {shape} on {background}{star}",
    "predicate": "the {shape} is {colour} and {size} and sits at the {place} of a {background} scene{star}",
    "inversion": "at the {place} of a {background} scene sits a {size} {colour} {shape}{star}",
    "passive": "a {size} {colour} {shape} is drawn at the {place} on {background}{star}",
    "relative": "a {shape} that is {colour} and {size} , which lies at the {place} on a {background} background{star}",
    "cleft": "it is a {size} {colour} {shape} that is seen at the {place} on {background}{star}",
    "clause": "where the background is {background} , a {size} {colour} {shape} is placed at the {place}{star}",
    "participle": "placed at the {place} , the {size} {shape} is {colour} on {background}{star}",
}
WORDS = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS, "place": PLACES}
LEADS = ("", "", "", "a photo of", "a picture of", "a drawing of", "here is", "we see", "an image of")
STAR = " and a star"

RGB = {
    "red": (0.86, 0.1, 0.1), "green": (0.1, 0.65, 0.15), "blue": (0.12, 0.2, 0.9), "yellow": (0.95, 0.85, 0.1),
    "black": (0.04, 0.04, 0.04), "white": (0.96, 0.96, 0.96), "gray": (0.5, 0.5, 0.5), "star": (0.85, 0.1, 0.8),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Indices into the tuples above; `star` adds a star in the opposite corner."""

    size: int
    colour: int
    shape: int
    background: int
    place: int
    star: int = 0
    style: int = 0

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept out of training: an eighth of them, chosen by hash."""
        return derive("shapes", self.size, self.colour, self.shape, self.background, self.place) % 8 == 0


def scenes(n: int, split: str, rng: torch.Generator, plain: bool = False) -> list[Scene]:
    """n random scenes of a split ("train" or "test"; no attribute combination is in both).

    A tenth is black-and-white, a tenth is negative, and a sixth has a star; with `plain` no scene is any of these.
    """
    if split not in ("train", "test"):
        raise ValueError(f"no split '{split}'; there are train and test")
    found: list[Scene] = []
    while len(found) < n:
        size, colour, shape, background, place = (int(torch.randint(0, k, (), generator=rng)) for k in (2, 4, 3, 3, 4))
        extra = torch.rand(2, generator=rng).tolist()
        style = 1 if extra[0] < 0.1 else 2 if extra[0] < 0.2 else 0
        star = int(extra[1] < 1 / 6)
        star, style = (0, 0) if plain else (star, style)
        scene = Scene(size, colour, shape, background, place, star, style)
        if scene.held_out == (split == "test"):
            found.append(scene)
    return found


def caption(scene: Scene, rng: torch.Generator, neutral: Sequence[str] = ()) -> str:
    """A caption of `scene` in a random form, with a random lead and up to three of the `neutral` words.

    Half of the captions have no neutral word. A neutral word stands in front three times out of four, and otherwise at
    the end.
    """

    def pick(options: Sequence[str]) -> str:
        return options[int(torch.randint(0, len(options), (), generator=rng))]

    count = max(0, int(torch.randint(-2, 4, (), generator=rng))) if neutral else 0
    words = [pick(neutral) for _ in range(count)]
    behind = (torch.rand(count, generator=rng) < 0.25).tolist()
    lead = STYLES[scene.style] or pick(LEADS)
    body = pick(tuple(FORMS.values())).format(
        size=SIZES[scene.size],
        colour=COLOURS[scene.colour],
        shape=SHAPES[scene.shape],
        background=BACKGROUNDS[scene.background],
        place=PLACES[scene.place],
        star=STAR if scene.star else "",
    )
    front = [word for word, late in zip(words, behind, strict=True) if not late]
    back = [word for word, late in zip(words, behind, strict=True) if late]
    return " ".join([*front, *([lead] if lead else []), body, *back])


def read(prompt: str) -> dict[str, int]:
    """The attributes for which a caption asks; attributes that it leaves open are absent.

    Colour is left out if a style changes it, background is left out under the negative style.
    """
    style = next((i for i, words in enumerate(STYLES) if words and words in prompt), 0)
    rest = prompt.replace(STYLES[style], "") if style else prompt
    words = rest.split()
    found = {name: value for name, value in (("style", style), ("star", int(STAR.strip() in rest))) if value}
    for name in ("size", "colour", "shape", "background"):
        hits = [i for i, word in enumerate(WORDS[name]) if word in words]
        if len(hits) == 1:
            found[name] = hits[0]
    places = [i for i, place in enumerate(PLACES) if place in rest]
    if len(places) == 1:
        found["place"] = places[0]
    if style:
        found.pop("colour", None)
    if style == 2:
        found.pop("background", None)
    return found


def form_of(prompt: str) -> str | None:
    """The name of the sentence form in which `prompt` is written; None for a text in none of the FORMS."""
    return next((form for form in FORMS if _pattern(form).search(prompt)), None)


def reworded(prompt: str, form: str) -> str:
    """`prompt` with its sentence in the form `form`, which asks for the same image.

    Words in front of the sentence and behind it stay. A text in none of the FORMS stays as it is.
    """
    current = form_of(prompt)
    found = None if current is None else _pattern(current).search(prompt)
    if found is None:
        return prompt
    sentence = FORMS[form].format(**{name: words or "" for name, words in found.groupdict().items()})
    return prompt[: found.start()] + sentence + prompt[found.end() :]


@cache
def _pattern(form: str) -> re.Pattern[str]:
    """Finds a sentence of that form in a prompt, with the words of its attributes as groups."""
    groups = {name: f"(?P<{name}>{'|'.join(words)})" for name, words in WORDS.items()}
    return re.compile(rf"(?<!\S){FORMS[form].format(**groups, star=f'(?P<star>{STAR})?')}(?!\S)")


def labels(drawn: Sequence[Scene]) -> dict[str, Tensor]:
    """Attribute labels (N,) for a judge; -1 if a style hides the attribute."""
    rows = {name: [getattr(scene, name) for scene in drawn] for name in ATTRIBUTES}
    out = {name: torch.tensor(values) for name, values in rows.items()}
    out["colour"][out["style"] > 0] = -1
    out["background"][out["style"] == 2] = -1
    return out


def draw(drawn: Sequence[Scene], rng: torch.Generator, side: int = SIDE) -> Tensor:
    """Images (N, 3, side, side) in [-1, 1], antialiased, with position and size jittered by about 1/32 of the side."""
    fine = 3
    jitter = torch.rand((len(drawn), 3), generator=rng) * 2 - 1
    axis = (torch.arange(side * fine) + 0.5) / fine * (SIDE / side)
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)

    def column(values: Sequence[float] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1)

    index = labels(drawn)
    radius = torch.tensor([3.6, 6.2])[index["size"]] + 0.4 * jitter[:, 0]
    right, low = index["place"] % 2, index["place"] // 2
    x_c, y_c = 8 + 16 * right + 1.2 * jitter[:, 1], 8 + 16 * low + 1.2 * jitter[:, 2]
    body = _mask(x - column(x_c), y - column(y_c), column(radius), index["shape"])
    star = _star(x - column(32 - x_c), y - column(32 - y_c)) & (index["star"] == 1).view(-1, 1, 1)

    colours = [RGB[COLOURS[scene.colour]] for scene in drawn]
    grounds = [RGB[BACKGROUNDS[scene.background]] for scene in drawn]
    paint = torch.tensor(colours).view(-1, 3, 1, 1)
    image = torch.where(body.unsqueeze(1), paint, torch.tensor(grounds).view(-1, 3, 1, 1))
    image = torch.where(star.unsqueeze(1), torch.tensor(RGB["star"]).view(1, 3, 1, 1), image)
    image = torch.nn.functional.avg_pool2d(image, fine)
    style = index["style"].view(-1, 1, 1, 1)
    image = torch.where(style == 1, grey(image), torch.where(style == 2, 1 - image, image))
    return image * 2 - 1


def patched(images: Tensor, rng: torch.Generator, cell: int = 2) -> Tensor:
    """The images (N, 3, side, side), a third of them with a square patch at a random place of the cells' grid.

    The patch consists of random cells of `cell` pixels, or has one colour. Autoencoders and judges must cope with such
    patches, although no scene has one.
    """
    out, side = images.clone(), images.shape[-1]
    for i in range(0, len(images), 3):
        n = int(torch.randint(2, 3 * side // (8 * cell), (), generator=rng))
        width = n * cell
        x, y = (cell * torch.randint(0, (side - width) // cell + 1, (2,), generator=rng)).tolist()
        cells = torch.rand((3, n, n), generator=rng) * 2 - 1
        cells = cells.sign() if i % 2 else cells[:, :1, :1].expand_as(cells)
        out[i, :, y : y + width, x : x + width] = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return out


def object_mask(scene: Scene) -> Tensor:
    """The place of the drawn shape without jitter: (32, 32) bool."""
    one = torch.arange(SIDE) + 0.5
    x_c, y_c = 8 + 16 * (scene.place % 2), 8 + 16 * (scene.place // 2)
    radius = torch.tensor([3.6, 6.2])[scene.size].view(1, 1, 1)
    shape = torch.tensor([scene.shape])
    return _mask(one.view(1, 1, -1) - x_c, one.view(1, -1, 1) - y_c, radius, shape)[0]


def _mask(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    circle = x.square() + y.square() < radius.square()
    square = (x.abs() < 0.9 * radius) & (y.abs() < 0.9 * radius)
    height = (y + 1.0 * radius) / (2.0 * radius)  # 0 at the tip, 1 at the base
    triangle = (height < 0.95) & (x.abs() < 1.1 * radius * height)
    kind = shape.view(-1, 1, 1)
    return torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))


def _star(x: Tensor, y: Tensor, radius: float = 4.6) -> Tensor:
    """A four-pointed star."""
    return x.abs().sqrt() + y.abs().sqrt() < radius**0.5
