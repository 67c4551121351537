"""OpenVINO beside signals: models that are closed in any order, on any thread, leave a process that survives Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="writes the graphs")
pytest.importorskip("openvino", reason="runs them")

CODE = """
import signal, sys, threading
from pathlib import Path
from swin_deploy.runtimes.openvino import OpenVino

first, second, third = (OpenVino(Path(sys.argv[1]), threads=1) for _ in range(3))
first.close()
del first
closing = threading.Thread(target=second.close)
closing.start()
closing.join()
del second
third.close()
del third
caught = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as by a shell in the background
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
signal.raise_signal(signal.SIGTERM)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted", caught == [signal.SIGTERM])
"""


def test_signals_after_models_were_closed(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [value(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "relu", ends[:1], ends[1:])
    file = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), file)
    done = subprocess.run([sys.executable, "-c", CODE, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted True\n"), done.stderr
