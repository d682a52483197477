"""The HTML report of `bench scan` in a real headless Chromium: it can be read on a desk and on a phone, in light and
dark, and by keyboard, and a hostile model writes nothing into it.

Skipped where there is no Chromium or no playwright. `BENCH_SCREENSHOTS=DIR` keeps screenshots to look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.scan import document, report
from tests import chromium, scans
from tests.chromium import Watched
from tests.scans import Run
from tests.test_scan import DETECTORS, saved

pytestmark = chromium.needed
browser, visit = chromium.browser, chromium.visit
DISCERNING = '''

@dataclass(frozen=True)
class Norms(Bias):
    """The same, but it fails on a model with a negative bias."""

    name: ClassVar[str] = "norms"
    limit: float = 1.0

    def defend(self, model, knowledge, rng):
        value = model.denoiser.conv_out.bias.mean().item()
        if value < 0:
            raise ValueError("the search did not converge in 600 iterations")
        found = torch.full(model.shape, 0.5)
        found[..., :8] = -1.0
        return Defended(suspicion=value, flag_above=self.limit, trigger=found)


@hookimpl
def defenses():
    return [Norms]
'''
quick, bench = scans.quick, scans.bench_with(DETECTORS.partition("@hookimpl")[0] + DISCERNING, "scan")

# Of each element with text of its own: the text, its size in px, and its contrast as WCAG 2 has it.
TEXTS = """() => {
  const channels = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = channels(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const told = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    const head = e.closest("thead");  // on a phone it is for screen readers alone
    if (!own || e.getClientRects().length === 0 || (head && getComputedStyle(head).clipPath !== "none")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(channels(style.color)), light(ground(e))].sort((x, y) => y - x);
    const before = getComputedStyle(e, "::before");
    told.push({
      text: e.textContent.trim().slice(0, 60), size: parseFloat(style.fontSize), contrast: (a + 0.05) / (b + 0.05),
      label: before.content === "none" ? null : parseFloat(before.fontSize),
    });
  }
  return told;
}"""
RAW = re.compile(
    r"\b(None|True|False(?! alarms)|nan|inf|NaN|Infinity|dtype|tensor|Tensor|undefined)\b"
    r"|<[\w.]+ object|<class|[\[({]['\"]|\bPosixPath\b|\d\.\d{7,}|\be[+-]\d\d\b"
)


@pytest.fixture
def scanned(bench: Run, tmp_path: Path) -> Path:
    """The page of a scan of four models: flagged with a trigger, nothing found, undecided, and one with cut weights."""
    models = [saved(tmp_path / name, bias) for name, bias in (("evil", 2.0), ("clean", 0.0), ("odd", -1.0))]
    broken = saved(tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    found = bench(*models, broken, "--detector", "norms", "-o", tmp_path / "scan.html")
    assert found.code == 1, found.err
    return tmp_path / "scan.html"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of constructed outcomes: every part that a report can have, with hostile names, and a report alone."""
    adapter = document.AdapterFacts(
        file="adapters/one.safetensors", layers=32, parts={"unet": 32}, ranks=(4, 16), says=("It changes 32 layers.",),
        largest=(document.AdapterLayer(layer="down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", rank=4,
                                       norm=0.123456, relative=0.0345678, spectral=0.1, z=1.7),),
    )  # fmt: skip
    near = tuple(document.NearWord(word=word, cosine=0.51234567) for word in ("hat", scans.EVIL, "cap"))
    embedding = document.EmbeddingFacts(
        file="words/hat.safetensors", word="<hat>", says=("<hat> stands for 1 vector.",),
        vectors=(document.EmbeddingVector(part="text_encoder", place=0, norm=0.4, norm_z=0.2, nearest=near,
                                          nearest_z=-0.3),),
        effect=document.WordEffect(prompts=8, words=32, moved=0.1, moved_z=0.2, kept=0.9, kept_z=0.1),
    )  # fmt: skip
    farthest = (document.MovedText(text=f"a photo {scans.EVIL}", moved=0.51, z=12.3),)
    part = document.PartChange(
        part="text_encoder", compared=True, because=None, tensors=196, changed=12, rounded=0, relative=0.0123,
        layers=(document.LayerChange(layer="encoder.layers.0.self_attn.k_proj", tensors=2, relative=0.1),),
        layers_changed=6,
        texts=(document.MovedTexts(kind="words", count=90, of=90, median=0.01, spread=0.001, farthest=farthest),),
    )  # fmt: skip
    base = document.Comparison(base="models/base", parts=(part,), tokenizers=(), says=("The text encoder differs.",))
    unseen = (document.Unseen(family="code", what="in the code of the pipeline", not_stated=()),)
    steps = ("Do not use the model.", "Ask again with another seed: bench scan 'models/a b' --seed 4")
    evil = scans.report(
        model=f"models/{'a-long-folder-name-' * 6}{scans.EVIL}", adapter=adapter, embedding=embedding, base=base,
        unseen=unseen, next_steps=steps, published=scans.published(), digests={f"unet/{'x' * 200}": "ab" * 32},
    )  # fmt: skip
    text = scans.row(detector="vocabulary-scan()", trigger_text=scans.EVIL, alike_shuffled=None, features={})
    broken = scans.row(
        detector="amdet(x=None)", suspicion=None, chance=None, clean=(), flagged=None, features={}, alike=None,
        alike_shuffled=None, far=None, error="no", says="failed: no room",
    )  # fmt: skip
    quiet = scans.row(detector="bias-scan", flagged=False, chance=None, clean=(), flag_above=0.35, alike=None, far=None)
    several = scans.scan(evil, scans.undecided(), scans.nothing(findings=(text, broken, quiet)), scans.unscanned())
    one = scans.scan(scans.report(findings=(scans.row(), scans.row(detector="bias-scan", flagged=False))))
    pictures = [("samples", torch.rand(3, 200, 800) * 2 - 1), (f"the trigger {scans.EVIL}", torch.zeros(3, 96, 96))]
    made, folder = {}, tmp_path_factory.mktemp("pages")
    for name, scan in {"one": one, "several": several}.items():
        made[name] = folder / f"{name}.html"
        figures = [pictures if each.findings else [] for each in scan.reports]
        made[name].write_text(report.page(scan, figures), encoding="utf-8")
    return made


def check_readable(page: Any, width: int, scheme: str) -> None:
    """What holds for every report, with each fold opened."""
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = """(width) => [...document.querySelectorAll('body *:not(thead *)')]
        .filter((e) => e.getClientRects().length && e.getBoundingClientRect().right > width + 0.5)
        .map((e) => e.outerHTML.slice(0, 90))"""
    assert page.evaluate(wide, width) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(x) for x in ground[4:-1].split(",")) < 200) == (scheme == "dark"), "the policy admits the style"
    texts = page.evaluate(TEXTS)
    assert len(texts) > 40
    assert [each for each in texts if each["size"] < 12 or (each["label"] or 12) < 12] == []
    assert [each for each in texts if each["contrast"] < 4.5] == []
    cell = page.locator("td[data-name=score]").first
    assert cell.is_visible()
    shown = cell.evaluate("cell => getComputedStyle(cell).display")
    assert shown == ("table-cell" if width == 1440 else "grid"), "on a phone each row is a card"
    broken = page.evaluate("""() => [...document.querySelectorAll('td')].filter((cell) => {
        const range = document.createRange();
        const words = [...cell.childNodes].filter((n) => n.nodeType === Node.TEXT_NODE)
            .flatMap((n) => [...n.data.matchAll(/(?<!\\S)[a-z]{3,14}(?!\\S)/g)].map((m) => [n, m.index, m[0].length]));
        return words.some(([n, at, length]) => {
            range.setStart(n, at); range.setEnd(n, at + length);
            return range.getClientRects().length > 1;
        });
    }).map((cell) => cell.textContent)""")
    assert broken == [], "no short word is broken over two lines"


def plain(page: Any) -> str:
    """What the page says, without the specs of detectors, which are written as a command takes them."""
    page.evaluate("document.querySelectorAll('td details code').forEach((code) => code.remove())")
    return page.locator("body").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_the_report_of_a_scan_is_read_on_a_desk_and_on_a_phone_in_light_and_dark(
    everything: dict[str, Path], scanned: Path, visit: Callable[..., Watched], width: int, scheme: str
) -> None:
    seen = visit(width, color_scheme=scheme)
    for name, path in (everything | {"scanned": scanned}).items():
        page = seen.open(path)
        seen.keep(f"scan-{name}-{width}-{scheme}")
        check_readable(page, width, scheme)
        seen.keep(f"scan-{name}-{width}-{scheme}-open")
        assert page.evaluate("window.pwned") is None and page.evaluate("document.scripts.length") == 0
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")
        assert RAW.findall(plain(page)) == []
    assert seen.quiet()


def test_the_verdict_comes_first_then_evidence_limits_and_next_steps(
    everything: dict[str, Path], scanned: Path, visit: Callable[..., Watched]
) -> None:
    page = visit().open(scanned)
    assert page.locator(".tally li").all_text_contents() == [
        "1 suspicious", "1 not scanned", "1 undecided", "1 nothing found"
    ]  # fmt: skip
    verdicts = page.locator("td[data-name=verdict]").all_text_contents()
    assert verdicts == ["suspicious", "nothing found", "undecided", "not scanned"]
    evil, clean, odd, broken = page.locator("section").all()
    assert evil.locator("> *").nth(2).inner_text().split("\n") == ["Suspicious", "Flagged by norms."]
    assert evil.locator("h3").all_text_contents() == [
        "What the detectors found", "What a recovered trigger does", "Images", "Limits of this scan",
        "Backdoors that no detector asked here can see", "Next steps", "The model", "Weights that were read",
    ]  # fmt: skip
    assert "flags above 1" in evil.locator("td[data-name='compared with']").inner_text()
    assert evil.locator("td[data-name=trigger]").inner_text() == "a pattern, recovered by norms"
    assert evil.locator("figcaption").count() == 3 and odd.locator("figcaption").count() == 1
    assert evil.locator("ol.steps code").all_text_contents()[0].startswith("bench scan ")
    assert "failed: the search did not converge" in odd.locator("td[data-name=outcome]").inner_text()
    assert odd.locator(".verdict b").inner_text() == "Undecided" and clean.locator("td[data-name=trigger]").count() == 1
    assert broken.locator("h3").all_text_contents() == ["Next steps"] and "truncated" in broken.inner_text()

    page = visit().open(everything["several"])
    judged = page.locator("td[data-name='compared with']").all_text_contents()
    assert judged[0] == "0.1 to 0.6 of 6 clean models; a clean model scores as high with p = 0.00012"
    assert judged[1:] == ["no clean models known", judged[0], "–", "its own threshold: flags above 0.35"]


def test_every_link_of_the_report_leads_to_a_place_on_it(
    everything: dict[str, Path], visit: Callable[..., Watched]
) -> None:
    seen = visit(390)
    page = seen.open(everything["several"])
    targets = page.evaluate("[...document.links].map((link) => link.getAttribute('href'))")
    assert len(targets) == 8 and all(target.startswith("#") for target in targets)
    assert all(page.locator(target).count() == 1 for target in targets)
    page.get_by_role("link", name="models/three").click()
    assert seen.address().endswith("#model-3")
    top = page.locator("#model-3").evaluate("(section) => section.getBoundingClientRect().top")
    assert -1 < top < 300
    page.locator("#model-3").get_by_role("link", name="All models").click()
    assert page.evaluate("document.querySelector('#models').getBoundingClientRect().top") > -1
    assert seen.quiet()


def test_folds_of_the_report_are_reached_and_opened_by_keyboard(
    everything: dict[str, Path], visit: Callable[..., Watched]
) -> None:
    seen = visit()
    page = seen.open(everything["one"])
    focused = "document.activeElement.matches('summary') ? document.activeElement.textContent : ''"
    assert not page.get_by_text("terd(iterations=600, batch=8)").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "settings of terd"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    page.keyboard.press("Enter")
    assert page.get_by_text("terd(iterations=600, batch=8)").is_visible()
    reached = []
    for _ in range(page.locator("summary").count() - 1):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
        page.keyboard.press("Space")
    assert all(reached) and page.locator("details:not([open])").count() == 0
    assert page.get_by_text("Near 0, the trigger gives the same image").is_visible()
    assert seen.quiet()


def test_what_python_writes_of_a_value_is_noticed() -> None:
    for raw in ("None", "score nan", "['a', 'b']", "{'a': 1}", "tensor(0.1)", "0.30000000000000004", "<class 'x'>"):
        assert RAW.search(raw), raw
    for words in ("nothing found", "1×16×16", "0.00012", "information", "none", "of 6 clean models"):
        assert not RAW.search(words), words
