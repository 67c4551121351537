"""Run one client in its environment: python run.py MODULE MODEL DATA SCORES.npy

A client is a module with ENVIRONMENTS, the packages to install for each version that is tried ("npm:NAME" for those of npm, and
the one whose version is shown last), and one of two functions. MODEL has config.json, preprocessor_config.json and
onnx/model.onnx. With BUNDLES, a client runs the whole bundle, not ONNX files. OURS names the folder of our bundle ("ours").
QUANTIZED marks clients that make a graph in 8 bits of the model.

    logits(folder, pixels)   pixels [images, 3, height, width] -> logits [images, classes]
    scores(folder, images)   paths of images -> probabilities [images, classes], or a text for the table
"""

import importlib
import sys
from pathlib import Path

import numpy as np

HERE = str(Path(__file__).parent)


def main():
    module, (model, data, out) = sys.argv[1], map(Path, sys.argv[2:])
    sys.path[:] = [path for path in sys.path if path != HERE]  # a client may have the name of its library
    sys.path.append(HERE)
    client = importlib.import_module(module)
    if hasattr(client, "scores"):
        found = client.scores(model, sorted((data / "images").iterdir()))
    else:
        found = client.logits(model, np.load(data / "pixels.npy"))
    if isinstance(found, str):
        out.with_suffix(".txt").write_text(found)
    else:
        np.save(out, found)


if __name__ == "__main__":
    main()
