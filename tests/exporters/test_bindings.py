"""Every name of TensorRT's Python bindings that our source uses is there: in TensorRT for RTX as it is installed, in full
TensorRT where that is installed, and in the lists of names of TensorRT 10.12, the oldest we take, and 11.4.

bindings/names_from_wheel.py made the lists, from the real wheels.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from swin_deploy import tensorrt_log
from swin_deploy.exporters.engines import engine_from_onnx
from swin_deploy.exporters.engines import refit_engine as refit
from swin_deploy.exporters.engines import targets as gpu
from swin_deploy.runtimes.gpu import contexts, tensorrt

LISTS = Path(__file__).parent / "bindings"

# The objects of the bindings by the names that they have in our source.
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "timings": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "fault": "ParserError",
    "flags": "NetworkDefinitionCreationFlag",
    "refitter": "Refitter",
    "weights": "OnnxParserRefitter",
    "serialization": "ISerializationConfig",
    "resources.runtime": "Runtime",
    "resources.engine": "ICudaEngine",
    "resources.config": "IRuntimeConfig",
    "resources.cache": "IRuntimeCache",
    "self.cache": "IRuntimeCache",
    "self.config": "IRuntimeConfig",
    "self.engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}
# What one back end has alone. The source asks for the back end before it uses one of these.
ONLY_IN_RTX = {
    "ComputeCapability.__members__",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "CudaGraphStrategy.DISABLED",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics.__members__",
    "EngineValidity.INVALID",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "Runtime.get_engine_validity",
}
ONLY_IN_FULL_TENSORRT: set[str] = set()


def used_names() -> set[str]:
    """ "Class.attribute", or the name of a class, for each that our source uses."""
    used: set[str] = set()
    for module in (engine_from_onnx, gpu, refit, contexts, tensorrt, tensorrt_log):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node not in inner:
                root, _, rest = ast.unparse(node).partition(".")
                if root == "trt" and rest not in ("__version__", "__name__"):
                    used.add(".".join(rest.split(".")[:2]))
                elif root not in OBJECTS:
                    root, rest = ".".join([root, *rest.split(".")[:1]]), rest.partition(".")[2]
                if root in OBJECTS and rest:
                    used.add(f"{OBJECTS[root]}.{re.split('[.(]', rest)[0]}")
    return used


USED = used_names()


def missing_in(has: Callable[[str, str], bool]) -> set[str]:
    """The names of USED that `has(class, attribute)` denies; the attribute of a bare class is empty."""
    return {name for name in USED if not has(name.partition(".")[0], ".".join(name.split(".")[1:2]))}


def missing_in_module(module: str) -> set[str]:
    trt = pytest.importorskip(module, reason=f"{module} is not installed, and only the list of its names was checked")
    return missing_in(lambda kind, name: hasattr(trt, kind) and (not name or hasattr(getattr(trt, kind), name)))


def test_the_source_is_read() -> None:
    """Of every sort one: or this file would check nothing when the source changes its ways."""
    assert {
        "Builder",
        "EngineInspector.get_engine_information",
        "IBuilderConfig.progress_monitor",
        "ILogger",
        "ITimingCache.serialize",
        "ISerializationConfig.clear_flag",
        "MemoryPoolType.WORKSPACE",
        "OnnxParserRefitter.refit_from_file",
        "ParserError.node_operator",
        "Refitter.refit_cuda_engine",
        "Runtime.deserialize_cuda_engine",
        "IExecutionContext.execute_async_v3",
        "ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE",
        "TensorIOMode.INPUT",
    } <= USED
    assert USED >= ONLY_IN_RTX | ONLY_IN_FULL_TENSORRT
    assert len(USED) > 50


def test_no_other_file_talks_to_the_bindings() -> None:
    folders = [Path(str(module.__file__)).parent for module in (engine_from_onnx, tensorrt)]
    files = [path for folder in folders for path in folder.glob("*.py")] + [Path(str(tensorrt_log.__file__))]
    speakers = {path.name for path in files if "trt." in path.read_text(encoding="utf-8")}
    assert speakers == {"engine_from_onnx.py", "targets.py", "refit_engine.py", "tensorrt.py", "tensorrt_log.py"}


def test_every_name_is_in_tensorrt_for_rtx() -> None:
    assert missing_in_module("tensorrt_rtx") == ONLY_IN_FULL_TENSORRT


def test_every_name_is_in_the_tensorrt_that_is_installed() -> None:
    assert missing_in_module("tensorrt") == ONLY_IN_RTX


def test_every_name_of_running_is_in_tensorrt_lean() -> None:
    """The part of TensorRT 11 that only runs engines, which installs without a GPU: it has no builder and no parser."""
    lean = pytest.importorskip("tensorrt_lean_bindings", reason="tensorrt_lean is not installed")
    assert lean.__version__.startswith("11.")
    known = {name for name in USED if hasattr(lean, name.partition(".")[0])}
    assert known >= {"Runtime.deserialize_cuda_engine", "Refitter.refit_cuda_engine", "IExecutionContext.execute_async_v3"}
    assert known & missing_in_module("tensorrt_lean_bindings") <= ONLY_IN_RTX


@pytest.mark.parametrize("release", ["10.12", "11.4"])
def test_every_name_is_in_full_tensorrt(release: str) -> None:
    kept = json.loads((LISTS / f"tensorrt-{release}.json").read_text(encoding="utf-8"))
    assert kept["version"].startswith(f"{release}.")
    classes: dict[str, list[str]] = kept["classes"]
    assert missing_in(lambda kind, name: kind in classes and (not name or name in classes[kind])) == ONLY_IN_RTX


def test_the_lists_hold_what_the_releases_differ_in() -> None:
    """What TensorRT 11 removed is in the one list and not in the other: they are of the releases that they say."""
    old, new = (json.loads((LISTS / f"tensorrt-{r}.json").read_text(encoding="utf-8"))["classes"] for r in ("10.12", "11.4"))
    assert {"FP16", "INT8", "BF16", "FP8"} <= set(old["BuilderFlag"]) - set(new["BuilderFlag"])
    assert "int8_calibrator" in set(old["IBuilderConfig"]) - set(new["IBuilderConfig"])
    assert "EXPLICIT_BATCH" in set(old["NetworkDefinitionCreationFlag"]) - set(new["NetworkDefinitionCreationFlag"])


def test_the_oldest_release_is_the_one_that_is_checked() -> None:
    assert ".".join(map(str, engine_from_onnx.OLDEST_TENSORRT)) == "10.12"
    assert gpu.COMPILERS["tensorrt"][0] == "tensorrt"
