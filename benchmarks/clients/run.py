"""Run one client in its environment: python run.py MODULE FOLDER PIXELS.npy LOGITS.npy

A client is a module with ENVIRONMENTS, which has the packages to install for each version that is tried, and a function
`logits(folder, pixels)`. FOLDER has config.json, preprocessor_config.json and onnx/model.onnx.
"""

import importlib
import sys
from pathlib import Path

import numpy as np


def main():
    module, folder, pixels, out = sys.argv[1:]
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # a client may have the name of its library
    sys.path.append(str(Path(__file__).parent))
    client = importlib.import_module(module)
    np.save(out, client.logits(Path(folder), np.load(pixels)))


if __name__ == "__main__":
    main()
