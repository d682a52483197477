"""A headless Chromium, offline, for the tests of pages, and what they have in common.

Skipped where there is no Chromium or no playwright. `BENCH_SCREENSHOTS=DIR` keeps screenshots to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")

PATIENCE_MS = 120_000  # with the browser, on a machine that does other things, too


class Watched:
    """A page, and whatever it said or asked for."""

    def __init__(self, page: Any) -> None:
        self.page, self.said, self.asked = page, [], []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: Path, rest: str = "") -> Any:
        self.page.goto(path.as_uri() + rest)
        self.page.evaluate("document.fonts.ready")  # rows that are laid out anew under the pointer lose the click
        return self.page

    def address(self) -> str:
        """Where the page is by its own account; playwright's hears of a change a little later."""
        return self.page.evaluate("location.href")

    def quiet(self) -> bool:
        """Nothing in the console, nothing asked for but files of this machine."""
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("file://")] == []
        return True

    def keep(self, name: str) -> None:
        if os.environ.get("BENCH_SCREENSHOTS"):
            self.page.screenshot(path=Path(os.environ["BENCH_SCREENSHOTS"]) / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        # --no-sandbox: Chromium refuses to run as root otherwise, and these pages are our own
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Watched]]:
    contexts = []

    def new(width: int = 1440, **options: Any) -> Watched:
        contexts.append(browser.new_context(offline=True, viewport={"width": width, "height": 900}, **options))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        return Watched(contexts[-1].new_page())

    yield new
    for context in contexts:
        context.close()
