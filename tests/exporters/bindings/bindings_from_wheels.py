"""Record the names and parameters of TensorRT's Python bindings from their wheels, without TensorRT itself and without a GPU.

    pip download --no-deps -d wheels tensorrt_cu12_bindings==10.3.0     # and the other releases, and lean and dispatch
    python tests/exporters/bindings/bindings_from_wheels.py wheels/*.whl > tests/exporters/bindings/releases.json

The bindings load with empty libraries that have the functions they name. The wheels must be for this Python version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# What our code uses, and nothing else: a class that is not here is not recorded, and the test says so.
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
LIST = """
import json, sys, importlib
trt = importlib.import_module(sys.argv[1])
kinds = {name: getattr(trt, name) for name in sys.argv[2:] if hasattr(trt, name)}
skipped = lambda at, name: name.startswith("_") or at == "INetworkDefinition" and name.startswith("add_")
public = {f"{at}.{name}": getattr(kind, name).__doc__ if callable(getattr(kind, name)) else ""
          for at, kind in kinds.items() for name in dir(kind) if not skipped(at, name)}
print(json.dumps([trt.__version__, {**{at: kind.__init__.__doc__ for at, kind in kinds.items()}, **public}]))
"""


def parameters(name: str, text: str | None) -> str:
    """Return the parameters of each overload, as in "(onnx, path=)"; "=" marks an optional one. Empty if it is no function."""
    found = re.findall(rf"\b{name}\((.*)\) ->", text or "")
    one = re.compile(r"(?:^|, )(\w+): (?:[^,=\[]|\[[^\]]*\])*(=?)")
    return " or ".join(f"({', '.join(word + mark for word, mark in one.findall(text) if word != 'self')})" for text in found)


def bindings_from_wheel(wheel: Path) -> tuple[str, dict[str, str]]:
    """Return the version of the bindings in a wheel, and the parameters by name."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        place = Path(folder)
        archive.extractall(place)
        (place / "empty.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        major = wheel.name.split("-")[1].split(".")[0]
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_lean", "nvinfer_dispatch"):
            target = place / f"lib{library}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", target, place / "empty.c"], check=True)
        module = next(path.parent.name for path in place.glob("*_bindings/__init__.py"))
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        command = [sys.executable, "-c", LIST, module, *CLASSES]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, cwd=folder)
        version, texts = json.loads(done.stdout)
    return version, {
        name: parameters(name.rpartition(".")[2] if "." in name else "__init__", text) for name, text in texts.items()
    }


def recorded(wheels: list[Path]) -> dict[str, Any]:
    """Return what the wheels have, by their titles: "10.3", or "lean 10.3" for the part that only runs engines.

    `names` has the parameters in the newest release with the name, `absent` what a release lacks (of a class that it lacks,
    only the class), and `other` the parameters that differ.
    """
    found, releases = {}, {}
    for wheel in wheels:
        kind = next((f"{word} " for word in ("lean", "dispatch") if f"_{word}_" in wheel.name), "")
        version, names = bindings_from_wheel(wheel)
        title = kind + ".".join(version.split(".")[:2])
        found[title], releases[title] = names, version
    order = sorted(found, key=lambda title: (" " in title, title.split()[:-1], [*map(int, title.split()[-1].split("."))]))
    names = {name: text for title in order if " " not in title for name, text in found[title].items()}
    lacks = {title: names.keys() - found[title].keys() for title in order}
    return {
        "releases": {title: releases[title] for title in order},
        "names": dict(sorted(names.items())),
        "absent": {
            title: sorted(name for name in lacks[title] if "." not in name or name.partition(".")[0] not in lacks[title])
            for title in order
        },
        "other": {title: {name: text for name, text in found[title].items() if text != names.get(name)} for title in order},
    }


if __name__ == "__main__":
    print(json.dumps(recorded([Path(name) for name in sys.argv[1:]]), indent=1))
