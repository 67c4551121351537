"""A checkpoint -> a bundle: network, ONNX graph, PyTorch's answers, comparison; nothing is kept unless all of it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.bundle import CONFIG, PREPROCESSOR, REFERENCE, Bundle, Draft, create_bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, ExportError, InputError, MissingDependencyError, VerificationError
from swin_deploy.preprocess import Preprocessor
from swin_deploy.reference import OpenGraph, Reference, Verdict, check_graph, sample_inputs
from swin_deploy.requires import require
from swin_deploy.specs import TensorSpec, graph_file

from .onnx_from_torch import INPUT, OPSET, OUTPUT, onnx_from_torch, writer

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint

Say = Callable[[str], None]
LARGEST_SIDE = 4096  # pixels; a graph for more than that would not fit into memory
PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf message ends at 2 GiB, and the graph itself needs some
TOOLS = ("swin-deploy", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "numpy")


def bundle_from_checkpoint(
    checkpoint: Checkpoint, path: Path, *, variant: str | None, replace: bool, open_graph: OpenGraph, say: Say
) -> tuple[Bundle, Verdict | None]:
    """The bundle at `path`, and the verdict on its graph (None when ONNX Runtime is not there to run it).

    `open_graph` loads the graph to be compared; `say` gets a line for each step. Raises VerificationError, and writes
    nothing, when ONNX and PyTorch disagree.
    """
    torch = require("torch", "export a model")
    onnx = require("onnx", "export a model")
    for module in ("onnxscript", "onnx_graphsurgeon"):
        require(module, "export a model")
    from swin_deploy.models.swin import SwinForImageClassification

    config = checkpoint.config
    preprocessor = _preprocessor(checkpoint, say)
    image_size = _image_size(preprocessor, config, say)
    facts = {
        "name": Path(os.path.realpath(path)).name,
        "variant": variant,
        "task": "image-classification",
        "semantics": "hf",
        "source": checkpoint.source,
        "image_size": list(image_size),
        "inputs": [TensorSpec(INPUT, "float32", ("batch", config.num_channels, *image_size)).to_dict()],
        "outputs": [TensorSpec(OUTPUT, "float32", ("batch", config.num_labels or config.hidden_size)).to_dict()],
        "tools": tool_versions(TOOLS),
    }
    with create_bundle(path, replace=replace, facts=facts) as draft:
        say(f"Loading {checkpoint.source}")
        network = SwinForImageClassification(config, image_size, checkpoint.tensors).eval()
        _check_size(network)
        say("Running PyTorch on the reference inputs")
        reference = _reference(torch, network, config, image_size)
        say("Tracing to ONNX")
        model, records = onnx_from_torch(network, config, image_size)
        file = graph_file("fp32")
        entry = {
            "precision": "fp32",
            "opset": OPSET,
            "parent": None,
            "passes": [{"name": r.name, "count": r.count} for r in records],
        }
        draft.add(file, entry, writer(model))
        del model
        onnx.checker.check_model(str(draft.path / file), full_check=True)
        say("Comparing ONNX with PyTorch")
        verdict, reference = _verdict(torch, network, reference, open_graph, draft, file)
        draft.files[file]["agreement"] = verdict.to_dict() if verdict else "not verified"
        draft.add_json(CONFIG, checkpoint.raw_config or config.to_dict())
        draft.add_json(PREPROCESSOR, checkpoint.preprocessor or preprocessor.to_dict())
        draft.add(REFERENCE, {}, reference.save)
    return Bundle.open(path), verdict


def tool_versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _reference(torch: Any, network: torch.nn.Module, config: SwinConfig, image_size: tuple[int, int]) -> Reference:
    inputs = sample_inputs(config.num_channels, image_size)
    with torch.no_grad():
        logits = network(torch.from_numpy(inputs)).numpy()
    return Reference(inputs, logits)


def _verdict(
    torch: Any, network: torch.nn.Module, reference: Reference, open_graph: OpenGraph, draft: Draft, file: str
) -> tuple[Verdict | None, Reference]:
    try:
        verdict = check_graph(reference, open_graph, draft.path / file, file, "fp32")
    except MissingDependencyError:
        return None, reference
    if verdict.agreement.finite and not verdict.verified:
        # Some weights amplify rounding beyond any fixed bound; how far PyTorch is from itself in float64 tells.
        with torch.no_grad():
            exact = network.double()(torch.from_numpy(reference.pixel_values).double()).numpy()
        noise = float((((reference.logits - exact) ** 2).sum(axis=1) ** 0.5 / ((exact**2).sum(axis=1) ** 0.5)).max())
        reference = Reference(reference.pixel_values, reference.logits, noise)
        verdict = Verdict(file, "fp32", verdict.backend, verdict.agreement, reference.tolerance("fp32"))
    if not verdict.verified:
        problem = (
            f"they differ by {verdict.agreement.relative_l2:.2e} (relative L2), and {verdict.tolerance:.0e} is allowed"
            if verdict.agreement.finite
            else "the outputs hold NaN or infinity"
        )
        raise VerificationError(
            f"The ONNX graph does not answer as PyTorch does: {problem}. Nothing was written. Install the versions in "
            f"constraints.txt, and please report it."
        )
    return verdict, reference


def _check_size(network: torch.nn.Module) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    if size > PROTOBUF_LIMIT:
        raise ExportError(
            f"The ONNX graph would hold {size / 1e9:.1f} GB of weights; this release writes a single file, of at most "
            f"{PROTOBUF_LIMIT / 1e9:.1f} GB. Every published Swin up to SwinV2-L at 384 pixels fits."
        )


def _image_size(preprocessor: Preprocessor, config: SwinConfig, say: Say) -> tuple[int, int]:
    """What the checkpoint's image processor makes of every image, which is what its network is run at."""
    if preprocessor.do_center_crop and preprocessor.crop_size is not None:
        size = preprocessor.crop_size
    elif preprocessor.do_resize and preprocessor.shortest_edge is None:
        size = preprocessor.size
    else:
        return config.image_size
    if max(size) > LARGEST_SIDE:
        raise CheckpointError(
            f"preprocessor_config.json makes images of {size[0]} x {size[1]} pixels; at most {LARGEST_SIDE} a side."
        )
    if size != config.image_size:
        say(f"The image processor makes images of {size[0]} x {size[1]} pixels, and so the graph is made for that size")
    return size


def _preprocessor(checkpoint: Checkpoint, say: Say) -> Preprocessor:
    config = checkpoint.config
    if config.num_channels != 3:
        raise CheckpointError(
            f"This Swin takes {config.num_channels} channels; this release exports networks for images of 3 channels."
        )
    found = checkpoint.preprocessor
    if found is None:
        if not checkpoint.source.startswith("random weights"):
            say("The checkpoint has no preprocessor_config.json; taking the published one of Swin (bicubic, ImageNet mean)")
        return Preprocessor.imagenet(config.image_size)
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "ViTImageProcessor")
    if not kind.startswith("ViT"):
        raise CheckpointError(
            f"preprocessor_config.json names {kind}; swin-deploy reproduces ViTImageProcessor, which every published Swin "
            f"uses. Replace the file by one of that kind if the model was trained so."
        )
    try:
        preprocessor = Preprocessor.from_dict(found)
    except InputError as error:
        raise CheckpointError(f"preprocessor_config.json: {error}") from error
    return preprocessor
