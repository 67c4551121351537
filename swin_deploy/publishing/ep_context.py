"""An ONNX file with one EPContext node around an engine, for the TensorRT providers of ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from swin_deploy import __version__
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError
from swin_deploy.manifest import TensorSpec
from swin_deploy.options import PublishSpec

from .base import publication

if TYPE_CHECKING:
    import onnx

ENGINE = "model.engine"
DOMAIN = "com.microsoft"
LARGEST = (1 << 31) - (1 << 20)  # bytes that fit into an ONNX file
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}


def write_ep_context(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write `model_ctx.onnx` and, unless the engine is embedded, `model.engine` beside it."""
    onnx_module = require("onnx", "write an EPContext graph")
    chosen = publication(bundle, spec, engine=True)
    engine = chosen.engine
    assert engine is not None
    if spec.embed_engine and engine.bytes > LARGEST:
        raise UsageError("The engine is too large for an ONNX file. Leave out --embed-engine.")
    helper, graph = onnx_module.helper, chosen.graph
    node = helper.make_node(
        "EPContext",
        [one.name for one in graph.inputs],
        [one.name for one in graph.outputs],
        name="engine",
        domain=DOMAIN,
        main_context=1,
        embed_mode=int(spec.embed_engine),
        ep_cache_context=bundle.verified_path(chosen.file).read_bytes() if spec.embed_engine else ENGINE,
        ep_sdk_version=engine.backend_version,
        hardware_architecture="80+" if engine.options.hardware_compatible else re.sub(r"\D", "", engine.gpu),
        onnx_model_filename=PurePosixPath(engine.graph).name,
        partition_name="engine",
        source=PROVIDERS[engine.backend],
    )
    inputs, outputs = ([_value(one) for one in specs] for specs in (graph.inputs, graph.outputs))
    made = helper.make_model(
        helper.make_graph([node], chosen.name, inputs, outputs),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
        producer_name="swin-deploy",
        producer_version=__version__,
    )
    ranges = ",".join(":".join(map(str, profile.batch)) for profile in engine.profiles)
    # Those of the graph, whose verdict is not that of the engine.
    source = onnx_module.load(bundle.verified_path(engine.graph), load_external_data=False)
    stated = {"graph_verdict" if one.key == "verdict" else one.key: one.value for one in source.metadata_props}
    facts = stated | {"engine_sha256": engine.sha256, "graph_sha256": engine.parent, "gpu": engine.gpu, "batches": ranges}
    helper.set_model_props(made, {**facts, "compiler": f"{engine.backend} {engine.backend_version}"})
    onnx_module.save(made, folder / "model_ctx.onnx")
    if not spec.embed_engine:
        chosen.write_model(folder / ENGINE)


def _value(one: TensorSpec) -> onnx.ValueInfoProto:
    import numpy as np
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(one.dtype))
    return onnx.helper.make_tensor_value_info(one.name, kind, list(one.shape))
