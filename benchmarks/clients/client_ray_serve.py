"""Ray Serve with the application of `swin-deploy serve --ray`: images are posted, labels come back."""

import json
import sys
import urllib.request
from pathlib import Path

from scored import rows
from servers import free_port, running

ENVIRONMENTS = {"Ray Serve": [".[onnxruntime,ray,serve]", "ray[serve]"]}
BUNDLES = True


def scores(folder, images):
    port, answers = free_port(), []
    classes = len(json.loads((folder / "config.json").read_text())["label2id"])
    program = Path(sys.executable).with_name("swin-deploy")
    command = [str(program), "serve", str(folder), "--ray", "local", "--port", str(port)]
    with running([*command, "--backend", "onnxruntime"], f"http://127.0.0.1:{port}/health"):
        for image in images:
            url = f"http://127.0.0.1:{port}/?top_k={classes}"
            request = urllib.request.Request(url, image.read_bytes(), {"Content-Type": "image/png"})
            answers.append(json.load(urllib.request.urlopen(request)))
    return rows(folder, answers)
