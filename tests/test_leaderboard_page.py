"""The built page in a real headless Chromium, offline: what a reader can do, and what a hostile record cannot.

Skipped where there is no Chromium or no playwright. `BENCH_SCREENSHOTS=DIR` keeps screenshots to look at.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.registry import kept
from harness.runs.record import Record
from harness.types import Score
from leaderboard import population, results, site
from leaderboard.results import sheet_name
from tests import chromium
from tests.chromium import Watched
from tests.records import picture, record, score, small, write_suite
from tests.test_leaderboard import hostile, left_out

pytestmark = chromium.needed
browser, visit = chromium.browser, chromium.visit

NUMBERS = "#cells .tabulator-row .tabulator-cell[tabulator-field=f0] > div > span:first-child"
NAMES = "#cells .tabulator-row .tabulator-cell[tabulator-field=d] a"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    write_suite(out / "results", small())
    site.build(results.read(out / "results"), out / "page")
    return out / "page" / "index.html"


def column(page: Any, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def test_a_reader_sorts_by_mouse_and_by_keyboard(built: Path, visit: Callable[..., Watched]) -> None:
    seen = visit()
    page = seen.open(built)
    assert page.locator("#count").text_content() == "13 of 13 cells"
    page.get_by_role("button", name="ASR %").click()
    values = [float(x) for x in column(page, NUMBERS)]
    assert values == sorted(values) and len(values) == 13
    page.get_by_role("button", name="ASR %").focus()
    page.keyboard.press("Enter")
    assert [float(x) for x in column(page, NUMBERS)] == sorted(values, reverse=True)
    assert page.locator("[role=columnheader][aria-sort=descending]").count() == 1
    assert seen.quiet()


def test_what_was_not_measured_stands_last_in_both_directions(tmp_path: Path, visit: Callable[..., Watched]) -> None:
    write_suite(tmp_path / "results", small(), [left_out()])
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    page = visit().open(tmp_path / "page" / "index.html")
    for _ in range(2):
        page.get_by_role("button", name="ASR %").click()
        shown = column(page, NUMBERS)
        assert len(shown) == 14 and shown.index("n/a") == 13


def test_a_reader_filters_by_words_and_by_attack(built: Path, visit: Callable[..., Watched]) -> None:
    seen = visit()
    page = seen.open(built)
    page.locator("#find").press_sequentially("elijah villan")
    assert column(page, NAMES) == ["elijah"] and page.locator("#count").text_content() == "1 of 13 cells"
    page.locator("#find").fill("")
    page.locator("#attack").select_option("villandiffusion")
    assert page.locator("#count").text_content() == "6 of 13 cells"
    assert seen.quiet()


def test_views_are_chosen_by_keyboard_kept_in_the_address_and_hide_what_is_not_asked_for(
    built: Path, visit: Callable[..., Watched]
) -> None:
    seen = visit()
    page = seen.open(built)
    assert page.locator("section.view:visible").count() == 1
    assert page.get_by_text("Given the trigger", exact=True).is_visible()
    page.locator("input[name=given][value=any]").focus()
    page.keyboard.press("ArrowRight")
    assert seen.address().endswith("#unconditional/purification/blind")
    assert not page.get_by_text("Given the trigger", exact=True).is_visible()
    assert "skd" not in column(page, NAMES) and "none" in column(page, NAMES), "controls stay"
    page.locator("input[name=task][value=attacks]").check()
    assert page.get_by_role("heading", name="Attacks: unconditional models").is_visible()
    page = seen.open(built, "#unconditional/purification/given")
    assert page.locator("input[name=given][value=given]").is_checked() and "terd" not in column(page, NAMES)
    assert seen.quiet()


def test_the_address_holds_filters_order_and_columns_and_a_link_to_it_shows_the_same(
    built: Path, visit: Callable[..., Watched]
) -> None:
    seen = visit()
    page = seen.open(built)
    page.locator("#attack").select_option("villandiffusion")
    page.locator("#find").fill("hat")
    page.get_by_role("button", name="ASR %").click()
    page.locator("details.columns summary").click()
    seen.keep("columns")
    page.get_by_label("Knowledge").uncheck()
    assert page.locator(".tabulator-col[tabulator-field=t]").count() == 0
    there, fragment = column(page, NAMES), seen.address().partition("#")[2]
    assert len(there) == 6 and "sort=ASR" in fragment and "hide=Knowledge" in fragment
    again = visit()
    page = again.open(built, f"#{fragment}")
    assert column(page, NAMES) == there and page.locator("#find").input_value() == "hat"
    assert page.locator("#attack").input_value() == "villandiffusion"
    assert page.locator("[role=columnheader][aria-sort=ascending]").count() == 1
    assert page.locator(".tabulator-col[tabulator-field=t]").count() == 0
    page.locator("details.columns summary").click()
    page.get_by_label("Knowledge").check()
    assert page.locator(".tabulator-col[tabulator-field=t]").count() == 1 and "hide" not in again.address()
    page.get_by_role("link", name="claims of the papers").click()
    assert page.locator("#find").input_value() == "hat", "a link to a place on the page changes no filter"
    assert seen.quiet() and again.quiet()


def test_a_cells_page_opens_with_its_images_and_leads_to_its_defense(
    built: Path, visit: Callable[..., Watched]
) -> None:
    seen = visit()
    page = seen.open(built)
    page.locator(NAMES).filter(has_text="elijah").first.click()
    page.wait_for_url("**/cells/*.html")
    assert "Roboto" in page.evaluate("getComputedStyle(document.body).fontFamily"), "the shared style sheet applies"
    picture = page.locator("figure.sheet img")
    picture.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('figure.sheet img').naturalWidth > 0")
    assert page.locator("pre").text_content().startswith("bench reproduce ")
    assert page.get_by_text("0.42", exact=False).count() or page.get_by_text("0.31", exact=False).count()
    page.locator(".crumbs a").last.click()
    page.wait_for_url("**/defenses/elijah.html")
    assert page.get_by_role("heading", name="What papers report").is_visible()
    assert seen.quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_the_pages_fit_a_desk_and_a_phone_in_light_and_dark(
    built: Path, visit: Callable[..., Watched], width: int, scheme: str
) -> None:
    seen = visit(width, color_scheme=scheme)
    cell = min((built.parent / "cells").glob("*.html"))
    for name, path in {"index": built, "cell": cell, "defense": built.parent / "defenses" / "skd.html"}.items():
        page = seen.open(path)
        seen.keep(f"{name}-{width}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(x) for x in ground[4:-1].split(",")) < 200) == (scheme == "dark")
    assert seen.quiet()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_a_reader_finds_the_claims_of_the_papers_and_the_cells_behind_them(
    tmp_path: Path, visit: Callable[..., Watched], width: int, scheme: str
) -> None:
    place = {"attack": "badt2i(steps=1200)", "target": "patch()", "knowledge": ["trigger", "data"]}
    made = [record(f"skd-cag(steps={'8' * 60})", k, seed=seed, **place) for seed, k in enumerate((1, 0, 2))]
    made += [record("sau()", 60 + k, seed=k, **place) for k in range(3)]
    write_suite(tmp_path / "results", made)
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    seen = visit(width, color_scheme=scheme)
    page = seen.open(tmp_path / "page" / "index.html")
    page.get_by_role("link", name="claims of the papers").click()
    assert page.get_by_role("heading", name="Claims of the papers").is_visible()
    assert page.locator("tr#claim-skd-cag-pixel .outcome").text_content() == "holds"
    line = page.locator("tr#claim-sau-pixel")
    assert line.locator(".outcome").text_content() == "does not hold"
    page.locator("tr#claim-skd-cag-pixel summary").click()
    line.locator("summary").click()
    seen.keep(f"claims-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, ground = (page.evaluate(f"getComputedStyle({what}).{how}") for what, how in (
        ("document.querySelector('#claim-sau-pixel .outcome')", "color"), ("document.body", "backgroundColor"),
    ))  # fmt: skip
    light = [sum(int(x) for x in colour[4:-1].split(",")) for colour in (ink, ground)]
    assert abs(light[0] - light[1]) > 200, "the outcome stands out from the page"
    line.locator("li a").first.click()
    page.wait_for_url("**/cells/*.html")
    assert seen.quiet()


def test_without_scripts_every_table_is_there(built: Path, visit: Callable[..., Watched]) -> None:
    seen = visit(java_script_enabled=False)
    page = seen.open(built)
    assert page.get_by_role("heading", name="Purification: unconditional models").is_visible()
    assert page.get_by_role("heading", name="Attacks: unconditional models").is_visible()
    assert page.get_by_text("Sorting and filtering need JavaScript").is_visible()


def test_markup_and_formulas_in_every_string_stay_text(tmp_path: Path, visit: Callable[..., Watched]) -> None:
    write_suite(tmp_path / "results", hostile(), [left_out()])
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    seen, shown = visit(), 0
    for path in [tmp_path / "page" / "index.html", *(tmp_path / "page").glob("*/*.html")]:
        page = seen.open(path)
        assert page.evaluate("window.pwned") is None, path
        assert page.locator("img[src=x]").count() == 0
        scripts = page.evaluate("document.scripts.length")
        assert scripts == (3 if path.name == "index.html" else 0)
        shown += "<script>window.pwned" in page.locator("body").inner_text()
    assert shown >= 5, "it is shown, as text"
    assert seen.quiet()


def test_the_policy_stops_a_script_that_got_in(built: Path, tmp_path: Path, visit: Callable[..., Watched]) -> None:
    shutil.copytree(built.parent, tmp_path / "page")
    path = tmp_path / "page" / "index.html"
    path.write_text(path.read_text().replace("<main>", "<main><script>window.pwned=1</script>", 1))
    seen = visit()
    page = seen.open(path)
    assert page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in line for line in seen.said)


@pytest.mark.slow
def test_two_thousand_records_build_quickly_into_a_light_page_that_shows_at_once(
    tmp_path: Path, visit: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(n: int) -> dict[str, Score]:
        """What a detector says of a model: its suspicion and two features."""
        seen = {"suspicion": n * 0.377 % 1, "feature[u]": n * 0.618 % 1, "feature[v]": n * 0.414 % 1}
        return {name: score(value, 1) for name, value in seen.items()}

    rows: list[Record] = []
    for sampler in (f"ddim(steps={k})" for k in (10, 20, 50, 100, 250)):
        for attack in (f"attack{a}(rate={rate})" for a in range(5) for rate in (0.1, 0.2)):
            rows += [record("none", attack=attack, sampler=sampler)]
            rows += [record("finetune(steps=100)", 74, attack=attack, sampler=sampler)]
            rows += [record(f"defense{d}(lr=0.1, steps={d})", d * 2, attack=attack, sampler=sampler,
                            knowledge=["trigger"] if d % 2 else ["data"]) for d in range(32)]  # fmt: skip
    rows += [
        record(f"detector{d}", attack=attack, seed=seed, delivers=["suspicion"], knowledge=["data"],
               more=verdict(d + 7 * seed + a))
        for d in range(3)
        for a, attack in enumerate(["none(steps=600)", *(f"attack{a}" for a in range(4))])
        for seed in range(20)
    ]  # fmt: skip
    assert len(rows) == 2000
    suite = results.Results("many", tmp_path, tuple(rows))
    (tmp_path / "sheets").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no forest is known yet
    monkeypatch.setattr(population, "derived", kept.Kept("derived"))
    forests, fitted = list[Any](), population.fitted
    monkeypatch.setattr(population, "fitted", lambda *features: forests.append(features) or fitted(*features))
    (tmp_path / sheet_name(picture())).write_bytes(picture())
    spent = time.process_time()  # not wall time: the machine may be shared
    assert site.build([suite], tmp_path / "page")["records"] == 2000
    assert time.process_time() - spent < 200, "about 20 s on a loaded core, of which 72 forests take half"
    assert len(forests) == 3 * 4 * (1 + population.FOLDS), "each forest of a page is fitted once"
    index = tmp_path / "page" / "index.html"
    assert index.stat().st_size < 2_000_000
    seen = visit()
    page = seen.open(index)
    page.locator("#cells .tabulator-row").first.wait_for()
    entries = page.evaluate("performance.getEntriesByName('first-table').map((mark) => mark.startTime)")
    assert entries and entries[0] < 10_000, "far below a second on a machine that does nothing else"
    assert page.locator("#count").text_content() == "1700 of 1700 cells"  # detectors have a table of their own
    assert page.locator("#cells .tabulator-row").count() < 200, "only the rows in sight are drawn"
    assert seen.quiet()
