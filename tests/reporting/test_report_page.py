"""The page of `report` in a real browser: `make test-browser`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reporting.test_report import BENCH, IMAGES
from reporting.test_report import bundle as bundle
from serving.test_browser import page as page

import swin_deploy

pytest.importorskip("vl_convert", reason="the extra report is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
WIDTHS = (360, 820, 1400)
# The contrast of text with its background, for the texts of each kind.
CONTRAST = """() => {
  const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
  const light = text => channels(text).reduce((sum, one, i) => sum + linear(one / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return ["h1", "caption", "a[href='#model']", ".good", ".unknown", "summary"].map(name => document.querySelector(name))
    .filter(Boolean).map(one => light(getComputedStyle(one).color))
    .map(ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
}"""


def test_the_page_fits_every_screen_and_loads_nothing(page: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    made = swin_deploy.report(bundle, output=tmp_path / "report.html", data=IMAGES, samples=2, bench=tmp_path / "bench.json")
    assert made.output.stat().st_size < 3_000_000
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(made.output.as_uri())
            page.wait_for_selector("body[data-ready]")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert min(page.evaluate(CONTRAST)) >= 4.5
            charts = page.query_selector_all(".chart > div")
            assert len(charts) >= 4
            for chart in charts:
                assert chart.query_selector("svg").bounding_box()["width"] <= width
                assert chart.get_attribute("aria-label")
    assert all(image.get_attribute("alt") for image in page.query_selector_all("img"))
    page.select_option("#chart-range-0 select", index=1)
    assert messages == []
    assert [url for url in requests if not re.match(rf"{re.escape(made.output.as_uri())}|data:|blob:", url)] == []
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.pdf(path=tmp_path / "report.pdf")
    assert page.query_selector("details.open, details[open]") is not None
