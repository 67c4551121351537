"""Classify images with OpenVINO Model API, which reads everything from the metadata of the ONNX file.

    pip install openvino-model-api onnx opencv-python-headless
    python benchmarks/clients/openvino_model_api.py MODEL.onnx IMAGE ...

Prints a JSON object for each image: class, label, score. This file needs nothing of swin-deploy.
"""

from __future__ import annotations

import json
import sys

import cv2
from model_api.models import Model


def main() -> int:
    model = Model.create_model(sys.argv[1])
    for image in sys.argv[2:]:
        best = model(cv2.imread(image)).top_labels[0]
        print(json.dumps({"image": image, "class": int(best.id), "label": str(best.name), "score": float(best.confidence)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
