"""LitServe around the bundle: images are posted, labels come back."""

import json
import sys
import urllib.request
from pathlib import Path

from scored import rows
from servers import free_port, running

ENVIRONMENTS = {"LitServe": [".[onnxruntime]", "litserve"]}
BUNDLES = True
SERVER = """
import base64
import io
import sys

import litserve
from PIL import Image

import swin_deploy


class Api(litserve.LitAPI):
    def setup(self, device):
        self.model = swin_deploy.load(sys.argv[1], backend="onnxruntime")

    def decode_request(self, request):
        return Image.open(io.BytesIO(base64.b64decode(request["image"])))

    def predict(self, image):
        return self.model.classify(image, top_k=len(self.model.labels))[0]

    def encode_response(self, best):
        return {"scores": [{"label": one.label, "score": one.score} for one in best]}


if __name__ == "__main__":
    litserve.LitServer(Api(), accelerator="cpu").run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
"""


def scores(folder, images):
    import base64

    port, answers = free_port(), []
    Path("server.py").write_text(SERVER)
    with running([sys.executable, "server.py", str(folder), str(port)], f"http://127.0.0.1:{port}/health"):
        for image in images:
            body = json.dumps({"image": base64.b64encode(image.read_bytes()).decode()}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"})
            answers.append(json.load(urllib.request.urlopen(request))["scores"])
    return rows(folder, answers)
