"""Classify images with the pipeline of transformers and optimum's ONNX Runtime models.

    pip install "optimum[onnxruntime]"
    python benchmarks/clients/transformers_optimum.py BUNDLE IMAGE ...

Prints a JSON object for each image: label and score of the best class. This file needs nothing of swin-deploy.
"""

from __future__ import annotations

import json
import sys

from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoImageProcessor, pipeline


def main() -> int:
    bundle = sys.argv[1]
    model = ORTModelForImageClassification.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
    classify = pipeline("image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(bundle))
    for image in sys.argv[2:]:
        best = classify(image)[0]
        print(json.dumps({"image": image, "label": best["label"], "score": best["score"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
