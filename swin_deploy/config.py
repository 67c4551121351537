"""SwinConfig: the architecture of a Swin V1 or V2, with the field names of Hugging Face.

Reads and writes `config.json`. Source: transformers 5.23 configuration_swin.py and configuration_swinv2.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from swin_deploy.errors import CheckpointError, UsageError, shortened, shown
from swin_deploy.options import FRAMEWORKS, SCORES

Window = int | tuple[int, int]  # the side of a square window, or (height, width), which differ

_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), " ")  # control characters

POOLS = ("avg", "max", "avgmax", "catavgmax", "")  # timm's; "" keeps the map

# The activations of transformers without parameters (models/activations.py).
# fmt: off
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
)
# fmt: on

# Keys of config.json that transformers does not have.
OWN_KEYS = (
    *("semantics", "patch_norm", "always_partition", "global_pool", "head_widths", "head_act", "activation"),
    *("final_norm", "map_norms"),
)
# problem_type of transformers -> the activation that turns logits into scores; None: that of a network without a problem_type
PROBLEMS = {"single_label_classification": None, "multi_label_classification": "sigmoid", "regression": "none"}
# Limits of what a config can describe; the largest published Swin has 3 billion parameters and 54 blocks.
MOST_LABELS = 1_000_000  # a name is created for each
MOST_STAGES, MOST_BLOCKS = 16, 1000
MOST_PARAMETERS = 20_000_000_000
MOST_TOKENS = 10_000  # of one window
MOST_PATCHES = 20_000_000  # of one image; each has several indices
MOST_SCORES = 1_000_000_000  # of one window in all heads, or of all windows in one head: constants of the graph
LARGEST_NUMBER = 1_000_000  # of pixels, channels, tokens
LARGEST_RATIO = 1000

# Model types that look like Swin, and what they are.
OTHER_FAMILIES = {
    "swin2sr": "Swin2SR, an image super-resolution network without patch merging",
    "swinv2_cr": "timm's swinv2_cr, a different network from Swin V2",
    "clap": "CLAP, whose audio encoder is HTSAT: a Swin with a batch norm and a reshaped spectrogram before it",
    "clap_audio_model": "HTSAT, an audio encoder: a Swin with a batch norm and a reshaped spectrogram before it",
    "vit": "a Vision Transformer",
}

_CHOICES: dict[str, tuple[str | None, ...]] = {
    **{"hidden_act": ACTIVATIONS, "head_act": ACTIVATIONS, "framework": FRAMEWORKS, "global_pool": POOLS},
    **{"problem_type": (None, *PROBLEMS), "activation": (None, *SCORES)},
}


@dataclass(frozen=True)
class SwinConfig:
    """One Swin architecture. `version` is 1 (model_type "swin") or 2 ("swinv2"). Sizes are in pixels, windows in tokens."""

    version: int
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (4, 4)
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: tuple[Window, ...] = (7, 7, 7, 7)  # one per stage; a single number in config.json if all are equal
    mlp_ratio: float | tuple[float, ...] = 4.0  # a tuple holds one ratio per stage
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = 1e-5
    encoder_stride: int = 32
    pretrained_window_sizes: tuple[Window, ...] = (0, 0, 0, 0)  # V2 only; 0 = trained at `window_size`
    out_features: tuple[str, ...] = ()  # the feature maps of a backbone; empty: its last stage
    global_pool: str = "avg"  # how the classifier pools tokens, one of POOLS
    always_partition: bool = False  # whether odd blocks shift full windows even on maps that are not larger than one
    patch_norm: bool = True  # whether the patch embedding ends in a LayerNorm; optional in Microsoft's code
    final_norm: bool = True  # whether a LayerNorm follows the last stage; Donut's Swin has none
    map_norms: bool | None = None  # whether a backbone normalizes its feature maps; None: by the rule of `feature_norms`
    backbone_maps: bool = True  # whether a V1 backbone's hidden states are maps (transformers 5) or token lists (4)
    head_widths: tuple[int, ...] = ()  # outputs of the linear layers of the classifier before its last one
    head_act: str = "linear"  # the activation between them
    framework: str = "hf"  # source of the rules for windows, shifts, padding and masks; "semantics" in config.json
    id2label: Mapping[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str | None = None  # one of PROBLEMS
    activation: str | None = None  # one of SCORES, which replaces that of the problem type

    def __post_init__(self) -> None:
        stages = len(self.depths)
        _check(self.version in (1, 2), f"version is {self.version}, but Swin has versions 1 and 2")
        _check(stages <= MOST_STAGES, f"it has {stages} stages, and the limit is {MOST_STAGES}")
        depths, heads, windows = list(self.depths), list(self.num_heads), list(self.window_size)
        _check(stages > 0 and all(d > 0 for d in depths), f"depths is {depths}, expected positive numbers")
        _check(sum(depths) <= MOST_BLOCKS, f"it has {sum(depths)} blocks, and the limit is {MOST_BLOCKS}")
        _check(len(heads) == stages, f"num_heads has {len(heads)} entries for {stages} stages (depths {depths})")
        fits = len(windows) == stages and all(min(sides(w)) > 0 for w in windows)
        _check(fits, f"window_size is {windows}, expected a positive number (or one for each of {stages} stages)")
        _check(min(self.image_size) > 0 and min(self.patch_size) > 0, "image_size and patch_size must be positive")
        _check(self.num_channels > 0 and self.embed_dim > 0, "num_channels and embed_dim must be positive")
        numbers = (*self.image_size, *self.patch_size, *(side for window in windows for side in sides(window)))
        numbers += (self.num_channels, self.embed_dim, self.encoder_stride)
        _check(max(numbers) <= LARGEST_NUMBER, f"it contains {max(numbers)}, and the limit is {LARGEST_NUMBER}")
        for stage, count in enumerate(heads):
            fits = count > 0 and self.width(stage) % count == 0
            _check(fits, f"stage {stage} has width {self.width(stage)}, which {count} attention heads do not divide")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                names = ", ".join(map(repr, known) if "" in known else filter(None, known))
                _check(False, f'{name} is "{shown(str(value))}", expected one of {names}')
        ratios = self.mlp_ratio if isinstance(self.mlp_ratio, tuple) else (self.mlp_ratio,) * stages
        _check(len(ratios) == stages, f"mlp_ratio has {len(ratios)} entries for {stages} stages")
        _check(all(0 < value <= LARGEST_RATIO for value in ratios), f"mlp_ratio must be above 0 and at most {LARGEST_RATIO}")
        _check(0 < self.layer_norm_eps <= 1, "layer_norm_eps must be above 0 and at most 1")
        _check(
            len(self.head_widths) <= MOST_STAGES, f"head_widths has {len(self.head_widths)} entries, at most {MOST_STAGES} fit"
        )
        _check(all(0 < width <= LARGEST_NUMBER for width in self.head_widths), "head_widths must be positive numbers")
        if self.version == 2:
            trained = self.pretrained_window_sizes
            _check(len(trained) >= stages, f"pretrained_window_sizes has {len(trained)} entries for {stages} stages")
            why = "pretrained_window_sizes holds 1, for which relative coordinates are 0/0; expected 0 or at least 2"
            _check(all(side == 0 or side > 1 for window in trained for side in sides(window)), why)
        self._check_size()

    def _check_size(self) -> None:
        """Refuse a network too large to be built, and one whose last feature maps would be empty."""
        patches = math.prod(math.ceil(side / patch) for side, patch in zip(self.image_size, self.patch_size, strict=True))
        _check(patches <= MOST_PATCHES, f"an image has {patches} patches, and the limit is {MOST_PATCHES}")
        parameters = self.embed_dim * (self.num_channels * math.prod(self.patch_size) + patches * self.use_absolute_embeddings)
        scores = 0
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            width, (height, across) = self.width(stage), self.table_window(stage)
            rows, columns = self.image_size
            why = f"an image of {rows}x{columns} pixels is too small for stage {stage}, whose map would be empty"
            _check(min(height, across) > 0, why)
            _check(self.mlp_width(stage) > 0, f"mlp_ratio is too small for the width {width} of stage {stage}")
            parameters += (
                depth * (4 * width**2 + 2 * width * self.mlp_width(stage) + 4 * height * across * heads) + 8 * width**2
            )
            grid = [math.ceil(side / patch / 2**stage) for side, patch in zip(self.image_size, self.patch_size, strict=True)]
            windows = math.ceil(grid[0] / height) * math.ceil(grid[1] / across)
            _check(height * across <= MOST_TOKENS, f"a window has {height}x{across} tokens, and the limit is {MOST_TOKENS}")
            scores = max(scores, max(heads, windows) * (height * across) ** 2)
        outputs = (*self.head_widths, self.num_labels)
        parameters += sum(map(math.prod, zip((self.pooled_size, *outputs), outputs, strict=False)))
        parameters += self.hidden_size * self.encoder_stride**2 * self.num_channels
        why = f"it describes a network of {parameters:.3g} parameters, and the limit is {MOST_PARAMETERS:.3g}"
        _check(parameters <= MOST_PARAMETERS, why)
        why = f"attention has a bias or mask of {scores:.3g} values, and the limit is {MOST_SCORES:.3g}"
        _check(scores <= MOST_SCORES, why)

    @property
    def model_type(self) -> str:
        return "swin" if self.version == 1 else "swinv2"

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def label_lines(self) -> list[str]:
        """The labels by class, each in one line of valid UTF-8, without control characters."""
        return [" ".join(one.encode("utf-8", "replace").decode().translate(_CONTROL).split()) for one in self.id2label.values()]

    @property
    def score_activation(self) -> str:
        """Activation that turns logits into scores, by the rule of transformers' image classification pipeline."""
        stated = self.activation or PROBLEMS.get(str(self.problem_type))
        return stated or ("sigmoid" if self.num_labels == 1 else "softmax")

    @property
    def prediction(self) -> str:
        """What the logits predict: one of several "classes", any number of "labels", or "values" (regression)."""
        numeric = self.problem_type == "regression" or self.num_labels == 1
        return {"softmax": "classes", "sigmoid": "labels"}.get(self.score_activation, "values" if numeric else "classes")

    @property
    def hidden_size(self) -> int:
        return self.width(len(self.depths) - 1)

    @property
    def pooled_size(self) -> int:
        """Inputs of the classifier."""
        return self.hidden_size * (2 if self.global_pool == "catavgmax" else 1)

    @property
    def has_classes(self) -> bool:
        """Whether a classifier gives one logit for each class and image. Without pooling, it gives a map of them."""
        return self.num_labels > 0 and self.global_pool != ""

    @property
    def fits_transformers(self) -> bool:
        """Whether the classes of transformers can build this network."""
        plain = self.patch_norm and not self.always_partition and self.global_pool == "avg" and not self.head_widths
        plain = plain and self.final_norm and self.map_norms is None
        return plain and isinstance(_one_if_equal(self.window_size), int) and not isinstance(self.mlp_ratio, tuple)

    @property
    def feature_norms(self) -> bool:
        """Whether a backbone normalizes its feature maps. timm's features_only does not, nor does Swin V2 of transformers."""
        return self.version == 1 and self.framework != "timm" if self.map_norms is None else self.map_norms

    @property
    def blocks(self) -> int:
        return sum(self.depths)

    def width(self, stage: int) -> int:
        """Channels of the tokens in `stage` (counted from 0)."""
        return self.embed_dim * int(2**stage)

    def mlp_width(self, stage: int) -> int:
        """Channels inside the MLP of `stage`, truncated as transformers truncates it."""
        ratio = self.mlp_ratio[stage] if isinstance(self.mlp_ratio, tuple) else self.mlp_ratio
        return int(ratio * self.width(stage))

    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the patches (rows, columns) of an image. torchvision crops a remainder, all others pad it to a patch."""
        height, width = image_size or self.image_size
        if self.framework == "torchvision":
            grid = height // self.patch_size[0], width // self.patch_size[1]
            if 0 in grid:
                raise UsageError(
                    f"An image of {height}x{width} pixels is smaller than a patch of {self.patch_size}, and torchvision "
                    f"crops it to nothing. Choose a larger --image-size or another --framework."
                )
            return grid
        return math.ceil(height / self.patch_size[0]), math.ceil(width / self.patch_size[1])

    def table_window(self, stage: int) -> tuple[int, int]:
        """Return the window (height, width) of the parameters of `stage`.

        If the configured feature map is smaller than the window, Hugging Face V1, torchvision and `always_partition` keep the
        window. Hugging Face V2 reduces both axes to the height of the map, timm each axis to its own, Microsoft both to the
        shorter side.
        """
        height, width = sides(self.window_size[stage])
        if self.always_partition or self.framework == "torchvision" or (self.framework == "hf" and self.version == 1):
            return height, width
        rows, columns = self.grid()
        if self.framework == "timm":
            return min(-(-rows // 2**stage), height), min(-(-columns // 2**stage), width)
        shorter = min(rows >> stage, columns >> stage)
        side = self.image_size[0] // self.patch_size[0] >> stage if self.framework == "hf" else shorter
        return min(side, height), min(side, width)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SwinConfig:
        """Read a Hugging Face `config.json`, and ignore unknown keys. Raises CheckpointError if it is invalid or no Swin's."""
        if not isinstance(raw, Mapping):
            raise CheckpointError("config.json does not hold a JSON object. Expected a Hugging Face config.")
        kind = raw.get("model_type")
        if kind not in ("swin", "swinv2"):
            named = OTHER_FAMILIES.get(str(kind))
            what = f"model_type {shown(repr(kind))}" + (f" is {named}" if named else " is not a Swin")
            raise CheckpointError(f'config.json: {what}. swin-deploy supports model_type "swin" and "swinv2".')
        try:
            return cls(**_fields_from_json(raw, 1 if kind == "swin" else 2))
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"config.json: {shortened(str(error), 1000)}. Expected the fields of a Hugging Face {kind} config."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that transformers writes for an image classifier of this architecture.

        A network that its classes cannot build has no `architectures`, and further keys.
        """
        classes = [f"{'Swin' if self.version == 1 else 'Swinv2'}ForImageClassification"]
        raw: dict[str, Any] = {
            **({"architectures": classes} if self.fits_transformers else {}),
            "model_type": self.model_type,
            **{key: list(value) if isinstance(value := getattr(self, key), tuple) else value for key in _READERS},
            "image_size": _one_if_equal(self.image_size),
            "patch_size": _one_if_equal(self.patch_size),
            "window_size": _one_if_equal(self.window_size),
            "num_layers": len(self.depths),
            "hidden_size": self.hidden_size,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.1,
            "initializer_range": 0.02,
            "id2label": {str(i): label for i, label in self.id2label.items()},
            "label2id": {label: i for i, label in self.id2label.items()},
        }
        if self.out_features:
            raw["out_features"] = list(self.out_features)
        if self.framework != "hf":
            raw["semantics"] = self.framework
        if not self.patch_norm:
            raw["patch_norm"] = False
        if self.always_partition:
            raw["always_partition"] = True
        if self.global_pool != "avg":
            raw["global_pool"] = self.global_pool
        if not self.final_norm:
            raw["final_norm"] = False
        if self.map_norms is not None:
            raw["map_norms"] = self.map_norms
        if self.head_widths:
            raw |= {"head_widths": list(self.head_widths), "head_act": self.head_act}
        raw |= {key: value for key in ("problem_type", "activation") if (value := getattr(self, key)) is not None}
        if self.version == 1:
            del raw["pretrained_window_sizes"]
        return raw


def sides(window: Window) -> tuple[int, int]:
    """Return (height, width) of a window."""
    return window if isinstance(window, tuple) else (window, window)


def window_text(window: Window) -> str:
    """Return "7", or "4x8" for a window that is not square."""
    return "x".join(str(side) for side in dict.fromkeys(sides(window)))


def window_from(value: Any) -> Window:
    """Read a whole number, or a list of height and width. Raises ValueError for anything else."""
    height, width = _pair(value)
    return height if height == width else (height, width)


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise CheckpointError(f"Bad Swin config: {shortened(sentence, 1000)}.")


def _pair(value: Any) -> tuple[int, int]:
    values = value if isinstance(value, list | tuple) else (value, value)
    if len(values) != 2:
        raise ValueError(f"expected a number or two, got {shown(value)}")
    return _integer(values[0]), _integer(values[1])


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63 or int(value) != value:
        raise ValueError(f"expected a whole number, got {shown(value)}")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise ValueError(f"expected a number, got {shown(value)}")
    return float(value)


def _boolean(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"expected true or false, got {shown(value)}")
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {shown(value)}")
    return value


def _listed(value: Any, what: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) > 100:
        raise ValueError(f"expected a list of at most 100 {what}, got {shown(value)}")
    return value


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(map(_integer, _listed(value, "whole numbers")))


def _windows(value: Any) -> tuple[Window, ...]:
    return tuple(map(window_from, _listed(value, "windows")))


def _one_if_equal(values: Sequence[Window]) -> int | list[int | list[int]]:
    if len(set(values)) == 1 and isinstance(values[0], int):
        return values[0]
    return [list(value) if isinstance(value, tuple) else value for value in values]


# config.json key -> how its value is read
_READERS: dict[str, Any] = {
    "image_size": _pair,
    "patch_size": _pair,
    "num_channels": _integer,
    "embed_dim": _integer,
    "depths": _integers,
    "num_heads": _integers,
    "mlp_ratio": lambda value: tuple(map(_number, _listed(value, "numbers"))) if isinstance(value, list) else _number(value),
    "qkv_bias": _boolean,
    "hidden_act": _text,
    "use_absolute_embeddings": _boolean,
    "layer_norm_eps": _number,
    "encoder_stride": _integer,
    "pretrained_window_sizes": _windows,
}


def _fields_from_json(raw: Mapping[str, Any], version: int) -> dict[str, Any]:
    values: dict[str, Any] = {"version": version}
    for key, read in _READERS.items():
        if raw.get(key) is None:
            continue
        try:
            values[key] = read(raw[key])
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{key}: {error}") from error
    if "num_attention_heads" in raw and "num_heads" not in values:  # transformers' attribute_map
        values["num_heads"] = _integers(raw["num_attention_heads"])
    default = {f.name: f.default for f in fields(SwinConfig)}
    stages = len(values.get("depths", default["depths"]))
    window = raw.get("window_size", 7)
    try:
        values["window_size"] = _windows(window) if isinstance(window, list | tuple) else (_integer(window),) * stages
    except (ValueError, OverflowError) as error:
        raise ValueError(f"window_size: {error}") from error
    if version == 2 and "pretrained_window_sizes" not in values:
        values["pretrained_window_sizes"] = (0,) * stages
    values["id2label"] = _labels(raw)
    values |= {key: _text(raw[key]) for key in ("problem_type", "activation") if raw.get(key) is not None}
    values["out_features"] = _out_features(raw, stages)
    values["backbone_maps"] = version == 1 and not str(raw.get("transformers_version", "")).startswith("4.")
    values["framework"] = str(raw.get("semantics", "hf"))
    values["patch_norm"] = _boolean(raw.get("patch_norm", True))
    values["always_partition"] = _boolean(raw.get("always_partition", False))
    values["final_norm"] = _boolean(raw.get("final_norm", True))
    values["map_norms"] = None if raw.get("map_norms") is None else _boolean(raw["map_norms"])
    values["global_pool"] = str(raw.get("global_pool", "avg"))
    values["head_widths"] = _integers(raw.get("head_widths", ()))
    values["head_act"] = str(raw.get("head_act", "linear"))
    return values


def _out_features(raw: Mapping[str, Any], stages: int) -> tuple[str, ...]:
    names = ("stem", *(f"stage{i + 1}" for i in range(stages)))
    features, indices = raw.get("out_features"), raw.get("out_indices")
    wanted = () if features is None else tuple(map(str, _listed(features, "names")))
    if indices is not None:
        meant = tuple(names[place] if -len(names) <= place < len(names) else "" for place in _integers(indices))
        if features is not None and meant != wanted:
            raise ValueError(f"out_features names {', '.join(wanted)}, but out_indices {list(indices)} name others")
        wanted = meant
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"out_features names {shown(unknown[0])}, but this network has {', '.join(names)}")
    return wanted


def with_complete_labels(raw: Mapping[str, Any], classes: int | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return a config.json with a label for each of `classes` (None: unknown), and notes on what id2label lacked."""
    if raw.get("id2label") is None:
        return raw, ()
    try:
        labels, note = complete_labels(raw["id2label"], classes)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}. Expected a label for each class.") from error
    if note is None:
        return raw, ()
    by_id, by_label = {str(i): label for i, label in labels.items()}, {label: i for i, label in labels.items()}
    return {**raw, "id2label": by_id, "label2id": by_label}, (note,)


def _labels(raw: Mapping[str, Any]) -> dict[int, str]:
    count = None if raw.get("num_labels") is None else _integer(raw["num_labels"])
    if count is not None and not 0 <= count <= MOST_LABELS:
        raise ValueError(f"num_labels: expected 0 to {MOST_LABELS}, because each label gets a name, got {count}")
    if raw.get("id2label") is not None:
        return complete_labels(raw["id2label"], None)[0]
    return {i: f"LABEL_{i}" for i in range(2 if count is None else count)}


def complete_labels(labels: Any, classes: int | None) -> tuple[dict[int, str], str | None]:
    """Return a label for each class (None: as many as are named), and a note if `labels`, such as id2label, has gaps."""
    note = None
    if isinstance(labels, list):
        labels, note = dict(enumerate(labels)), "the labels are a list; the first one is class 0"
    if not isinstance(labels, Mapping):
        raise ValueError(f"id2label: expected an object, got {shown(labels)}")
    if len(labels) > MOST_LABELS:
        raise ValueError(f"id2label has {len(labels)} labels, and the limit is {MOST_LABELS}")
    found = {int(i): str(label) for i, label in labels.items()}
    if found and not 0 <= min(found) <= max(found) < MOST_LABELS:
        raise ValueError(f"id2label has labels for the classes {min(found)} to {max(found)}")
    count = classes or max(found, default=-1) + 1
    if sorted(found) == list(range(len(found))) and len(found) >= count:
        return dict(sorted(found.items())), note  # more labels than classes belong to another network
    if sorted(found) == list(range(1, count + 1)):
        return {i - 1: label for i, label in sorted(found.items())}, "the labels are numbered from 1; the first one is class 0"
    missing = [i for i in range(count) if i not in found]
    return (
        {i: found.get(i, f"LABEL_{i}") for i in range(count)},
        f"only {count - len(missing)} of {count} classes have a label; the others are called LABEL_n",
    )
