"""onnxruntime-web in headless Chromium, with WebAssembly."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np

ENVIRONMENTS = {"onnxruntime-web in Chromium": ["numpy", "playwright", "npm:onnxruntime-web"]}
PAGE = """<script type="module">
import * as ort from "./dist/ort.wasm.min.mjs";
window.classify = async (images, shape) => {
  const session = await ort.InferenceSession.create("model.onnx");
  const pixels = new Float32Array(await (await fetch("pixels.bin")).arrayBuffer()), found = [];
  const size = pixels.length / images;
  for (let at = 0; at < pixels.length; at += size) {
    const image = new ort.Tensor("float32", pixels.slice(at, at + size), shape);
    found.push(Array.from((await session.run({ pixel_values: image })).logits.data));
  }
  return found;
};
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):  # the headers that allow several threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_):
        pass


def logits(folder, pixels):
    from playwright.sync_api import sync_playwright

    site = Path("page")
    shutil.copytree("../node_modules/onnxruntime-web/dist", site / "dist")
    shutil.copy(folder / "onnx/model.onnx", site)
    pixels.tofile(site / "pixels.bin")
    (site / "index.html").write_text(PAGE)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    handler = functools.partial(Handler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as play:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = play.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("() => !!window.classify")
        found = page.evaluate(f"classify({len(pixels)}, {[1, *pixels.shape[1:]]})")
        server.shutdown()
    return np.array(found)
