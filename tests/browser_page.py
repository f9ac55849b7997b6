"""A page that is one file, in a real browser: light and dark, on a desktop and on a phone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

BROWSER = next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("EVA02_AT_REQUIRE_BROWSER"),
    reason="no chromium here; .ci/install-browser.sh installs it",
)
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


def check_page(file: Path) -> None:
    """No error, no request, no axe violation, nothing wider than the window, the shared style.

    EVA02_AT_SCREENSHOTS names a folder for pictures of what was looked at.
    """
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    pictures = os.environ.get("EVA02_AT_SCREENSHOTS")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        own = (file.as_uri(), "data:")
        page.on("request", lambda r: None if r.url.startswith(own) else problems.append(r.url))
        for width, scheme in VIEWS:
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.goto(file.as_uri())
            if pictures:
                page.screenshot(path=f"{pictures}/{file.stem}-{width}-{scheme}.png", full_page=True)
            at = f"{file.name} at {width} px, {scheme}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), at
            font = page.evaluate("getComputedStyle(document.body).fontFamily")
            assert font.startswith("system-ui"), f"{at}: {font}; the style sheet is not whole"
            found = Axe().run(page)
            assert found.response["violations"] == [], f"{at}\n{found.generate_report()}"
            assert problems == [], at
        browser.close()
