"""A runtime of MLServer that answers with the bundle, and tritonclient, which sends the tensors."""

import json
import sys
from pathlib import Path

import numpy as np
from servers import free_port, running

ENVIRONMENTS = {"MLServer with tritonclient": ["tritonclient[http]", ".[onnxruntime]", "mlserver"]}
BUNDLES = True
RUNTIME = """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

import swin_deploy


class Swin(MLModel):
    async def load(self):
        self.model = swin_deploy.load(self.settings.parameters.uri, backend="onnxruntime")
        return True

    async def predict(self, payload):
        outputs = self.model.run({one.name: NumpyCodec.decode_input(one) for one in payload.inputs})
        encoded = [NumpyCodec.encode_output(name, value) for name, value in outputs.items()]
        return InferenceResponse(model_name=self.name, outputs=encoded)
"""


def logits(folder, pixels):
    from tritonclient import http

    served, ports = Path("served"), [free_port() for _ in range(3)]
    served.mkdir()
    (served / "swin_runtime.py").write_text(RUNTIME)
    parameters = {"uri": str(folder)}
    settings = {"name": "swin", "implementation": "swin_runtime.Swin", "parallel_workers": 0, "parameters": parameters}
    (served / "model-settings.json").write_text(json.dumps(settings))
    names = ("http_port", "grpc_port", "metrics_port")
    server = {**dict(zip(names, ports, strict=True)), "host": "127.0.0.1", "parallel_workers": 0}
    (served / "settings.json").write_text(json.dumps(server))
    command = [str(Path(sys.executable).with_name("mlserver")), "start", str(served)]
    with running(command, f"http://127.0.0.1:{ports[0]}/v2/models/swin/ready", {"PYTHONPATH": str(served)}):
        client, found = http.InferenceServerClient(f"127.0.0.1:{ports[0]}"), []
        for image in pixels:
            given = http.InferInput("pixel_values", [1, *image.shape], "FP32")
            given.set_data_from_numpy(image[None], binary_data=False)
            found.append(client.infer("swin", [given]).as_numpy("logits"))
    return np.concatenate(found)
