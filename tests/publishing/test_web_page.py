"""The page of `publish --for web` in a real browser, with onnxruntime-web: `make test-browser`."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.exported import EXAMPLES, FLOWER, digits
from serving.test_browser import page as page

import swin_deploy

PACKAGE = Path(__file__).resolve().parents[2] / "build/browser/node_modules/onnxruntime-web"
IMAGES = [*sorted((EXAMPLES / "digits/images").glob("*.png")), FLOWER, FLOWER.with_name("china.jpg")]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PACKAGE.exists():
        pytest.skip("onnxruntime-web is not installed (make test-browser)")
    folder = tmp_path_factory.mktemp("web") / "page"
    swin_deploy.publish(digits(2), target="web", output=folder, onnxruntime_web=PACKAGE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_page_answers_as_python(page: Any, url: str) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    with swin_deploy.load(digits(2), backend="onnxruntime", precision="fp32") as model:
        for path, best in zip(IMAGES, model.classify(IMAGES), strict=True):
            page.set_input_files("#file", path)
            page.wait_for_selector("#labels tr, #message:not(:empty)")
            assert page.inner_text("#message") == ""
            rows = page.query_selector_all("#labels tr")
            assert [row.query_selector("th").inner_text() for row in rows] == [one.label for one in best], path
            assert [float(row.get_attribute("data-score")) for row in rows] == pytest.approx(
                [one.score for one in best], abs=1e-5
            ), path
            assert page.inner_text("#time").endswith(" ms")
    assert [one for one in requests if not one.startswith((url, "blob:", "data:"))] == []
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"hello"})
    page.wait_for_selector("#message:text('not a valid image')")
