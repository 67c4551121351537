"""Record a network as an ONNX graph with a free batch axis, apply the graph passes, and check the operators.

The network runs once, on tensors without memory, and each torch function that it calls becomes an ONNX node.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import installed, require
from swin_deploy.errors import ExportError
from swin_deploy.options import Size
from swin_deploy.parity import sample_inputs

from .external_data import PROTOBUF_LIMIT, SMALLEST, Weights, embed_weights, weight_bytes
from .passes import PASSES, PassRecord, run_passes
from .passes.base import OPSET, NetworkCheck

if TYPE_CHECKING:
    import onnx

    from swin_deploy.models.swin import SwinNetwork

BATCH = 1_000_003  # images in the recorded batch; prime, and larger than any other axis
COMPARED = 1024  # elements; equal constants up to this size are stored once

# The operators of a Swin with static shapes. Any other (Shape, If, Loop, Pad, ...) means that something depends on the input
# size at run time, which is slower everywhere and prevents fusions in TensorRT.
# fmt: off
OPERATORS = frozenset({
    "Add", "Clip", "Conv", "Div", "Gather", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "ReduceMean",
    "ReduceSum", "Reshape", "Slice", "Softmax", "Split", "Sqrt", "Transpose", "Unsqueeze", "Where",
    # embedded preprocessing
    "Cast", "Floor",
    # activations other than GELU
    "Erf", "Greater", "HardSwish", "LeakyRelu", "Max", "Min", "Mish", "Pow", "Relu", "Sigmoid", "Softplus", "Sub",
    "Tanh",
})
# Repeat a constant for every image; OpenVINO folds them if the batch is known.
OF_OPENVINO = frozenset({"Concat", "Expand", "Shape"})
OF_POOLS = frozenset({"Concat", "ReduceMax"})  # of the tokens, other than their mean
# fmt: on


@dataclass(frozen=True)
class Traced:
    """An fp32 graph, its weights (which share memory with the network), and the passes that were applied."""

    model: onnx.ModelProto
    weights: Weights
    passes: tuple[PassRecord, ...]


def onnx_from_torch(network: SwinNetwork, image_size: Size, frames: TensorSpec | None = None) -> Traced:
    """Record `network` as an fp32 graph for images, or `frames`, of one size, and apply the passes of its target."""
    inputs = network.task.inputs(network.config, image_size, frames)
    model, weights = _recorded(network, inputs)
    gs = require("onnx_graphsurgeon", "rewrite the ONNX graph")
    graph = gs.import_onnx(model)
    records = run_passes(graph, network.config, PASSES[network.target], _check(network, model, weights, inputs))
    graph.name = f"swin_v{network.config.version}"
    graph.producer_name = "swin-deploy"
    model = gs.export_onnx(graph)
    known = OPERATORS | (OF_OPENVINO if network.target == "openvino" else frozenset())
    known |= OF_POOLS if network.config.global_pool != "avg" else frozenset()
    foreign = sorted({node.op_type for node in model.graph.node} - known)
    if foreign:
        raise ExportError(
            f"The graph has operators that a Swin with static shapes does not need: {', '.join(foreign)}. Please report it, "
            f"with the options of the export."
        )
    return Traced(model, weights, records)


def _check(network: SwinNetwork, model: Any, weights: Weights, inputs: tuple[TensorSpec, ...]) -> NetworkCheck | None:
    """The check of the rewrites; None without ONNX Runtime, beyond 2 GB, or if there are none."""
    if network.target != "openvino" or not installed("onnxruntime") or weight_bytes(weights) > PROTOBUF_LIMIT:
        return None

    def complete(light: Any) -> Any:
        whole = type(light)()
        whole.CopyFrom(light)
        embed_weights(whole, weights)
        return whole

    return NetworkCheck(model, sample_inputs(inputs), complete)


@dataclass(eq=False)
class _Value:
    """What a node writes, an input of the graph, or a constant: a torch tensor or a numpy array."""

    shape: tuple[int, ...]
    dtype: str  # of numpy
    node: _Node | None = None
    constant: Any = None
    name: str = ""

    @classmethod
    def of(cls, numbers: Any, dtype: Any = np.int64) -> _Value:
        array = np.asarray(numbers, dtype)
        if dtype is np.int64 and (array >= BATCH).any():
            raise ExportError("A constant of the graph depends on the batch. Please report it, with the options of the export.")
        return cls(array.shape, array.dtype.name, constant=array)


@dataclass(eq=False)
class _Node:
    op: str
    inputs: list[_Value]
    attributes: dict[str, Any]
    module: str
    outputs: list[_Value] = field(default_factory=list)


class _Recorder:
    """Turns calls of torch functions into nodes.

    Tensors that depend on an input of the network are on the device `meta`: they have a shape and no memory. Functions of other
    tensors are computed, and their results are constants.
    """

    def __init__(self, network: Any) -> None:
        self.names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
        self.modules = ["swin"]  # the module that runs is the last one
        self.nodes: list[_Node] = []
        self.inputs: list[_Value] = []
        self.values: dict[int, _Value] = {}  # of tensors that depend on an input, by id
        self.constants: dict[int, tuple[_Value, Any]] = {}  # of other tensors, with their counterparts on the device meta
        self.kept: list[Any] = []  # all these tensors, so that none of the ids is used again

    def input(self, spec: TensorSpec) -> Any:
        """Add an input and return its tensor."""
        import torch

        shape = (BATCH, *(int(side) for side in spec.shape[1:]))
        tensor = torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")
        self.inputs.append(_Value(shape, spec.dtype, name=spec.name))
        self.values[id(tensor)] = self.inputs[-1]
        self.kept.append(tensor)
        return tensor

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call a torch function, and add the nodes that compute the same if the result depends on an input or the batch."""
        import torch

        name = str(function.__name__)
        depends = any(id(one) in self.values or (isinstance(one, int) and one >= BATCH) for one in _leaves((args, kwargs)))
        if name == "__get__" or not depends:  # an attribute, such as the shape, or a function of constants
            return function(*args, **kwargs)
        if name in FUNCTIONS:
            value = FUNCTIONS[name](self, *_mapped(self._value, args), **_mapped(self._value, kwargs))
            result = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")
            made = {id(result): value}
        else:
            result = function(*_mapped(self._meta, args), **_mapped(self._meta, kwargs))
            tensors = [one for one in _leaves(result) if isinstance(one, torch.Tensor)]
            if not tensors:
                return result
            if name not in VIEWS:
                raise ExportError(f"The network calls {name} of torch, which has no translation to ONNX. Please report it.")
            values = VIEWS[name](self, tensors[0].shape, *_mapped(self._value, args), **_mapped(self._value, kwargs))
            made = {id(tensor): value for tensor, value in zip(tensors, values, strict=True)}
            for tensor, value in zip(tensors, values, strict=True):
                value.dtype = _dtype(tensor)
        self.values |= made
        self.kept.append(result)
        return result

    def node(self, op: str, *inputs: Any, shape: Iterable[int] = (), dtype: str = "float32", **attributes: Any) -> _Value:
        """Add a node and return its output, whose shape is by default that of the inputs after broadcasting.

        A number among the inputs becomes a float32 constant, and None is left out.
        """
        values = [one if isinstance(one, _Value) else _Value.of(one, np.float32) for one in inputs if one is not None]
        node = _Node(op, values, attributes, self.modules[-1])
        found = tuple(shape) or np.broadcast_shapes(*(value.shape for value in values))
        node.outputs.append(_Value(found, dtype, node))
        self.nodes.append(node)
        return node.outputs[0]

    def forget(self) -> None:
        """Release all tensors. Nodes and values refer to each other, which only the garbage collector would notice."""
        for node in self.nodes:
            node.inputs, node.outputs = [], []
        self.__dict__.clear()

    def _value(self, one: Any) -> Any:
        """The value of a tensor; anything else is returned as it is."""
        import torch

        if not isinstance(one, torch.Tensor):
            return one
        return self.values[id(one)] if id(one) in self.values else self._constant(one)[0]

    def _meta(self, one: Any) -> Any:
        """The counterpart of a constant on the device meta; anything else is returned as it is."""
        import torch

        return self._constant(one)[1] if isinstance(one, torch.Tensor) and id(one) not in self.values else one

    def _constant(self, tensor: Any) -> tuple[_Value, Any]:
        import torch

        if id(tensor) not in self.constants:
            value = _Value(tuple(tensor.shape), _dtype(tensor), constant=tensor, name=self.names.get(id(tensor), ""))
            self.constants[id(tensor)] = value, torch.empty_like(tensor, device="meta")
            self.kept.append(tensor)
        return self.constants[id(tensor)]


def _recorded(network: SwinNetwork, specs: Sequence[TensorSpec]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Run the network once and return its graph, and its large constants by name."""
    import torch

    recorder = _Recorder(network)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return recorder.call(function, args, kwargs or {})

    inputs = [recorder.input(spec) for spec in specs]
    with torch.no_grad(), _followed(network, recorder.modules), Mode():
        results = network(*inputs)
    outputs = [recorder.values[id(result)] for result in results]
    nodes, count = _read(recorder.nodes, outputs), 0
    while count != len(nodes):
        count = len(nodes)
        nodes = _joined(nodes, outputs)
    nodes = _shared(nodes, outputs)
    made = _model(nodes, recorder.inputs, dict(zip(network.output_names, outputs, strict=True)))
    recorder.forget()
    return made


@contextlib.contextmanager
def _followed(network: Any, modules: list[str]) -> Iterator[None]:
    """Keep the name of the module that runs at the end of `modules`."""

    def entered(name: str, *_: Any) -> None:
        modules.append(name)

    def left(*_: Any) -> None:
        modules.pop()

    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(partial(entered, name)).remove)
                hooks.callback(module.register_forward_hook(left).remove)
        yield


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list | tuple):
        for one in item:
            yield from _leaves(one)
    else:
        yield item


def _mapped(change: Callable[[Any], Any], item: Any) -> Any:
    """`item` with every leaf changed."""
    if isinstance(item, dict):
        return {key: _mapped(change, one) for key, one in item.items()}
    if isinstance(item, list | tuple):
        changed = [_mapped(change, one) for one in item]
        return tuple(changed) if isinstance(item, tuple) else changed
    return change(item)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


Shape = tuple[int, ...]


def _reshape(recorder: _Recorder, shape: Shape, x: _Value, *_: Any) -> list[_Value]:
    return [recorder.node("Reshape", x, _Value.of([side if side % BATCH else -1 for side in shape]), shape=shape)]


def _permute(recorder: _Recorder, shape: Shape, x: _Value, *axes: Any) -> list[_Value]:
    order = axes if isinstance(axes[0], int) else axes[0]
    return [recorder.node("Transpose", x, shape=shape, perm=[axis % len(shape) for axis in order])]


def _transpose(recorder: _Recorder, shape: Shape, x: _Value, one: int, other: int) -> list[_Value]:
    order = list(range(len(shape)))
    order[one], order[other] = order[other], order[one]
    return _permute(recorder, shape, x, order)


def _expand(recorder: _Recorder, shape: Shape, x: _Value, *_: Any) -> list[_Value]:
    given = recorder.inputs[0]
    sizes = recorder.node("Shape", given, shape=(len(given.shape),), dtype="int64")
    # Not by the attributes of Shape, which OpenCV 4 ignores.
    images = recorder.node("Gather", sizes, _Value.of([0]), shape=(1,), dtype="int64", axis=0)
    wanted = [1 if side == before else side for side, before in zip(shape, x.shape, strict=True)]  # 1: as it is
    parts = (images if side == BATCH else _Value.of([side]) for side in wanted)
    return [
        recorder.node("Expand", x, recorder.node("Concat", *parts, shape=(len(shape),), dtype="int64", axis=0), shape=shape)
    ]


def _chunk(recorder: _Recorder, shape: Shape, x: _Value, chunks: int, dim: int = 0) -> list[_Value]:
    recorder.node("Split", x, shape=shape, axis=dim % len(shape), num_outputs=chunks)
    node = recorder.nodes[-1]
    node.outputs += [_Value(tuple(shape), x.dtype, node) for _ in range(chunks - 1)]
    return node.outputs


def _getitem(recorder: _Recorder, shape: Shape, x: _Value, index: Any) -> list[_Value]:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(x.shape) - len(parts) + 1)
    for axis, part in enumerate(parts):
        start, stop, step = part.indices(x.shape[axis])
        if (start, stop, step) != (0, x.shape[axis], 1):
            sides = (*x.shape[:axis], len(range(start, stop, step)), *x.shape[axis + 1 :])
            x = recorder.node("Slice", x, *(_Value.of([number]) for number in (start, stop, axis, step)), shape=sides)
    return [x]


def _float(recorder: _Recorder, shape: Shape, x: _Value) -> list[_Value]:
    return [x if x.dtype == "float32" else recorder.node("Cast", x, shape=shape, to=1)]


def _index_select(recorder: _Recorder, shape: Shape, x: _Value, dim: int, index: _Value) -> list[_Value]:
    return [recorder.node("Gather", x, index, shape=shape, axis=dim)]


def _unsqueeze(recorder: _Recorder, shape: Shape, x: _Value, dim: int) -> list[_Value]:
    return [recorder.node("Unsqueeze", x, _Value.of([dim]), shape=shape)]


# Functions whose results torch computes on the device meta: (recorder, shape of the first one, arguments) -> values.
VIEWS: Mapping[str, Callable[..., list[_Value]]] = {
    **{"__getitem__": _getitem, "chunk": _chunk, "expand": _expand, "flatten": _reshape, "float": _float},
    **{"index_select": _index_select, "permute": _permute, "reshape": _reshape, "transpose": _transpose},
    "unsqueeze": _unsqueeze,
}


def _plain(op: str, *more: float) -> Callable[..., _Value]:
    """One node that has the same inputs, and `more` after them."""
    return lambda recorder, *inputs, inplace=False: recorder.node(op, *inputs, *more)


def _reduce(op: str, recorder: _Recorder, x: _Value, dim: int, keepdim: bool = False) -> _Value:
    sides = list(x.shape)
    sides[dim : dim + 1 or None] = [1] * keepdim
    return recorder.node(op, x, _Value.of([dim]), shape=sides, keepdims=int(keepdim))


def _l2_norm(recorder: _Recorder, x: _Value, dim: int, keepdim: bool = False) -> _Value:
    """The root of a sum. MNN and other runtimes read the axes of ReduceL2 wrongly from opset 18 on."""
    return recorder.node("Sqrt", _reduce("ReduceSum", recorder, recorder.node("Mul", x, x), dim, keepdim))


def _matmul(recorder: _Recorder, x: _Value, y: _Value) -> _Value:
    return recorder.node("MatMul", x, y, shape=(*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))


def _cat(recorder: _Recorder, tensors: Sequence[_Value], dim: int = 0) -> _Value:
    sides = list(tensors[0].shape)
    sides[dim] = sum(x.shape[dim] for x in tensors)
    return recorder.node("Concat", *tensors, shape=sides, axis=dim)


def _linear(recorder: _Recorder, x: _Value, weight: _Value, bias: _Value | None = None) -> _Value:
    if len(x.shape) != 2:
        raise ExportError(f"A linear layer of the network reads {len(x.shape)} axes. Expected 2. Please report it.")
    return recorder.node("Gemm", x, weight, _unless_zero(bias), shape=(x.shape[0], weight.shape[0]), transB=1)


def _layer_norm(
    recorder: _Recorder, x: _Value, sizes: Any, weight: _Value | None = None, bias: _Value | None = None, eps: float = 1e-5
) -> _Value:
    return recorder.node("LayerNormalization", x, weight, bias, axis=-len(sizes), epsilon=eps)


def _pad(recorder: _Recorder, x: _Value, pad: Sequence[int], **_: Any) -> _Value:
    """Zeros around images, which become part of the convolution that reads them."""
    left, right, top, bottom = pad
    batch, channels, height, width = x.shape
    shape = (batch, channels, height + top + bottom, width + left + right)
    return recorder.node("Pad", x, shape=shape, pads=[top, left, bottom, right])


def _conv2d(recorder: _Recorder, x: _Value, weight: _Value, bias: _Value | None = None, stride: Any = (1, 1)) -> _Value:
    kernel, before, pads = weight.shape[2:], x.node, [0, 0, 0, 0]
    sides = [(side - size) // step + 1 for side, size, step in zip(x.shape[2:], kernel, stride, strict=True)]
    if before is not None and before.op == "Pad":
        x, pads = before.inputs[0], before.attributes["pads"]
    shape = (x.shape[0], weight.shape[0], *sides)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pads, "dilations": [1, 1], "group": 1}
    return recorder.node("Conv", x, weight, _unless_zero(bias), shape=shape, **attributes)


def _unless_zero(bias: _Value | None) -> _Value | None:
    return bias if bias is not None and bias.constant.any() else None


def _softplus(recorder: _Recorder, x: _Value) -> _Value:
    large = recorder.node("Greater", x, 20, dtype="bool")
    return recorder.node("Where", large, x, recorder.node("Softplus", x))


_SAME = {
    **{"add": "Add", "clamp": "Clip", "clamp_min": "Clip", "div": "Div", "erf": "Erf", "floor": "Floor"},
    **{"hardswish": "HardSwish", "mish": "Mish", "mul": "Mul", "relu": "Relu", "sigmoid": "Sigmoid", "sqrt": "Sqrt"},
    **{"sub": "Sub", "tanh": "Tanh", "where": "Where"},
}
# Other functions, whose results are computed here: torch's rules for the device meta import torch._dynamo, in 2 s.
FUNCTIONS: Mapping[str, Callable[..., _Value]] = {
    **{name: _plain(op) for name, op in _SAME.items()},
    **{"amax": partial(_reduce, "ReduceMax"), "linalg_vector_norm": _l2_norm, "mean": partial(_reduce, "ReduceMean")},
    **{"cat": _cat, "conv2d": _conv2d, "layer_norm": _layer_norm, "linear": _linear, "matmul": _matmul, "pad": _pad},
    **{"relu6": _plain("Clip", 0, 6), "softplus": _softplus, "square": _plain("Pow", 2)},
    "gelu": lambda recorder, x, approximate="none": recorder.node("Gelu", x, approximate=approximate),
    "leaky_relu": lambda recorder, x, negative_slope, **_: recorder.node("LeakyRelu", x, alpha=negative_slope),
    "silu": lambda recorder, x, **_: recorder.node("Mul", x, recorder.node("Sigmoid", x)),
    "softmax": lambda recorder, x, dim: recorder.node("Softmax", x, axis=dim),
}


def _read(nodes: list[_Node], outputs: list[_Value]) -> list[_Node]:
    """The nodes whose outputs are read."""
    wanted = {id(value) for value in outputs}
    kept = []
    for node in reversed(nodes):
        if any(id(value) in wanted for value in node.outputs):
            kept.append(node)
            wanted.update(id(value) for value in node.inputs)
    return kept[::-1]


def _joined(nodes: list[_Node], outputs: list[_Value]) -> list[_Node]:
    """Join a Reshape or Transpose with the one before if nothing else reads that, and remove those that change nothing."""
    final = {id(value) for value in outputs}
    readers = Counter(id(value) for node in nodes for value in node.inputs) + Counter(final)
    same: dict[int, _Value] = {}
    kept = []
    for node in nodes:
        node.inputs = [same.get(id(value), value) for value in node.inputs]
        source, order = node.inputs[0], node.attributes.get("perm")
        before = source.node
        if node.op in ("Reshape", "Transpose") and before is not None and before.op == node.op and readers[id(source)] == 1:
            node.inputs[0] = before.inputs[0]
            if order:
                order = node.attributes["perm"] = [before.attributes["perm"][axis] for axis in order]
        idle = order == sorted(order) if order else node.op == "Reshape" and node.inputs[0].shape == node.outputs[0].shape
        if idle and id(node.outputs[0]) not in final:
            same[id(node.outputs[0])] = node.inputs[0]
            readers[id(node.inputs[0])] += readers[id(node.outputs[0])] - 1
        else:
            kept.append(node)
    return _read(kept, outputs)


def _shared(nodes: list[_Node], outputs: list[_Value]) -> list[_Node]:
    """Compute equal nodes once, and store equal small constants once. Updates `outputs`."""
    final = {id(value) for value in outputs}
    constants: dict[Any, _Value] = {}
    known: dict[Any, _Node] = {}
    same: dict[int, _Value] = {}
    kept = []
    for node in nodes:
        node.inputs = [_first(same.get(id(value), value), constants) for value in node.inputs]
        twin = known.setdefault((node.op, *map(id, node.inputs), repr(sorted(node.attributes.items()))), node)
        # Each output of the graph is written by a node of its own.
        if twin is node or all(any(id(value) in final for value in one.outputs) for one in (node, twin)):
            kept.append(node)
            continue
        for mine, first in zip(node.outputs, twin.outputs, strict=True):
            same[id(mine)] = first
            if id(mine) in final:
                final.add(id(first))
    outputs[:] = [same.get(id(value), value) for value in outputs]
    return kept


def _first(value: _Value, constants: dict[Any, _Value]) -> _Value:
    """The first of the constants that are equal to `value`; `value` itself if it is large, or not constant."""
    if value.constant is None or np.prod(value.shape) > COMPARED:
        return value
    return constants.setdefault((value.dtype, value.shape, np.asarray(value.constant).tobytes()), value)


def _model(nodes: list[_Node], inputs: list[_Value], outputs: Mapping[str, _Value]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph and its large constants. Nodes are named by their modules, which compilers show in their layer reports:
    `stages.0.steps.block1.attention.qkv/Gemm`.
    """
    from onnx import helper

    taken: Counter[str] = Counter()
    constants: dict[str, _Value] = {}
    protos = []
    for name, value in outputs.items():
        value.name = name
    for node in nodes:
        kind = f"{node.module}/{node.op}"
        taken[kind] += 1
        name = kind if taken[kind] == 1 else f"{kind}_{taken[kind]}"
        for place, value in enumerate(node.outputs):
            value.name = value.name or f"{name}_output{place or ''}"
        for place, value in enumerate(node.inputs):
            value.name = value.name or f"{name}_input{place}"
            if value.constant is not None:
                constants[value.name] = value
        read, written = ([value.name for value in values] for values in (node.inputs, node.outputs))
        protos.append(helper.make_node(node.op, read, written, name, **node.attributes))
    inner = [_info(value) for node in nodes for value in node.outputs if value.name not in outputs]
    ends = [[_info(value) for value in values] for values in (inputs, outputs.values())]
    initializers = [_initializer(value) for value in constants.values()]
    graph = helper.make_graph(protos, "swin", ends[0], ends[1], initializers, value_info=inner)
    large = {name: value.constant for name, value in constants.items() if value.constant.nbytes >= SMALLEST}
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), large


def _initializer(value: _Value) -> Any:
    """A tensor with its values, or with a reference if it is large."""
    from onnx import TensorProto, helper, numpy_helper

    if value.constant.nbytes < SMALLEST:
        return numpy_helper.from_array(np.asarray(value.constant), value.name)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    tensor = TensorProto(name=value.name, dims=value.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "weights"), ("offset", "0"), ("length", str(value.constant.nbytes))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def _info(value: _Value) -> Any:
    """The type and shape of a value, with names for the axes that depend on the batch."""
    from onnx import helper

    images = [side // BATCH if side % BATCH == 0 else 0 for side in value.shape]
    names = ["batch" if times == 1 else f"{times}*batch" for times in images]
    shape = [name if times else side for side, times, name in zip(value.shape, images, names, strict=True)]
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)), shape)
