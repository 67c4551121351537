"""The page of `swin-deploy serve` in a real browser: `make test-browser`."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from cli.exported import EXAMPLES, THREE, digits
from serving.service import LIMITS, RUN, SEVEN, served

import swin_deploy

playwright = pytest.importorskip("playwright.sync_api", reason="no browser: Playwright is not installed (make test-browser)")
# Playwright closes its loop when its objects are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DROP = """async ({ name, content }) => {
  const bytes = Uint8Array.from(atob(content), one => one.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name));
  document.body.dispatchEvent(new DragEvent("dragover", { dataTransfer, bubbles: true, cancelable: true }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # The system's browser, as root in a container too; else the one that Playwright has downloaded.
        found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser.new_page()
        browser.close()


def shown(page: Any) -> list[tuple[str, str]]:
    """The rows of the table, once it has some."""
    page.wait_for_selector("#labels tr")
    return [
        (row.query_selector("th").inner_text(), row.inner_text().split()[-1]) for row in page.query_selector_all("#labels tr")
    ]


def test_a_person_drops_an_image_and_sees_the_labels_of_classify(page: Any) -> None:
    with swin_deploy.load(digits(2), **RUN) as model:
        three, seven = (
            [(one.label, f"{100 * one.score:.2f}%") for one in model.classify(EXAMPLES / f"digits/images/{digit}.png")[0]]
            for digit in (3, 7)
        )
    with served(digits(2), *LIMITS) as server:
        requests: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "violates" in message.text else None)
        page.goto(server.url)
        page.set_input_files("#file", THREE)
        assert shown(page) == three
        bar = page.query_selector("#labels td.bar div").bounding_box()["width"]
        assert bar == pytest.approx(page.query_selector("#labels td.bar").bounding_box()["width"], rel=0.1)
        page.evaluate(DROP, {"name": "7.png", "content": base64.b64encode(SEVEN).decode()})
        page.wait_for_selector("th:text('seven') >> nth=0")
        assert shown(page) == seven
        page.evaluate(DROP, {"name": "x.png", "content": "aGVsbG8="})
        page.wait_for_selector("#message:text('not a valid image')")
        assert page.query_selector_all("#labels tr") == []
        assert errors == []
        assert [url for url in requests if not url.startswith((server.url, "blob:", "data:"))] == []
