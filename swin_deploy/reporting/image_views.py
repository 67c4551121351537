"""The user's images as the network sees them: prepared pixels, the best classes of every graph, and maps of attention.

The attention is that of the fp32 graph, whose softmax nodes are read. A token receives attention from the queries of its
window. The sum over these queries is 1 on average, whatever the size of the window, its shift or its mask. The rollout
combines all blocks: half of what a token holds comes from itself (the residual), and half from the tokens that it attends to.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.errors import MissingDependencyError, SwinDeployError
from swin_deploy.frame_input import Frames, Preparation
from swin_deploy.models.windows import PAD, StageGrids, merge_order, stage_grids
from swin_deploy.options import Array, Progress
from swin_deploy.preprocess import Preprocessor

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import Samples

SHOWN = 6  # images
BEST = 5  # classes of an image
SIDE = 256  # pixels of a picture in the page, at most
HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # five colours of the map "magma"
OCTAVES = 1  # the colours reach from half of the average to twice the average
COLUMNS, ROWS = ("left", "center", "right"), ("top", "middle", "bottom")


@dataclass(frozen=True)
class AttentionView:
    """A map of attention over an image: its title, where it is largest in few and many words, and a data URI."""

    title: str
    peak: str
    text: str
    picture: str


@dataclass(frozen=True)
class ImageView:
    """An image, by its number in the figures: what it was, what the network receives, and maps of its attention."""

    number: int
    original: str
    pixels: str
    maps: tuple[AttentionView, ...]


def views_of_images(bundle: Bundle, samples: Samples, progress: Progress) -> tuple[tuple[ImageView, ...], dict[str, Any]]:
    """Return the pictures of the first images that can be read, and the figures of all of these."""
    from swin_deploy.calib.data import preparation_and_inputs

    file = next(iter(bundle.graphs_of("fp32")))
    preparation, inputs = preparation_and_inputs(bundle, file)
    shown = samples.with_size(preparation, inputs)
    feeds: list[tuple[int, Mapping[str, Array]]] = []
    for rows, one in shown.numbered(1):
        feeds += [(shown.chosen[row], one) for row in rows]
        if len(feeds) == SHOWN:
            break
    attention, reason = None, ""
    try:
        attention = _AttentionReader(bundle, file)
    except (MissingDependencyError, ValueError) as error:
        reason = str(error)
    answers = _answers(bundle, [feed for _, feed in feeds])
    views, figures = [], []
    for number, (index, feed) in enumerate(feeds):
        tensor, pixels = _seen(preparation, feed[inputs[0].name])
        sample = next(samples.source.read([index]))
        maps, described = ([], []) if attention is None else attention.maps(feed, pixels)
        views.append(ImageView(number, _original(sample), _picture(pixels), tuple(maps)))
        axes = (1, 2)
        figures.append(
            {
                "name": samples.source.name(index),
                "original": _size_of(sample),
                "pixels": list(pixels.shape[:2]),
                "channels": [
                    {"min": float(low), "max": float(high), "mean": float(mean)}
                    for low, high, mean in zip(tensor.min(axes), tensor.max(axes), tensor.mean(axes), strict=True)
                ],
                "graphs": {name: one[number] for name, one in answers.items()},
                "attention": described,
            }
        )
        progress("Showing images", number + 1, len(feeds))
    return tuple(views), {"images": figures, "attention_missing": reason, "failed": dict(samples.failures)}


def _seen(preparation: Preparation, feed: Array) -> tuple[Array, Array]:
    """Return the normalized tensor [channels, height, width] of an image, and its pixels uint8 [height, width, channels]."""
    steps, frame = preparation, None
    if isinstance(preparation, Frames):
        steps, frame = preparation.preprocessor, np.asarray(preparation.pixels(feed[:1])[0])
        feed = steps(frame) if preparation.frame_size else feed
    assert isinstance(steps, Preprocessor)
    scale = steps.rescale_factor if steps.do_rescale else 1.0
    mean, std = np.zeros(steps.channels), np.ones(steps.channels)
    if steps.do_normalize:
        mean, std = np.asarray(steps.image_mean), np.asarray(steps.image_std)
    if frame is not None and feed.dtype != np.float32:  # the graph only rescales and normalizes
        return np.asarray(((frame * scale - mean) / std).transpose(2, 0, 1)), frame
    tensor = np.asarray(feed[0], np.float64)
    pixels = (tensor.transpose(1, 2, 0) * std + mean) / scale
    return tensor, np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _answers(bundle: Bundle, feeds: Sequence[Mapping[str, Array]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the best classes of each image by each graph of the first image size; empty for a network without classes."""
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.tasks import scores_from_logits

    config = bundle.config
    if bundle.task.name != "image-classification" or not config.has_classes:
        return {}
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for file, entry in bundle.graphs.items():
        if entry.image_size != bundle.image_size:
            continue
        with runtime_to_check(bundle.verified_path(file)) as runtime:
            logits = [runtime.run(feed)["logits"][0] for feed in feeds]
        found[file] = []
        for one in logits:
            scores = scores_from_logits(one, config.score_activation)
            best = np.argsort(-one, kind="stable")[:BEST]
            found[file].append([{"index": int(i), "label": config.id2label[int(i)], "score": float(scores[i])} for i in best])
    return found


class _AttentionReader:
    """Reads the mean over heads of the attention probabilities of every block from an fp32 graph."""

    def __init__(self, bundle: Bundle, file: str) -> None:
        from swin_deploy.calib.collect import WEIGHTS_FOLDER
        from swin_deploy.dependencies import onnxruntime_session, require

        onnx = require("onnx", "read the attention from the graph")
        path, self._config = bundle.verified_path(file), bundle.config
        model = onnx.load(str(path), load_external_data=False)
        nodes = [node for node in model.graph.node if node.op_type == "Softmax" and node.name.startswith("stages.")]
        if len(nodes) != self._config.blocks:
            raise ValueError(f"{file} has {len(nodes)} attention nodes, and the network has {self._config.blocks} blocks.")
        self._names = [f"{node.output[0]}/mean" for node in nodes]
        new = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx")) >= 18
        if new:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-3]), "attention/heads"))
        for node, name in zip(nodes, self._names, strict=True):  # the heads are the third axis from the end in every layout
            inputs, axes = ([node.output[0], "attention/heads"], {}) if new else ([node.output[0]], {"axes": [-3]})
            model.graph.node.append(onnx.helper.make_node("ReduceMean", inputs, [name], keepdims=0, **axes))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names)
        folder = {WEIGHTS_FOLDER: str(path.absolute().parent)}
        self._session = onnxruntime_session(model.SerializeToString(), config=folder, enable_cpu_mem_arena=False)
        self._batch = bundle.static_batch or 1
        backbone = bundle.task.name == "backbone"
        self._stages = stage_grids(self._config, bundle.image_size, backbone, tokens_first=False)

    def blocks(self, feed: Mapping[str, Array]) -> list[Array]:
        """Return [windows, tokens, tokens] for each block, of the first image of `feed`."""
        repeated = {name: np.repeat(array[:1], self._batch, axis=0) for name, array in feed.items()}
        found = self._session.run(self._names, repeated)
        # Two layouts: [windows, batch, tokens, tokens], and without the batch, which is then averaged with the heads.
        return [np.asarray(one[:, 0] if one.ndim == 4 else one, np.float64) for one in found]

    def maps(self, feed: Mapping[str, Array], pixels: Array) -> tuple[list[AttentionView], list[dict[str, Any]]]:
        """Return the rollout, and the attention that each token of the last block of every stage receives."""
        blocks, views, figures, start = self.blocks(feed), [], [], 0
        found = [("All blocks (rollout)", attention_rollout(self._stages, blocks))]
        for number, stage in enumerate(self._stages):
            last = start + len(stage.grids) - 1
            found.append(
                (f"Stage {number}, block {len(stage.grids) - 1}", received_attention(stage, len(stage.grids) - 1, blocks[last]))
            )
            start = last + 1
        cell = self._config.patch_size
        for number, (title, tokens) in enumerate(found):
            step = 2 ** max(number - 1, 0)
            peak, text, figure = _described(tokens)
            views.append(AttentionView(title, peak, text, _picture(_heated(pixels, tokens, (cell[0] * step, cell[1] * step)))))
            figures.append({"map": title, **figure})
        return views, figures


def received_attention(stage: StageGrids, block: int, attention: Array) -> Array:
    """Return [height, width]: what each token receives, 1 on average. `attention` is [windows, queries, keys]."""
    places = _places(stage, block)
    received = np.zeros(stage.height * stage.width)
    real = places != PAD
    np.add.at(received, places[real], (attention * real[:, :, None]).sum(axis=1)[real])
    return received.reshape(stage.height, stage.width)


def attention_rollout(stages: Sequence[StageGrids], blocks: Sequence[Array]) -> Array:
    """Return [height, width] of the first stage: the share of each token in the mean of the last stage, 1 on average."""
    held = np.full(stages[-1].height * stages[-1].width, 1.0)
    last = len(blocks)
    for number in reversed(range(len(stages))):
        stage = stages[number]
        for block in reversed(range(len(stage.grids))):
            last -= 1
            places = _places(stage, block)
            real = places != PAD
            moved = np.einsum("wq,wqk->wk", np.where(real, held[places], 0), blocks[last])
            received = np.zeros_like(held)
            np.add.at(received, places[real], moved[real])
            held = (held + received) / 2
        if number:
            before = stages[number - 1]
            parts = merge_order(before, np.arange(len(held)))
            shared = np.zeros(before.height * before.width)
            real = parts != PAD
            np.add.at(shared, parts[real], np.broadcast_to(held[:, None], parts.shape)[real])
            held = shared
    return np.asarray(held / held.mean()).reshape(stages[0].height, stages[0].width)


def _places(stage: StageGrids, block: int) -> Array:
    """Return [windows, tokens]: the position of each token of each window."""
    grid = stage.grids[block]
    order = grid.order()
    return order.reshape(grid.tokens_per_window, grid.windows).T if grid.tokens_first else order.reshape(grid.windows, -1)


def _described(tokens: Array) -> tuple[str, str, dict[str, Any]]:
    """Return in words and numbers where a map is largest."""
    row, column = (int(one) for one in np.unravel_index(int(tokens.argmax()), tokens.shape))
    height, width = tokens.shape
    where = f"{ROWS[3 * row // height]} {COLUMNS[3 * column // width]}".replace("middle center", "center")
    most, concentrated = (
        float(tokens.max()),
        float(np.sort(tokens, axis=None)[-max(1, tokens.size // 10) :].sum() / tokens.sum()),
    )
    figure = {
        "row": row,
        "column": column,
        "rows": height,
        "columns": width,
        "largest": most,
        "share_of_top_tenth": concentrated,
    }
    peak = f"{most:.1f} times the average at the {where}"
    return peak, f"at most {peak}; the top tenth of {tokens.size} tokens gets {concentrated:.0%}", figure


def _heated(pixels: Array, tokens: Array, cell: tuple[int, int]) -> Array:
    """Lay a map over an image, with the same colours for the same values in every map."""
    height, width = pixels.shape[:2]
    large = np.repeat(np.repeat(tokens, cell[0], axis=0), cell[1], axis=1)[:height, :width]
    heat = np.clip((np.log2(np.maximum(large, 1e-12)) + OCTAVES) / (2 * OCTAVES), 0, 1)
    anchors = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, anchors, [colour[c] for colour in HEAT]) for c in range(3)], axis=-1)
    gray = _visible(pixels).mean(axis=-1, keepdims=True)
    mixed = np.rint(0.35 * gray[: large.shape[0], : large.shape[1]] + 0.65 * colours)
    return np.asarray(mixed, np.uint8)


def _visible(pixels: Array) -> Array:
    """Return RGB of an image: three channels as they are, otherwise their mean."""
    if pixels.shape[-1] == 3:
        return pixels
    return np.asarray(np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8))


def _picture(pixels: Array) -> str:
    """Return an image as a data URI; a small one enlarged without smoothing."""
    from PIL import Image

    image = Image.fromarray(_visible(pixels))
    if (grown := SIDE // max(image.size)) > 1:
        image = image.resize((image.width * grown, image.height * grown), Image.Resampling.NEAREST)
    return _data_uri(image)


def _data_uri(image: Any) -> str:
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _opened(sample: Any) -> Any:
    """Return a sample as a PIL image; None if it is a prepared array."""
    from PIL import Image

    if isinstance(sample, Image.Image):
        return sample
    if hasattr(sample, "__array__"):
        array = np.asarray(sample)
        return Image.fromarray(_visible(array if array.ndim == 3 else array[..., None])) if array.dtype == np.uint8 else None
    try:
        return Image.open(sample)
    except (OSError, ValueError, SwinDeployError):
        return None  # a NumPy file


def _original(sample: Any) -> str:
    """Return the image before preprocessing as a data URI; empty if it was already prepared."""
    from PIL import ImageOps

    image = _opened(sample)
    return "" if image is None else _data_uri(ImageOps.exif_transpose(image).convert("RGB"))


def _size_of(sample: Any) -> list[int] | None:
    image = _opened(sample)
    return None if image is None else [image.height, image.width]
