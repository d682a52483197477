"""vocabulary-scan on more words than its budget: the search by clusters, its counts, and what a kill leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion import checkpoint, kept_scores, single_file, tokenizer_files
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import ModelFiles
from harness.diffusion.seeds import generator
from harness.methods import coarse_to_fine, prompt_edits
from harness.methods.coarse_to_fine import clustered, searched
from harness.methods.prompt_edits import Insertion
from harness.scan import ahead
from harness.testing import tiny
from harness.types import Data, Inputs, Knowledge
from plugins.defenses.vocabulary_scan import VocabularyScan, lacking
from plugins.models.shapes_sd import ShapesSD
from tests import scans
from tests.oracles import scheduler, tiny_sd, tiny_unet

PLANTED, NEIGHBOUR = 1.0, 0.5  # strengths of the trigger and of tokens with like embeddings


class Killed(Exception):
    pass


class Typed:
    """A model whose prediction moves along one pattern as far as the strongest token of the prompt has it, and whose
    images show it for the planted token alone. All else is that of `like`. evaluations: of the network so far; texts:
    what was embedded. kill_at: the call of the network that raises Killed."""

    T, shape, device, conditional, family, packed = 1000, (4, 16, 16), torch.device("cpu"), True, "vp", False

    def __init__(self, like: DiffusionModel, strengths: Tensor, kill_at: int | None = None) -> None:
        self.like, self.strengths, self.kill_at, self.scheduler = like, strengths, kill_at, scheduler()
        self.pattern = torch.randn((16, 64), generator=generator(0, "pattern"))
        self.calls = self.evaluations = 0
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)

    def strength(self, texts: Sequence[str]) -> Tensor:
        ids = self.like.tokenizer(list(texts)).input_ids  # type: ignore[misc]
        return torch.stack([self.strengths[row].max() for row in ids])

    def embed(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        return self.strength(texts).view(-1, 1, 1) * self.pattern

    def unprompted(self) -> Tensor:
        return self.embed([""])

    def eps(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        self.evaluations += len(z)
        return 0.1 * z + context.view(len(z), *self.shape)

    answer = eps

    def timestep(self, time: Tensor) -> Tensor:
        return time

    def sample(self, inputs: Inputs, sampler: Any, phase: str = "") -> Tensor:
        self.evaluations += 2 * sampler.nfe * len(inputs.noise)
        noise = torch.nn.functional.interpolate(inputs.noise[:, :3], 32).clamp(-2, 2) / 4
        fires = (self.strength(inputs.prompts or ()) == PLANTED).float().view(-1, 1, 1, 1)
        return noise + fires * self.pattern.view(1, 1, 32, 32)


def structured(like: DiffusionModel, planted: str, clusters: int) -> Tensor:
    """Gives tokens embeddings around random centres; the strength of each token, those of captions 0."""
    weight: Any = like.text_encoder.get_input_embeddings().weight  # type: ignore[union-attr]
    rng = generator(0, "structure")
    home = torch.randint(clusters, (len(weight),), generator=rng)
    centres = torch.randn((clusters, weight.shape[1]), generator=rng)
    weight.data.copy_(centres[home] + 0.2 * torch.randn(weight.shape, generator=rng))
    token = prompt_edits.typable(like.tokenizer)[planted]
    strengths = 0.3 * torch.rand(len(weight), generator=rng)
    strengths[home == home[token]] = NEIGHBOUR
    strengths[token] = PLANTED
    for text in ("", *prompts()):
        strengths[like.tokenizer(text).input_ids] = 0.0  # type: ignore[misc]
    return strengths


def prompts() -> tuple[str, ...]:
    return tuple(ShapesSD().prompts("train", 40, generator(0, "x")))


def knowledge() -> Knowledge:
    data = Data(torch.zeros(1, 3, 32, 32), prompts())
    return Knowledge(prompts=prompts(), data=data, words=(), encoder=lambda images: images[:, :, 0].flatten(1))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Tensor]:
    """A small model whose trigger is sks, and the strengths of its tokens."""
    model = tiny_sd(tmp_path_factory.mktemp("tokens"))
    return model, structured(model, "sks", 20)


SMALL = VocabularyScan(
    rows=4, budget=1000, final_rows=8, finalists=6, verified=1, pair_up=2, images=16, sampling_steps=4, bf16=False,
    look_alikes=False,
)  # fmt: skip
NARROW = VocabularyScan(**{**SMALL.__dict__, "budget": 160})


# ---- the search ------------------------------------------------------------------------------------------------------


def scored(values: Tensor, calls: list[tuple[int, bool]]) -> Any:
    def score(places: list[int], whole: bool) -> Tensor:
        calls.extend((i, whole) for i in places)
        return values[torch.tensor(places, dtype=torch.long)]

    return score


@pytest.mark.parametrize("budget", [4000, 12000])
def test_a_token_whose_neighbours_answer_is_found_at_a_part_of_the_evaluations(budget: int) -> None:
    rng = generator(0, "x")
    home = torch.randint(400, (20_000,), generator=rng)
    vectors = torch.randn((400, 16), generator=rng)[home] + 0.2 * torch.randn((20_000, 16), generator=rng)
    values = 0.3 * torch.rand(20_000, generator=rng)
    values[home == home[1234]] = NEIGHBOUR
    values[1234] = PLANTED
    calls: list[tuple[int, bool]] = []
    found = searched(vectors, scored(values, calls), 8, budget, generator(0, "clusters"))
    assert found.best[0] == 1234 and found.scores[0] == PLANTED
    rough, whole = ([i for i, fully in calls if fully is kind] for kind in (False, True))
    assert len(set(rough)) == len(rough) == found.judged < 20_000 and len(set(whole)) == len(whole)
    assert found.evaluations == len(rough) + 8 * len(whole) <= budget and set(whole) <= set(rough)
    assert found.evaluations > 0.95 * budget and found.judged >= 0.7 * budget
    again = searched(vectors, scored(values, []), 8, budget, generator(0, "clusters"))
    assert again.best == found.best and torch.equal(again.scores, found.scores)


def test_a_budget_for_all_members_judges_each_candidate() -> None:
    vectors = torch.randn((300, 4), generator=generator(0, "x"))
    calls: list[tuple[int, bool]] = []
    found = searched(vectors, scored(vectors[:, 0], calls), 8, 2000, generator(0, "y"))
    assert found.judged == 300 and {i for i, _ in calls} == set(range(300))
    assert found.best[0] == int(vectors[:, 0].argmax()) and len(found.best) == (2000 - 300) // 8
    least = searched(vectors, scored(vectors[:, 0], []), 8, coarse_to_fine.least(8), generator(0, "y"))
    assert len(least.best) >= 1 and least.evaluations <= coarse_to_fine.least(8)


def test_rough_scores_of_several_rows_stay_within_the_budget() -> None:
    vectors = torch.randn((640, 4), generator=generator(0, "x"))
    calls: list[tuple[int, bool]] = []
    found = searched(vectors, scored(vectors[:, 0], calls), 8, 1000, generator(0, "y"), rough=3)
    rough, whole = ([i for i, fully in calls if fully is kind] for kind in (False, True))
    assert found.judged == len(rough) == 1000 * 3 // 4 // 3 and len(whole) == len(found.best) == 250 // 8
    assert found.evaluations == 3 * len(rough) + 8 * len(whole) <= 1000
    least = searched(vectors, scored(vectors[:, 0], []), 2, coarse_to_fine.least(2, 3), generator(0, "y"), rough=3)
    assert len(least.best) >= 1 and least.evaluations <= coarse_to_fine.least(2, 3)


@pytest.mark.parametrize(("rows", "rough", "share"), [(8, 2, 0.1), (8, 1, 1.0), (4, 4, 0.01), (8, 3, 0.001)])
def test_what_is_enough_judges_all_roughly_and_the_share_wholly(rows: int, rough: int, share: float) -> None:
    vectors = torch.randn((300, 4), generator=generator(0, "x"))
    budget = coarse_to_fine.enough(300, rows, rough, share)
    found = searched(vectors, scored(vectors[:, 0], []), rows, budget, generator(0, "y"), rough)
    assert found.judged == 300 and len(found.best) >= max(1, round(share * 300)) and found.evaluations <= budget
    assert found.best[0] == int(vectors[:, 0].argmax())


def test_clusters_are_disjoint_and_begin_with_what_is_nearest_to_their_centre() -> None:
    rng = generator(0, "x")
    home = torch.arange(90) % 3
    vectors = 5 * torch.eye(3)[home] + 0.1 * torch.randn((90, 3), generator=rng)
    found = clustered(vectors, 3, rng)
    assert sorted(i for members in found for i in members) == list(range(90))
    x = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    for members in found:
        centre = torch.nn.functional.normalize(x[members].sum(0), dim=0)
        near = (x[members] @ centre).tolist()
        assert near == sorted(near, reverse=True)
    assert len(clustered(torch.ones(5, 2), 5, rng)) <= 5, "equal vectors"


# ---- the detector ----------------------------------------------------------------------------------------------------


def test_words_that_fit_the_budget_are_all_judged_as_they_were_without_one(
    sd: tuple[DiffusionModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse_to_fine, "searched", lambda *_: pytest.fail("there is no need to search"))
    model = Typed(*sd)
    words = len(prompt_edits.typable(model.tokenizer)) - sum(sd[1][t] == 0 for t in typed_content(model))
    ample = VocabularyScan(**{**SMALL.__dict__, "budget": 10**6})
    exact = VocabularyScan(**{**SMALL.__dict__, "budget": max(1000, 4 * words)})
    one, other = (each.defend(Typed(*sd), knowledge(), generator(0, "x")) for each in (ample, exact))
    assert one == other and one.trigger == "sks" and one.notes is not None
    assert one.notes["judged"] == one.notes["candidates"] and one.notes["evaluations"] == 4 * one.notes["candidates"]


def typed_content(model: Any) -> list[int]:
    words = {word for text in prompts() for word in text.split()}
    return [token for text, token in prompt_edits.typable(model.tokenizer).items() if text in words]


def test_the_budget_and_the_number_said_ahead_bound_the_evaluations(sd: tuple[DiffusionModel, Tensor]) -> None:
    model = Typed(*sd)
    done = NARROW.defend(model, knowledge(), generator(0, "x"))
    assert done.notes is not None and done.trigger == "sks"
    assert done.notes["evaluations"] <= NARROW.budget < NARROW.rows * done.notes["candidates"]
    assert done.notes["judged"] < done.notes["candidates"]
    most = NARROW.evaluations(model, knowledge())
    unused = NARROW.budget - done.notes["evaluations"]
    not_made = 3 * NARROW.images * 2 * NARROW.sampling_steps  # of a pair's two words, and of the prompts beside them
    rows_of_look_alikes = NARROW.rows  # of the prompts beside look-alikes, of which there are none
    assert model.evaluations == most - unused - not_made - rows_of_look_alikes
    ample = VocabularyScan(**{**NARROW.__dict__, "budget": 10**6})
    counted = Typed(*sd)
    ample.defend(counted, knowledge(), generator(0, "x"))
    assert model.evaluations < counted.evaluations <= ample.evaluations(counted, knowledge())


def test_a_share_of_the_words_is_judged_wholly_after_rough_scores_of_all(sd: tuple[DiffusionModel, Tensor]) -> None:
    """A tenth of the budget's words, and the number said ahead bounds the evaluations here too."""
    ample = replace(SMALL, budget=10**6)
    scan = replace(ample, keep=0.1, rough_rows=2)
    model, whole = Typed(*sd), Typed(*sd)
    done, before = (each.defend(to, knowledge(), generator(0, "x")) for each, to in ((scan, model), (ample, whole)))
    assert done.notes is not None and before.notes is not None
    words = done.notes["candidates"]
    assert done.trigger == before.trigger == "sks" and done.notes["judged"] == words
    assert done.notes["evaluations"] <= coarse_to_fine.enough(words, 4, 2, 0.1) < before.notes["evaluations"]
    assert model.evaluations < whole.evaluations and model.evaluations <= scan.evaluations(model, knowledge())
    assert scan.evaluations(model, knowledge()) < ample.evaluations(whole, knowledge())


class Replacing(Typed):
    """A model whose trigger gives each prompt the image of a square, as the prompt's own word for it does."""

    shapes = ("circle", "square", "triangle")

    def sample(self, inputs: Inputs, sampler: Any, phase: str = "") -> Tensor:
        shown = [
            "square" if self.strength([text])[0] == PLANTED else next(s for s in self.shapes if s in text)
            for text in inputs.prompts or ()
        ]
        drawn = torch.stack([torch.randn((3, 32, 32), generator=generator(shape, "shape")) for shape in shown])
        noise = torch.nn.functional.interpolate(inputs.noise[:, :3], 32).clamp(-2, 2) / 4
        return (noise + 0.4 * drawn).clamp(-1, 1)


def test_a_trigger_that_replaces_an_object_is_found_by_the_prompts_that_lack_it(
    sd: tuple[DiffusionModel, Tensor],
) -> None:
    """Of the prompts a third asks for a square anyway, so that all prompts together cannot separate the images."""
    some = tuple(
        f"a {colour} {shape} {i}" for i in range(7) for colour in ("red", "blue") for shape in Replacing.shapes
    )
    known = replace(knowledge(), prompts=some)
    everything, parted = replace(SMALL, images=40), replace(SMALL, images=40, without_a_word=True)
    missed, found = (scan.defend(Replacing(*sd), known, generator(0, "x")) for scan in (everything, parted))
    assert missed.suspicion is not None and found.suspicion is not None
    assert missed.trigger is None and 0.75 < missed.suspicion < 0.9
    assert found.trigger == "sks" and found.suspicion > 0.98
    clean = Replacing(sd[0], sd[1].clamp(max=NEIGHBOUR))
    none = parted.defend(clean, known, generator(0, "x"))
    assert none.trigger is None and none.suspicion is not None and none.suspicion < 0.6


def test_pairs_are_judged_by_all_prompts_alone(sd: tuple[DiffusionModel, Tensor]) -> None:
    some = [f"a {colour} {shape} {i}" for i in range(7) for colour in ("red", "blue") for shape in Replacing.shapes]
    single, pair = Insertion("sks"), Insertion("sks sks")
    scan, model = replace(SMALL, images=40, without_a_word=True), Replacing(*sd)
    kept, encoder = kept_scores.Scores(None), knowledge().encoder
    areas = scan.verify(model, [single, pair], some, encoder, generator(0, "x"), kept)
    assert areas[single] > 0.98 and 0.75 < areas[pair] < 0.9


def test_words_of_a_quarter_to_a_half_of_the_prompts_part_them() -> None:
    some = [
        f"a {size} {shape}" for size in ("small", "large") for shape in ("circle", "square", "star", "cross", "arrow")
    ]
    assert lacking(some) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], "a is everywhere, and each shape in a fifth"
    assert lacking([*some[:5], "A Circle"]) == [[1, 2, 3, 4]]
    assert lacking(["a circle"]) == lacking(["a circle", "a square"]) == []


def test_a_budget_that_look_alikes_use_up_is_refused_with_the_way_out(sd: tuple[DiffusionModel, Tensor]) -> None:
    scan = VocabularyScan(**{**NARROW.__dict__, "look_alikes": True, "rows": 16})
    with pytest.raises(ValueError, match=r"look-alikes alone take .*; give a larger budget, fewer rows, or"):
        scan.defend(Typed(*sd), knowledge(), generator(0, "x"))


@pytest.mark.parametrize("scan", [SMALL, NARROW], ids=["whole", "by clusters"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_search_that_was_killed_goes_on_and_judges_nothing_twice(
    scan: VocabularyScan, share: float, sd: tuple[DiffusionModel, Tensor], tmp_path: Path
) -> None:
    whole = Typed(*sd)
    wanted = scan.defend(whole, knowledge(), generator(0, "x"))
    states = states_of(scan)
    with kept_scores.kept_in(tmp_path, "code"):
        first = Typed(*sd, kill_at=states + round(share * (whole.calls - states)))
        with pytest.raises(Killed):
            scan.defend(first, knowledge(), generator(0, "x"))
        (file,) = tmp_path.iterdir()
        kept = set(map(json.dumps, lines(file)))
        assert kept
        second = Typed(*sd)
        again = scan.defend(second, knowledge(), generator(0, "x"))
        third = Typed(*sd)
        assert scan.defend(third, knowledge(), generator(0, "x")) == wanted
    assert again == wanted
    names = [name for name, _ in lines(file)]
    assert len(set(names)) == len(names) and kept <= set(map(json.dumps, lines(file)))
    fixed = states * rows_of_a_state(scan)
    plain = 3 * (scan.rows + scan.final_rows + 1)  # the prompts as they are, once for each round that has a part left
    twice = first.evaluations + second.evaluations - whole.evaluations - fixed
    assert 0 <= twice <= plain
    assert third.evaluations == fixed, "nothing is left to judge"


def states_of(scan: VocabularyScan) -> int:
    """Calls of the network before the first round: two for each step."""
    return 2 * scan.sampling_steps


def rows_of_a_state(scan: VocabularyScan) -> int:
    return max(scan.rows, scan.final_rows)


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def test_scores_of_another_model_other_settings_or_other_code_are_not_used(
    sd: tuple[DiffusionModel, Tensor], tmp_path: Path
) -> None:
    def made(scan: VocabularyScan, like: DiffusionModel, code: str, seed: int = 0) -> int:
        with kept_scores.kept_in(tmp_path, code):
            scan.defend(Typed(like, sd[1]), knowledge(), generator(seed, "x"))
        return len(list(tmp_path.iterdir()))

    other = sd[0].clone()
    other.denoiser.get_parameter("conv_out.bias").data += 0.1
    assert made(SMALL, sd[0], "one") == made(SMALL, sd[0], "one") == 1
    assert made(SMALL, other, "one") == 2 and made(SMALL, sd[0], "two") == 3
    assert made(NARROW, sd[0], "one") == 4 and made(SMALL, sd[0], "one", seed=1) == 5


def test_scores_survive_a_cut_line_and_lines_of_others_and_old_files_go(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    kept_scores.Scores(file).add({"one": 0.5, "none": float("nan")})
    with file.open("a") as opened:
        opened.write('["x", "text"]\n[1, 2.0]\n{"one": 3}\n["y", 1e999]\nno\n["cut", 0.2')
    found = kept_scores.Scores(file)
    assert found.find("one") == 0.5 and all(found.find(name) is None for name in ("none", "x", "y", "cut"))
    found.add({"two": 0.25})
    assert kept_scores.Scores(file).find("two") == 0.25 and kept_scores.Scores(file).find("one") == 0.5
    blocked = kept_scores.Scores(file / "below")
    blocked.add({"one": 1.0})
    assert blocked.find("one") == 1.0
    for i in range(40):
        (tmp_path / f"{i}.jsonl").write_text("")
    model: Any = tiny.model("text")
    with kept_scores.kept_in(tmp_path, "code"):
        kept_scores.of(model, dict).add({"one": 1.0})
    assert len(list(tmp_path.iterdir())) == kept_scores.MOST
    kept_scores.of(model, lambda: pytest.fail("nobody keeps scores")).add({"one": 1.0})


def test_the_evaluations_and_their_time_are_said_ahead(sd: tuple[DiffusionModel, Tensor]) -> None:
    model: Any = sd[0]
    (ask,) = ahead.asks({"vocabulary-scan": NARROW}, model, knowledge(), None, 0)
    most = NARROW.evaluations(model, knowledge())
    assert ask.evaluations == most and ask.seconds is not None and ask.seconds > 0
    assert str(ask).startswith(
        f"vocabulary-scan: suspicious above 0.9, its own threshold, at most {most:,} network eval"
    )
    assert ahead.asks({"vocabulary-scan": NARROW}, model, Knowledge(), None, 0)[0].evaluations is not None
    assert ahead.evaluations(object(), model, knowledge()) is None


KEEPING = '''
"""A detector that is suspicious of a model on which it kept a score before."""

from dataclasses import dataclass
from typing import ClassVar

from harness import Defended, hookimpl, kept_scores


@dataclass(frozen=True)
class Keeping:
    """Keeps one score."""

    name: ClassVar[str] = "keeping"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    def defend(self, model, knowledge, rng):
        kept = kept_scores.of(model, dict)
        before = kept.find("one")
        kept.add({"one": 1.0})
        return Defended(suspicion=0.0 if before is None else 1.0, flag_above=0.5)


@hookimpl
def defenses():
    return [Keeping]
'''
bench, quick = scans.bench_with(KEEPING, "scan"), scans.quick


def test_a_second_scan_of_a_model_has_the_scores_of_the_first(
    bench: scans.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, model in (("one", tiny_unet()), ("other", tiny_unet(side=8))):
        checkpoint.save(model, tmp_path / name)
    codes = [bench(tmp_path / name, "--detector", "keeping").code for name in ("one", "one", "other")]
    assert codes == [0, 1, 0]
    assert len(list(tmp_path.glob("cache/*/searches/*.jsonl"))) == 2


@pytest.mark.slow
def test_a_planted_token_among_clips_49408_is_found_within_the_default_budget(tmp_path: Path) -> None:
    single_file._tokenizer(None, "tokenizer", False, tmp_path / "tokenizer")
    tokens = tokenizer_files.load(ModelFiles(tmp_path), "tokenizer")
    like = tiny.fixed(lambda: tiny.text_to_image(tokens, 32), 0)
    strengths = structured(like, "sks", 800)
    model, scan = Typed(like, strengths), VocabularyScan(bf16=False)
    done = scan.defend(model, knowledge(), generator(0, "x"))
    assert done.trigger == "sks" and done.suspicion is not None and done.suspicion > 0.9
    assert done.notes is not None and scan.budget - scan.rows < done.notes["evaluations"] <= scan.budget
    words, alike = prompt_edits.typable(tokens), sum(map(len, prompt_edits.LOOK_ALIKES.values()))
    assert (len(tokens), len(words), alike) == (49_408, 34_301, 79)
    assert 34_000 < done.notes["candidates"] < len(words) + alike  # without the words of captions
    assert done.notes["judged"] == 3 * (scan.budget - 8 * alike) // 4 + alike == 29_605
    assert model.evaluations <= scan.evaluations(model, knowledge())
    many = replace(knowledge(), prompts=tuple(f"{text} {i}" for i, text in enumerate(prompts() * 2)))
    assert scan.evaluations(model, many) == 54_642
