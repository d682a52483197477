"""The papers' own numbers, from reported.toml: shown beside ours, never mixed with them."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

FILE = Path(__file__).parent / "reported.toml"
Text = Annotated[str, StringConstraints(min_length=1, max_length=400)]
Form = TypeVar("Form", bound=BaseModel)


class ReportedError(ValueError):
    """reported.toml says something malformed; the message names file, entry and field."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Paper(Strict):
    """A source. id: its arXiv number where it has one, which entries name."""

    id: Text
    title: Text
    venue: Text


class Number(Strict):
    """One number that a paper reports; the fields are explained at the top of reported.toml."""

    defense: Text
    attack: Text
    model: Text
    score: Text
    unit: Literal["share", "number"]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    ours: Text | None = None
    setting: str = ""
    order: str = ""
    target: str = ""
    settings: str | None = None
    paper: Text
    where: Text
    page: Annotated[int, Field(ge=1)] | None = None
    read: Literal["paper", "abstract", "secondary"]
    note: str = ""

    @model_validator(mode="after")
    def _one_number_or_a_range(self) -> Number:
        ranged = self.low is not None and self.high is not None
        if (self.value is None) != ranged or (self.low is None) != (self.high is None):
            raise ValueError("give either value, or low and high")
        numbers = [x for x in (self.value, self.low, self.high) if x is not None]
        if self.unit == "share" and any(not -1 <= x <= 1 for x in numbers):
            raise ValueError("a share lies between 0 and 1 (a change of one between -1 and 1): write 0.97 for 97 %")
        if self.order and (self.value is None or self.ours is None):
            raise ValueError("what is in an order needs value and ours")
        if ranged and self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low is above high")
        return self

    @property
    def cited(self) -> str:
        """ "Table 1, p. 7"."""
        return self.where if self.page is None else f"{self.where}, p. {self.page}"

    @property
    def shown(self) -> str:
        """The number as the page shows it: "97 %", "97–100 %", "2.8–4.1"."""
        scale, unit = (100, " %") if self.unit == "share" else (1, "")
        ends = [self.value] if self.value is not None else [self.low, self.high]
        return "–".join(f"{scale * x:.5g}" for x in ends if x is not None) + unit


class Reported(Strict):
    papers: tuple[Paper, ...]
    number: tuple[Number, ...]

    @model_validator(mode="after")
    def _papers_are_known(self) -> Reported:
        known = {paper.id for paper in self.papers}
        for entry in self.number:
            if entry.paper not in known:
                raise ValueError(f"number for {entry.defense} cites paper '{entry.paper}', which no [[papers]] has")
        return self

    def paper(self, identity: str) -> Paper:
        return next(paper for paper in self.papers if paper.id == identity)

    def of_defense(self, name: str) -> tuple[Number, ...]:
        """What papers report for the defense of that plugin name, in the order of the file."""
        return tuple(entry for entry in self.number if entry.defense == name)


def read(path: Path = FILE) -> Reported:
    """The file, checked. Raises ReportedError for the first thing that is wrong with it."""
    return parsed(Reported, path)


def parsed(form: type[Form], path: Path) -> Form:
    """A TOML file of this form. Raises ReportedError for the first thing that is wrong with it."""
    try:
        return form.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ReportedError(f"{path.name}: not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ReportedError(f"{path.name}: {place or 'file'}: {first['msg']}") from None


@cache
def shipped() -> Reported:
    return read()
