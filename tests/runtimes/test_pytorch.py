"""The torch back end gives the results of ONNX Runtime, operator by operator and for every task, and refuses what it lacks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import EXAMPLES, THREE, WEIGHTS, cli_here, copied, digits, exported_bundle, one_block, refused, result

torch = pytest.importorskip("torch", reason="the back end under test")
onnx = pytest.importorskip("onnx", reason="it reads the graphs")
ort = pytest.importorskip("onnxruntime", reason="what it is compared with")

from fake_gpu import FakeDriver  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from small_graphs import model_from_text  # noqa: E402
from traced import CONFIGS, EVERYTHING, LOGITS, PADDED, traced_once  # noqa: E402

import swin_deploy  # noqa: E402
import swin_deploy.gpus  # noqa: E402
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError  # noqa: E402
from swin_deploy.exporters.onnx_from_torch import OF_OPENVINO, OF_POOLS  # noqa: E402
from swin_deploy.exporters.onnx_from_torch import OPERATORS as EXPORTED  # noqa: E402
from swin_deploy.exporters.precision import typed_from_fp32  # noqa: E402
from swin_deploy.exporters.quantization.for_tensorrt import quantized_from_fp32, quantized_layers  # noqa: E402
from swin_deploy.options import TARGETS  # noqa: E402
from swin_deploy.parity import TOLERANCES, compare, sample_inputs  # noqa: E402
from swin_deploy.runtimes.backends import runtime_from_onnx  # noqa: E402
from swin_deploy.runtimes.torch_operators import OPERATORS  # noqa: E402
from swin_deploy.tasks import TaskSpec  # noqa: E402

Arrays = Mapping[str, np.ndarray[Any, Any]]

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32) * 3


def integers(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


X, POSITIVE, BYTES = numbers(2, 3, 8, 6), np.abs(numbers(2, 3, 8, 6)), RANDOM.integers(0, 256, (2, 3, 8, 6), np.uint8)
ZERO = np.array(120, np.uint8)
# operator, attributes, inputs; the first input is fed, the others are constants
CASES: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("Add", {}, [X, numbers(3, 1, 1)]),
    ("Cast", {"to": TensorProto.INT32}, [X]),
    ("Cast", {"to": TensorProto.FLOAT16}, [X * 1e5]),
    ("Cast", {"to": TensorProto.FLOAT}, [BYTES]),
    ("Clip", {}, [X, np.float32(-1), np.float32(2)]),
    ("Clip", {}, [X, None, np.float32(2)]),
    ("Concat", {"axis": 1}, [X, numbers(2, 1, 8, 6), X]),
    ("Conv", {"strides": [4, 2], "kernel_shape": [4, 2]}, [X, numbers(5, 3, 4, 2), numbers(5)]),
    ("Conv", {"strides": [1, 2], "pads": [1, 0, 2, 3], "dilations": [2, 1], "group": 3}, [X, numbers(6, 1, 3, 3)]),
    ("DequantizeLinear", {}, [BYTES, np.float32(0.1), ZERO]),
    ("DequantizeLinear", {"axis": 0}, [BYTES.view(np.int8), numbers(2), np.zeros(2, np.int8)]),
    ("DequantizeLinear", {"axis": 1}, [BYTES.astype(np.int32), POSITIVE[0, :, 0, 0]]),
    ("Div", {}, [X, POSITIVE + 1]),
    ("Div", {}, [integers(7, -7, 5), integers(2, 2, -3)]),
    ("Erf", {}, [X]),
    ("Expand", {}, [X[:, :1], integers(3, 1, 1)]),
    ("Floor", {}, [X]),
    ("Gather", {"axis": 2}, [X, integers(3, 0, -1, 3).reshape(2, 2)]),
    ("Gather", {}, [X, np.array(1, np.int64)]),
    ("GatherElements", {"axis": -1}, [X, np.arange(2 * 3 * 8 * 2).reshape(2, 3, 8, 2) % 6]),
    ("Gelu", {}, [X]),
    ("Gelu", {"approximate": "tanh"}, [X]),
    ("Gemm", {"transB": 1}, [X[0, 0], numbers(4, 6), numbers(4)]),
    ("Gemm", {"transA": 1, "alpha": 0.5, "beta": 2.0}, [X[0, 0], numbers(8, 4), numbers(6, 1)]),
    ("Gemm", {}, [X[0, 0], numbers(6, 4)]),
    ("Greater", {}, [X, numbers(6)]),
    ("HardSwish", {}, [X]),
    ("Identity", {}, [X]),
    ("LayerNormalization", {"epsilon": 1e-3}, [X, numbers(6), numbers(6)]),
    ("LayerNormalization", {"axis": -2}, [X, numbers(8, 6)]),
    ("LeakyRelu", {"alpha": 0.2}, [X]),
    ("MatMul", {}, [X, numbers(6, 4)]),
    ("Max", {}, [X, numbers(6), numbers(8, 1)]),
    ("Min", {}, [X, numbers(6)]),
    ("Mish", {}, [X]),
    ("Mul", {}, [X, np.float32(2)]),
    ("Pow", {}, [POSITIVE, np.float32(1.5)]),
    ("QuantizeLinear", {}, [np.arange(-30, 30, 0.25, dtype=np.float32), np.float32(0.5), np.array(0, np.int8)]),
    ("QuantizeLinear", {}, [X * 100, np.float32(0.5), ZERO]),
    ("QuantizeLinear", {"axis": 2}, [X * 100, POSITIVE[0, 0, :, 0] + 1, np.zeros(8, np.int8)]),
    ("QuantizeLinear", {}, [X * 100, np.float32(0.5)]),
    ("ReduceL2", {"keepdims": 1}, [X, integers(-1)]),
    ("ReduceMean", {"keepdims": 0}, [X, integers(2, 3)]),
    ("ReduceMax", {"keepdims": 0}, [X, integers(2, 3)]),
    ("ReduceSum", {}, [X, integers(1)]),
    ("Relu", {}, [X]),
    ("Reshape", {}, [X, integers(0, -1, 3)]),
    ("Shape", {}, [X]),
    ("Shape", {"start": 1, "end": -1}, [X]),
    ("Sigmoid", {}, [X]),
    ("Slice", {}, [X, integers(1, -5), integers(2**62, -1), integers(1, 2)]),
    ("Slice", {}, [X, integers(0, 1, 0, 1), integers(2, 3, 8, 6), integers(0, 1, 2, 3), integers(1, 1, 3, 2)]),
    ("Slice", {}, [X, integers(1), integers(2)]),
    ("Softmax", {"axis": 1}, [X]),
    ("Softmax", {}, [X]),
    ("Softplus", {}, [X * 20]),
    ("Split", {"axis": 2}, [X, integers(3, 5)]),
    ("Split", {"axis": 2, "num_outputs": 3}, [X]),
    ("Sqrt", {}, [POSITIVE]),
    ("Sub", {}, [X, numbers(6)]),
    ("Tanh", {}, [X]),
    ("TopK", {}, [X, integers(3)]),
    ("TopK", {"axis": 1, "largest": 0}, [X, integers(2)]),
    ("Transpose", {"perm": [0, 2, 3, 1]}, [X]),
    ("Unsqueeze", {}, [X, integers(-1, 0, 3)]),
    ("Where", {}, [X > 0, numbers(2, 3, 8, 6), np.float32(-7)]),
]


def test_every_exported_operator_exists_and_every_operator_is_tested() -> None:
    assert {name for name, *_ in CASES} == OPERATORS.keys()
    assert OPERATORS.keys() >= EXPORTED | OF_OPENVINO | OF_POOLS


def single(operator: str, attributes: dict[str, Any], values: list[Any], outputs: int = 1) -> Any:
    """A graph of one node, with outputs of the inferred types and shapes."""
    names = [f"x{number}" if value is not None else "" for number, value in enumerate(values)]
    constants = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in zip(names, values, strict=True)
        if name not in ("", "x0")
    ]
    fed = helper.make_tensor_value_info("x0", helper.np_dtype_to_tensor_dtype(values[0].dtype), values[0].shape)
    found = [helper.make_tensor_value_info(f"y{number}", TensorProto.UNDEFINED, None) for number in range(outputs)]
    node = helper.make_node(operator, names, [value.name for value in found], **attributes)
    graph = helper.make_graph([node], "one", [fed], found, constants)
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    )


@pytest.mark.parametrize(("operator", "attributes", "values"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_operators_match_onnx_runtime(operator: str, attributes: dict[str, Any], values: list[Any], tmp_path: Path) -> None:
    outputs = attributes.get("num_outputs", 2 if operator in ("Split", "TopK") else 1)
    path = tmp_path / "one.onnx"
    path.write_bytes(single(operator, attributes, values, outputs).SerializeToString())
    wanted = ort.InferenceSession(str(path)).run(None, {"x0": values[0]})
    with runtime_from_onnx(path, "torch") as runtime:
        found = list(runtime.run({"x0": values[0]}).values())
    assert len(found) == len(wanted) == outputs
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if theirs.dtype.kind in "iub" or operator in ("DequantizeLinear", "Floor"):
            assert np.array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


def test_fp8_rounds_and_saturates_like_the_onnx_reference(tmp_path: Path) -> None:
    """ONNX Runtime does not run this graph on every processor."""
    from onnx.reference import ReferenceEvaluator

    values = np.concatenate([np.linspace(-500, 500, 4001), np.linspace(-0.02, 0.02, 401)]).astype(np.float32)
    text = """fp8 (float[batch] x) => (float[batch] y) {
        q = QuantizeLinear(x, scale, zero)
        y = DequantizeLinear(q, scale, zero)
    }"""
    model = model_from_text(text, 21, scale=np.float32(0.5))
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    onnx.save(model, str(tmp_path / "fp8.onnx"))
    with runtime_from_onnx(tmp_path / "fp8.onnx", "torch") as runtime:
        found = runtime.run({"x": values})["y"]
    [wanted] = ReferenceEvaluator(model).run(None, {"x": values})
    assert np.array_equal(found, wanted)
    assert found.max() == 224


def answers(model: Any, path: Path, feeds: Arrays, backend: str = "torch") -> Arrays:
    path.write_bytes(model.SerializeToString())
    with runtime_from_onnx(path, backend) as runtime:
        return runtime.run(feeds)


@pytest.mark.parametrize(
    ("version", "task", "target"),
    [
        *((version, EVERYTHING, target) for version in (1, 2) for target in TARGETS),
        (1, TaskSpec("backbone", output_hidden_states=True, output_attentions=True), "tensorrt"),
        (2, TaskSpec("masked-image-modeling", output_hidden_states=True, output_attentions=True), "tensorrt"),
        *((version, LOGITS, "tensorrt") for version in (1, 2)),
    ],
)
def test_every_task_matches_onnx_runtime(version: int, task: TaskSpec, target: str, tmp_path: Path) -> None:
    """The graph layouts of all targets, and the outputs of all tasks."""
    shape = CONFIGS[version]
    model = traced_once(shape, PADDED, task, target)
    feeds = sample_inputs(task.inputs(shape, PADDED))
    found, wanted = (answers(model, tmp_path / "model.onnx", feeds, backend) for backend in ("torch", "onnxruntime"))
    assert list(found) == list(task.output_names(shape))
    for name in wanted:
        assert (found[name].shape, found[name].dtype) == (wanted[name].shape, wanted[name].dtype)
        # Random weights give sharp attention, which amplifies rounding errors.
        assert compare(found[name], wanted[name]).within(5e-5 if name.startswith("attentions.") else 1e-5), name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_low_precision_graphs_are_computed_in_their_types(version: int, precision: str, tmp_path: Path) -> None:
    """The results differ from fp32 as expected, and less from another runtime than from fp32."""
    task, shape = LOGITS, CONFIGS[version]
    fp32 = traced_once(shape, PADDED)
    feeds = sample_inputs(task.inputs(shape, PADDED))
    exact = answers(fp32, tmp_path / "fp32.onnx", feeds)["logits"]
    if precision in ("int8", "fp8"):
        inputs = [name for layer in quantized_layers(fp32, shape, precision) for name in layer.inputs]
        model, _ = quantized_from_fp32(fp32, shape, task, precision, dict.fromkeys(inputs, 6.0))
    else:
        model = typed_from_fp32(fp32, shape, task, precision).model
    found = answers(model, tmp_path / "model.onnx", feeds)["logits"]
    far = compare(found, exact).relative_l2
    assert 1e-5 < far < TOLERANCES[precision]
    from swin_deploy.runtimes.backends import runtime_to_check

    with runtime_to_check(tmp_path / "model.onnx") as other:
        assert compare(found, other.run(feeds)["logits"]).relative_l2 < far


@pytest.mark.parametrize("options", [("--embed-preprocess",), ("--embed-resize", "427x640")], ids=["frames", "resized"])
def test_graphs_with_embedded_preprocessing(options: tuple[str, ...]) -> None:
    bundle = exported_bundle("--weights", str(WEIGHTS[1]), *options)
    photo = EXAMPLES / "photos/china.jpg"
    with (
        swin_deploy.load(bundle, backend="torch", precision="fp32") as ours,
        swin_deploy.load(bundle, backend="onnxruntime", precision="fp32") as theirs,
    ):
        frames = ours.preparation([photo, THREE] if options[0] == "--embed-preprocess" else [photo])
        assert (frames.dtype, ours.inputs) == (np.uint8, theirs.inputs)
        found, wanted = (model.run({"pixel_values": frames})["logits"] for model in (ours, theirs))
    assert compare(found, wanted).within(1e-5)


def test_external_weights() -> None:
    options = ("--weights", str(one_block()), "--image-size", "32x32", "--image-size", "16x24")
    path = exported_bundle(*options)
    assert (path / "onnx/model.onnx_data").exists()
    assert all(verdict.verified for verdict in swin_deploy.verify(path, backend="torch"))


def test_describe_verify_and_predict(tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    with swin_deploy.load(path, backend="torch", precision="fp16") as model:
        description = model.describe()
        assert model.classify(THREE)[0][0].label == "three"
    assert (description.backend, description.version, description.device, description.precision) == (
        "torch",
        torch.__version__,
        "cpu",
        "fp16",
    )
    [row, *_] = result(cli_here("verify", "b", "--backend", "torch", "--json", cwd=tmp_path))["graphs"]  # type: ignore[call-overload,index]
    assert (row["verified"], row["backend"]) == (True, f"torch {torch.__version__}")
    [one] = result(cli_here("predict", "b", THREE, "--backend", "torch", "--json", cwd=tmp_path))  # type: ignore[misc]
    assert one["predictions"][0]["label"] == "three"
    with swin_deploy.load(path, precision="fp32") as model:  # auto never chooses the reference
        assert "torch" not in {row.candidate.backend for row in model.describe().measured}


def test_threads_are_a_setting_of_the_process() -> None:
    now = torch.get_num_threads()
    with swin_deploy.load(digits(1), backend="torch", threads=now, precision="fp32") as model:
        assert model.describe().threads == now
    with pytest.raises(
        UsageError, match=rf"PyTorch uses {now} threads in the whole process.*torch.set_num_threads\({now + 1}\)"
    ):
        swin_deploy.load(digits(1), backend="torch", threads=now + 1, precision="fp32")
    assert torch.get_num_threads() == now


@pytest.mark.parametrize("module", ["torch", "onnx"])
def test_without_torch_or_onnx(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r'is needed to .*pip install "swin-deploy\[export\]"'):
        swin_deploy.load(digits(2), backend="torch", precision="fp32")
    refused(cli_here("verify", copied(2, tmp_path / "b"), "--backend", "torch", cwd=tmp_path), "swin-deploy[export]")


@pytest.mark.parametrize(
    ("operator", "attributes", "values", "sentence"),
    [
        ("Sin", {}, [X], r"does not support the operator Sin in one\.onnx\. Use another back end"),
        ("Conv", {"auto_pad": "SAME_UPPER"}, [X, numbers(5, 3, 4, 2)], "does not support the Conv .*explicit padding"),
        ("Cast", {"to": TensorProto.DOUBLE}, [X], "does not support the Cast .*type DOUBLE"),
        ("Reshape", {}, [integers(3, 4), integers(2, 1)], None),
    ],
)
def test_unsupported_operators_are_named(
    operator: str, attributes: dict[str, Any], values: list[Any], sentence: str | None, tmp_path: Path
) -> None:
    model = single(operator, attributes, values)
    if sentence is None:  # a shape that is computed
        del model.graph.initializer[:], model.graph.node[0].input[:]
        model.graph.node[0].input.extend(["x0", "x0"])
        sentence = "does not support the Reshape .*its input x0 is computed, but only a constant is supported"
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match=sentence):
        runtime_from_onnx(tmp_path / "one.onnx", "torch")


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has a GPU")
    monkeypatch.setattr(swin_deploy.gpus, "cuda_driver", lambda: FakeDriver("sm_89"))
    with pytest.raises((MissingDependencyError, BackendError), match=r"cannot run on cuda:1"):
        swin_deploy.load(digits(2), backend="torch", device="cuda:1", precision="fp32")


def test_tensors_on_the_device_are_read_in_place_and_values_freed_after_their_last_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, with the CPU as the device."""
    from swin_deploy.runtimes.dlpack import DeviceTensor

    read, results, alive = list[int](), list[Any](), list[int]()

    def relu(x: Any) -> Any:
        read.append(x.data_ptr())
        alive.append(sum(one() is not None for one in results))
        results.append(weakref.ref(found := torch.relu(x)))
        return found

    monkeypatch.setitem(OPERATORS, "Relu", lambda numbers: relu)
    model = single("Relu", {}, [X])
    model.graph.node[0].output[0] = "x1"
    model.graph.node.extend(helper.make_node("Relu", [f"x{n}"], ["y0" if n == 5 else f"x{n + 1}"]) for n in range(1, 6))
    (tmp_path / "chain.onnx").write_bytes(model.SerializeToString())
    values = torch.from_numpy(X)
    with runtime_from_onnx(tmp_path / "chain.onnx", "torch") as runtime:
        found = runtime.run({"x0": DeviceTensor("cpu", X.dtype, X.shape, values.data_ptr(), values)})["y0"]
    assert found.tobytes() == np.maximum(X, 0).tobytes()
    assert read[0] == values.data_ptr()
    assert alive == [0, 1, 1, 1, 1, 1]
