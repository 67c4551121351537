"""The names that TensorRT's Python bindings have, from their wheel, without TensorRT itself and without a GPU.

    pip download --no-deps tensorrt_cu13_bindings==11.4.0.106
    python tests/exporters/bindings/names_from_wheel.py tensorrt_cu13_bindings-11.4.0.106-*.whl > tensorrt-11.4.json

The bindings load with empty libraries that have the nine functions they name. The wheel must be for this Python version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What our code uses, and nothing else: a class that is not here is not in the lists, and the test says so.
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILogger", "INetworkDefinition", "IOptimizationProfile",
    "IProgressMonitor", "ISerializationConfig", "ITensor", "ITimingCache", "LayerInformationFormat", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserRefitter", "ParserError", "ProfilingVerbosity", "Refitter",
    "Runtime", "SerializationFlag", "TensorIOMode", "TensorLocation",
)  # fmt: skip
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LIST = f"""
import json, tensorrt_bindings as trt
public = lambda kind: sorted(name for name in dir(kind) if not name.startswith("_"))
print(json.dumps({{"version": trt.__version__, "classes": {{name: public(getattr(trt, name)) for name in {CLASSES!r}}}}}))
"""


def names_from_wheel(wheel: Path) -> dict[str, object]:
    """{"version": ..., "classes": {class: [public names]}} of the bindings in a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        place = Path(folder)
        archive.extractall(place)
        (place / "empty.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        major = wheel.name.split("-")[1].split(".")[0]
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            target = place / f"lib{library}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", target, place / "empty.c"], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        done = subprocess.run([sys.executable, "-c", LIST], env=environment, check=True, capture_output=True, cwd=folder)
    names: dict[str, object] = json.loads(done.stdout)
    return names


if __name__ == "__main__":
    print(json.dumps(names_from_wheel(Path(sys.argv[1])), indent=1))
