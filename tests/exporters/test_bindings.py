"""Every name of TensorRT's Python bindings that our source uses is there, and takes the arguments that it passes.

In TensorRT for RTX as it is installed, in full TensorRT where that is installed, and in the wheels of TensorRT 10.3 to 11.4 and
of their lean and dispatch runtimes, as bindings/bindings_from_wheels.py recorded them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from swin_deploy import tensorrt_log
from swin_deploy.doctor.packages import minimum_versions
from swin_deploy.errors import EngineError, UsageError
from swin_deploy.exporters.engines import engine_from_onnx
from swin_deploy.exporters.engines import refit_engine as refit
from swin_deploy.exporters.engines import targets as gpu
from swin_deploy.options import EngineSpec
from swin_deploy.runtimes.gpu import contexts, tensorrt

RECORDED = json.loads((Path(__file__).parent / "bindings/releases.json").read_text(encoding="utf-8"))

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
    "ICudaEngine.create_runtime_config",  # newer TensorRT has it, too
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


MODULES = (engine_from_onnx, gpu, refit, contexts, tensorrt, tensorrt_log)
TREES = [ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")) for module in MODULES]


def name_of(node: ast.Attribute) -> str | None:
    """ "Class.attribute", or the name of a class; None for what is not of the bindings."""
    root, _, rest = ast.unparse(node).partition(".")
    if root == "trt":
        return None if rest in ("__version__", "__name__") else ".".join(rest.split(".")[:2])
    if root not in OBJECTS:
        root, rest = ".".join([root, *rest.split(".")[:1]]), rest.partition(".")[2]
    return f"{OBJECTS[root]}.{re.split('[.(]', rest)[0]}" if root in OBJECTS and rest else None


def used_names() -> set[str]:
    """The names that our source uses."""
    used: set[str] = {
        name for feature in (gpu.NEEDED.values(), (name for _, name in gpu.FOR_OPTIONS.values())) for name in feature
    }
    for tree in TREES:
        inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node not in inner)
        used |= {name for node in attributes if (name := name_of(node))}
    return used


USED = used_names()


def calls() -> list[tuple[str, int, bool]]:
    """Name, number of arguments, and whether it may have more (`*these`), of each call of the bindings in our source."""
    found = (node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = ((name_of(call.func), call) for call in found if isinstance(call.func, ast.Attribute))
    return [
        (
            name,
            sum(not isinstance(one, ast.Starred) for one in call.args),
            len(call.args) > 0 and isinstance(call.args[-1], ast.Starred),
        )
        for name, call in named
        if name and not call.keywords
    ]


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


def recorded(release: str) -> dict[str, str]:
    """Name -> parameters, of the classes that a release has."""
    absent = set(RECORDED["absent"][release])
    names = {name: text for name, text in RECORDED["names"].items() if not absent & {name, name.partition(".")[0]}}
    return {**names, **RECORDED["other"][release]}


@pytest.mark.parametrize("release", RECORDED["releases"])
def test_every_name_and_call_is_in_the_wheel(release: str) -> None:
    names = recorded(release)
    runs_only = " " in release
    missing = {name for name in USED - names.keys() if not runs_only or name.partition(".")[0] in names}
    assert missing <= ONLY_IN_RTX
    checked = 0
    for name, count, more in calls():
        if name not in names or not names[name]:
            continue
        accepted = [
            sum(not part.endswith("=") for part in text[1:-1].split(", ") if part) <= count + 9 * more
            and count <= sum(bool(part) for part in text[1:-1].split(", "))
            for text in names[name].split(" or ")
        ]
        assert any(accepted), (name, count, names[name])
        checked += 1
    assert checked >= (10 if runs_only else 30)


def test_what_the_releases_differ_in() -> None:
    """What TensorRT 11 removed, and what came after 10.3, is recorded so: the lists are of the releases that they name."""
    assert {"BuilderFlag.FP16", "IBuilderConfig.int8_calibrator", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"} <= (
        recorded("10.3").keys() - recorded("11.4").keys()
    )
    assert "ICudaEngine.create_runtime_config" in recorded("10.12").keys() - recorded("10.9").keys()
    assert {"DataType.BF16", "DataType.FP8", "DataType.INT8"} <= recorded("10.3").keys()
    assert "Builder" not in recorded("lean 10.3")


def of_release(release: str) -> SimpleNamespace:
    """A module with the names of a release."""
    made = SimpleNamespace(__version__=RECORDED["releases"][release])
    for name in recorded(release):
        kind, _, attribute = name.partition(".")
        vars(made).setdefault(kind, SimpleNamespace())
        if attribute:
            setattr(getattr(made, kind), attribute, 1)
    return made


@pytest.mark.parametrize(
    ("release", "precision", "opset", "reason"),
    [
        *((release, precision, 20, None) for release in ("10.3", "11.4") for precision in ("fp32", "fp16", "int8", "fp8")),
        (
            "10.3",
            "int8",
            21,
            "opset 21. Export the model again with --opset 20 and quantize it again, or install TensorRT 10.6",
        ),
        ("10.3", "bf16", 22, "up to 20, and bf16 graphs of this bundle use opset 22. Build fp16, or"),
        ("10.3", "fp16", 21, "Export the model again with --opset 20, or"),
        ("10.7", "bf16", 22, None),
        ("11.4", "int8", 21, None),
        ("11.4", "fp16", 26, "use opset 26. Export the model again with --opset 22."),
    ],
)
def test_a_feature_that_a_release_lacks_is_named(release: str, precision: str, opset: int, reason: str | None) -> None:
    spec = EngineSpec(precision=precision, strip_weights=True, version_compatible=True, hardware_compatible=True)
    with nullcontext() if reason is None else pytest.raises(UsageError, match=re.escape(reason)):
        gpu.refuse_lacking(of_release(release), spec, opset)


def test_a_compiler_without_a_needed_feature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for release in ("10.3", "11.4"):
        monkeypatch.setitem(sys.modules, "tensorrt", made := of_release(release))  # type: ignore[misc]
        assert engine_from_onnx.load_compiler("tensorrt") is made
    del made.IProgressMonitor
    with pytest.raises(EngineError, match=r"11\.4\.0\.106 has no progress monitor\. Every engine needs it\. Run: pip install"):
        engine_from_onnx.load_compiler("tensorrt")
    made = of_release("10.3")
    del made.BuilderFlag.REFIT_IDENTICAL
    with pytest.raises(UsageError, match=r"10\.3\.0 has no engines without weights\. Leave out"):
        gpu.refuse_lacking(made, EngineSpec(strip_weights=True), 20)


def test_the_oldest_release_that_pip_installs_is_recorded() -> None:
    lowest = minimum_versions()["tensorrt"]
    assert lowest == next(iter(RECORDED["releases"]))
