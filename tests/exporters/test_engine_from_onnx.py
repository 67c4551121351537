"""Engines compiled by the real TensorRT for RTX compiler, which needs no GPU; nothing here stands in for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli.exported import started
from engine_graphs import HEADS, SM89, TOKENS, WIDTH, attention, compiler_messages, graph, linear
from onnx import TensorProto, helper

from swin_deploy.errors import EngineError, MissingDependencyError, UsageError
from swin_deploy.exporters.engines.engine_from_onnx import Engine, engine_from_onnx, resolve_backend
from swin_deploy.exporters.engines.layer_report import EngineTensor, report_from_inspector, report_from_log
from swin_deploy.exporters.engines.targets import for_target, rtx_gpus, target_gpu
from swin_deploy.gpus import cuda_devices
from swin_deploy.options import EngineSpec

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the graphs of these tests")

HERE = Path(__file__).parent  # from the repository root a bare swin_deploy/ would shadow the installed package


@pytest.fixture(scope="module")
def fused() -> tuple[Engine, list[tuple[str, str]], list[tuple[str, int, int]]]:
    steps: list[tuple[str, int, int]] = []
    with compiler_messages() as said:
        engine = engine_from_onnx(attention().SerializeToString(), replace(SM89, progress=lambda *step: steps.append(step)))
    return engine, said, steps


def test_attention_becomes_one_fused_kernel(fused) -> None:
    engine = fused[0]
    assert len(engine.plan) > 1000
    assert (engine.backend, engine.gpu) == ("tensorrt-rtx", "sm_89")
    assert engine.backend_version == trt.__version__
    assert engine.seconds > 0
    assert engine.report.fused_attention == 1


def test_messages_and_progress_arrive(fused) -> None:
    _, said, steps = fused
    assert {"DEBUG", "INFO"} <= {level for level, _ in said} <= {"DEBUG", "INFO", "WARNING", "ERROR"}
    assert any(message.startswith("Layers:") for _, message in said)
    assert all(0 <= step <= count for _, step, count in steps)
    assert {step for phase, step, _ in steps if phase == "Building engine"} >= {0, 1}


def test_report_has_every_layer_with_its_dimensions_and_types(fused) -> None:
    engine, said, _ = fused
    report = engine.report
    assert len(report.layers) == sum(message.count("LayerType:") for _, message in said)
    assert report.source == "log"
    assert report.unread == 0
    [layer] = [layer for layer in report.layers if "mha" in layer.name]
    assert sorted(tensor.dims for tensor in layer.inputs) == [(3, 32, 64), (3, 64, 32), (3, 64, 32)]
    assert [(tensor.dims, tensor.datatype) for tensor in layer.outputs] == [((3, 64, 32), "Half")]
    assert {tensor.datatype for tensor in layer.inputs + (layer.constants or ())} == {"Half"}
    assert sum(int(np.prod(tensor.dims)) for tensor in layer.constants or ()) == HEADS * TOKENS * TOKENS


def test_bytes_are_those_of_the_tensors() -> None:
    report = engine_from_onnx(linear(1).SerializeToString(), SM89).report
    assert report.kernels == 1
    assert report.activation_bytes == 2 * (64 * 64) * 2
    assert report.constant_bytes is not None
    assert 64 * 64 * 2 <= report.constant_bytes <= 64 * 64 * 2 + 64  # a product may bring its scalars alpha and beta
    assert report.bytes_moved == report.activation_bytes + report.constant_bytes
    assert report.types == {"Half": 1}
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["kernels"] == 1
    assert plain["layers"][0]["inputs"][0]["dims"][-1] == 64
    assert "layers" not in report.to_dict(layers=False)


def test_a_batch_range_leaves_the_bytes_unsaid() -> None:
    report = engine_from_onnx(linear().SerializeToString(), replace(SM89, batches=((1, 4, 8),))).report
    assert report.kernels == 1
    assert report.bytes_moved is None
    assert report.activation_bytes is None
    assert (
        engine_from_onnx(linear().SerializeToString(), replace(SM89, batches=((8, 8, 8),))).report.activation_bytes == 8 * 16384
    )


@pytest.mark.parametrize("gpu", rtx_gpus())
def test_every_gpu_on_the_list_compiles(gpu: str) -> None:
    assert engine_from_onnx(linear(2).SerializeToString(), replace(SM89, gpus=gpu, batches=((2, 2, 2),))).gpu == gpu


def test_weights_next_to_the_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=16)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 64 * 2
    assert engine_from_onnx(path, SM89).report.kernels == 1
    with pytest.raises(UsageError, match=r"no ONNX file .*other\.onnx"):
        engine_from_onnx(tmp_path / "other.onnx", SM89)


def test_what_cannot_be_parsed_is_reported_in_the_words_of_the_parser() -> None:
    node = helper.make_node("RollWindows", ["x"], ["y"], name="first_roll", domain="example")
    model = graph([node], {"x": [1, 8]}, {"y": [1, 8]})
    model.opset_import.append(helper.make_opsetid("example", 1))
    with pytest.raises(EngineError, match=r"(?s)first_roll.*RollWindows.*Plugin not found"):
        engine_from_onnx(model.SerializeToString(), SM89)
    with pytest.raises(EngineError, match=r"cannot read the ONNX graph: Assertion failed.*Failed to parse"):
        engine_from_onnx(b"not a graph", SM89)


def test_a_refusal_to_compile_carries_the_words_of_the_compiler() -> None:
    # fp32 attention has no fused kernel, and the operator is not allowed to be taken apart unless it says so.
    shape = [1, HEADS, TOKENS, WIDTH]
    model = graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], dict.fromkeys("qkv", shape), {"y": shape})
    model.opset_import[0].version = 23
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    with compiler_messages() as said, pytest.raises(EngineError, match=r"could not compile the graph for sm_89: .+") as caught:
        engine_from_onnx(model.SerializeToString(), SM89)
    errors = [text.strip().rstrip(".") for level, text in said if level == "ERROR"]
    assert errors
    assert all(error in str(caught.value) for error in errors)


def test_a_fixed_batch_must_be_the_one_asked_for() -> None:
    with pytest.raises(UsageError, match=r"'x' has a fixed batch of 4.*\(1, 1, 1\).*\(4, 4, 4\)"):
        engine_from_onnx(linear(4).SerializeToString(), SM89)
    assert engine_from_onnx(linear(4).SerializeToString(), replace(SM89, batches=((4, 4, 4),))).plan
    with pytest.raises(EngineError, match="only the first axis"):
        engine_from_onnx(linear(1, "tokens").SerializeToString(), SM89)


@pytest.mark.parametrize(
    ("backend", "gpu", "words"),
    [
        ("tensorrt-rtx", "sm_90", "does not support SM90.*Use the back end tensorrt"),
        ("tensorrt-rtx", "sm_87", "does not compile for sm_87.*sm_86, sm_89"),
        ("tensorrt-rtx", "SM89", "Unknown GPU 'SM89'.*sm_89"),
        ("tensorrt", "hopper", "Unknown GPU 'hopper'"),
        ("vulkan", "sm_89", 'Unknown compiler "vulkan".*tensorrt, tensorrt-rtx'),
    ],
)
def test_an_invalid_target(backend: str, gpu: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        for_target(EngineSpec(), backend, gpu)


def test_the_list_of_gpus_is_the_compilers() -> None:
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120"} <= set(rtx_gpus())
    assert list(rtx_gpus()) == sorted(rtx_gpus(), key=lambda name: int(name[3:]))


def python(code: str, *, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees no GPU, and not the modules in `absent`."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", hide + code], cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )


RESOLVE = """
from swin_deploy.exporters.engines.engine_from_onnx import resolve_backend
try:
    print(resolve_backend({name!r}))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_without_a_gpu_no_back_end_is_swapped_in_silence() -> None:
    assert python(RESOLVE.format(name="auto")).stdout == "tensorrt-rtx\n"
    assert python(RESOLVE.format(name="tensorrt-rtx")).stdout == "tensorrt-rtx\n"
    assert python(RESOLVE.format(name="tensorrt")).stdout.startswith("EngineError TensorRT compiles on the GPU that it")
    missing = python(RESOLVE.format(name="tensorrt-rtx"), absent=("tensorrt_rtx",)).stdout
    assert missing.startswith("MissingDependencyError TensorRT for RTX is needed to compile engines")
    neither = python(RESOLVE.format(name="auto"), absent=("tensorrt", "tensorrt_rtx")).stdout
    assert neither.startswith("MissingDependencyError")
    assert '"swin-deploy[tensorrt]"' in neither
    assert '"swin-deploy[tensorrt-rtx]"' in neither
    with pytest.raises(UsageError, match='Unknown compiler "trt"'):
        resolve_backend("trt")


def test_the_gpu_of_this_machine() -> None:
    hidden = python("from swin_deploy.gpus import cuda_devices; print(cuda_devices())")
    assert hidden.stdout == "()\n", hidden.stderr
    if not cuda_devices():
        with pytest.raises(EngineError, match="no usable NVIDIA GPU"):
            target_gpu("tensorrt-rtx", "current")
        with pytest.raises((EngineError, MissingDependencyError)):
            engine_from_onnx(linear().SerializeToString(), EngineSpec(backend="tensorrt", gpus="sm_90"))


def raise_at(count: int, error: BaseException) -> Callable[..., None]:
    calls = [0]

    def callback(*_: object) -> None:
        calls[0] += 1
        if calls[0] == count:
            raise error

    return callback


@pytest.mark.parametrize("where", [0, 0.5, 1])
@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_what_a_callback_raises_comes_out_here(fused, where: float, error: BaseException) -> None:
    _, _, steps = fused
    model = attention().SerializeToString()
    with pytest.raises(type(error)) as caught:
        engine_from_onnx(model, replace(SM89, progress=raise_at(round(1 + where * (len(steps) - 1)), error)))
    assert caught.value is error


COLLECTED = """
import gc, logging
from engine_graphs import SM89, attention
from swin_deploy.errors import EngineError
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx

gc.disable()
try:
    engine_from_onnx(b"nothing", SM89)
except EngineError as error:
    kept = [error]
    kept.append(kept)  # only the garbage collector frees this, and the traceback in it
del kept
collecting = logging.Handler()
collecting.emit = lambda record: gc.collect()
logging.getLogger("swin_deploy.tensorrt").addHandler(collecting)
logging.getLogger("swin_deploy.tensorrt").setLevel(logging.DEBUG)
engine_from_onnx(attention().SerializeToString(), SM89)
print("done")
"""


def test_an_error_that_is_collected_while_the_next_compiler_speaks_does_not_stop_it() -> None:
    """The builder used to be collected with it, and waited for the lock under which the compiler spoke."""
    assert python(COLLECTED).stdout == "done\n"


def test_other_threads_may_compile() -> None:
    model = attention().SerializeToString()
    error = ZeroDivisionError("ours")
    with ThreadPoolExecutor(2) as pool:
        kernels = [pool.submit(engine_from_onnx, model, SM89) for _ in range(2)]
        failed = pool.submit(engine_from_onnx, model, replace(SM89, progress=raise_at(1, error)))
    assert [future.result().report.fused_attention for future in kernels] == [1, 1]
    assert failed.exception() is error


INTERRUPTED = """
import sys
from pathlib import Path
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.options import EngineSpec

calls = []
def progress(phase, step, steps):
    calls.append(phase)
    if len(calls) == 1:
        print("started", flush=True)
        sys.stdin.readline()  # the signal arrives in here, and must not be raised in here

try:
    engine_from_onnx(Path(sys.argv[1]), EngineSpec(backend="tensorrt-rtx", gpus="sm_89", progress=progress))
    print("compiled to the end")
except KeyboardInterrupt:
    print("interrupted", len(calls))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_stops_the_compiler(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(attention(blocks=4), path)
    with started(sys.executable, "-c", INTERRUPTED, str(path), cwd=HERE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate("\n")
    assert out == "interrupted 1\n", err
    assert child.returncode == 0


HANDLED = """
import signal
from dataclasses import replace
from engine_graphs import SM89, attention, linear
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx

heard, sent = [], []

def interrupt_once(phase, step, steps):
    if not sent:
        sent.append(phase)
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
try:
    engine_from_onnx(attention().SerializeToString(), replace(SM89, progress=interrupt_once))
    print("compiled to the end")
except KeyboardInterrupt:
    print("interrupted", heard == [signal.SIGINT], bool(engine_from_onnx(linear().SerializeToString(), SM89).plan))
"""


def test_the_handler_of_the_caller_is_put_back_and_called() -> None:
    """In a process of its own: interrupts are no good company for a test runner."""
    done = python(HANDLED)
    assert (done.returncode, done.stdout) == (0, "interrupted True True\n"), done.stderr


LINES = """Layers:
Name: a{0}, b], LayerType: kgen, Inputs: [ { Name: x }, {y, Dimensions: [2,3], Strides: [3,1], Datatype: Half, \
Format: (Arbitrary) Format with stride order = [1,0] }], Constants: [], Outputs: [ { Name: z, Dimensions: [], \
Datatype: Float, Format: (Linear) Row major }], TacticName: _gemm_mha_v2_0x1, StreamId: 0, Metadata: [ONNX Layer: { [,]
Name: old, LayerType: Reformat, Inputs: [ { Name: z, Location: Device, Dimensions: [4], Format/Datatype: Int8 }], \
Outputs: [ { Name: w, Location: Device, Dimensions: [-1], Format/Datatype: N/A due to dynamic shapes }], Tactic: 0x0
Name: host, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: """


def test_lines_with_brackets_in_names_and_of_older_versions() -> None:
    report = report_from_log([LINES, LINES, "unrelated LayerType: words"])
    first, old, host = report.layers
    assert first.inputs == (EngineTensor("x }, {y", (2, 3), "Half"),)
    assert first.outputs[0].bytes == 4
    assert (first.name, first.constants, first.tactic) == ("a{0}, b]", (), "_gemm_mha_v2_0x1")
    assert (old.inputs[0].dims, old.inputs[0].datatype) == ((4,), "Int8")
    assert (old.outputs[0].datatype, old.outputs[0].bytes, old.constants) == ("unknown", None, None)
    assert not host.is_kernel
    assert (report.kernels, report.fused_attention, report.bytes_moved) == (2, 1, None)


def test_a_layer_that_cannot_be_read_leaves_every_figure_unsaid() -> None:
    report = report_from_log([LINES + "\nName: new, LayerType: kgen, Inputs: <a form of the future>"])
    assert report.unread == 1
    assert (report.kernels, report.fused_attention, report.bytes_moved) == (None, None, None)
    assert report_from_log(["nothing of the kind"]).kernels is None


def test_the_json_of_the_engine_inspector() -> None:
    # The documented form; no GPU has shown us this one here.
    tensor = {"Name": "x", "Dimensions": [1, 96], "Format/Datatype": "Row major linear FP16 format"}
    layer = {"Name": "_gemm_mha_v2_myl0_1", "LayerType": "kgen", "Inputs": [tensor], "Outputs": [tensor]}
    report = report_from_inspector(json.dumps({"Layers": [layer], "Bindings": ["x"]}))
    assert (report.source, report.kernels, report.fused_attention) == ("inspector", 1, 1)
    assert (report.activation_bytes, report.constant_bytes, report.bytes_moved) == (2 * 192, None, None)
    table = {"Name": "w", "Dimensions": [8], "Datatype": "Float", "Format": "Linear"}
    report = report_from_inspector(json.dumps({"Layers": [{**layer, "Constants": [table]}]}))
    assert report.bytes_moved == 2 * 192 + 32
    assert report_from_inspector('{"Layers": ["a bare name"]}').kernels is None
    assert report_from_inspector("not JSON").source == "none"
