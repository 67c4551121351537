"""The manifest of a bundle as frozen, typed values, and the rules for each of its keys.

Each field below is a key of manifest.json, with the function that reads its JSON value. A value that breaks a rule is a
BundleError that names the file, the key, the value and what was expected. Keys that are not listed here, such as those of a
later release, are ignored, and kept when the manifest is written again.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from .errors import BundleError, shown
from .options import COMPILERS, FRAMEWORKS, LAYOUTS, OPSETS, ORDERS, PRECISIONS, SCORES, TARGETS, TASKS, Batch, Size

Read = Callable[[Any], Any]  # JSON value -> typed value; raises _Unexpected
T = TypeVar("T", bound="_Record")

LARGEST_SIDE = 4096  # pixels; a larger graph would not fit into memory
LARGEST_FRAME = 32768
LONGEST_PATH = 255  # characters of a file's path inside the bundle
_WORD = r"[0-9A-Za-z_](?:[0-9A-Za-z_.+-]*[0-9A-Za-z_+-])?"  # no hidden file, no "..", and nothing that Windows rewrites
_PATH = re.compile(rf"{_WORD}(?:/{_WORD})*")


class _Unexpected(Exception):
    """A JSON value that breaks a rule, what was expected, and the keys that lead to it."""

    def __init__(self, value: object, expected: str, *keys: str | int) -> None:
        super().__init__()
        self.value, self.expected, self.keys = value, expected, keys

    def below(self, key: str | int) -> _Unexpected:
        """Return the same for the object or list that has the value at `key`."""
        return _Unexpected(self.value, self.expected, key, *self.keys)

    def sentences(self) -> str:
        names = [str(self.keys[0]), *(f"[{key}]" if isinstance(key, int) else f'["{shown(key)}"]' for key in self.keys[1:])]
        value = f'"{shown(self.value)}"' if isinstance(self.value, str) else shown(self.value)
        return f"{''.join(names)} is {'missing' if self.value is MISSING else value}. Expected {self.expected}."


def _value(expected: str, holds: Callable[[Any], object]) -> Read:
    """Return a reader of values for which `holds` is true."""

    def read(value: Any) -> Any:
        if not holds(value):
            raise _Unexpected(value, expected)
        return value

    return read


def _whole(low: int, high: int) -> Read:
    return _value(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _pattern(expected: str, pattern: str) -> Read:
    return _value(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value))


def _choice(choices: Sequence[str]) -> Read:
    return _value(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def _optional(read: Read) -> Read:
    return lambda value: None if value is None else read(value)


def _numbers(expected: str, count: int, low: int, high: int) -> Read:
    """Return a reader of a list of exactly `count` whole numbers."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) == count and all(type(n) is int and low <= n <= high for n in value)

    read = _value(f"{expected} from {low} to {high}", holds)
    return lambda value: tuple(read(value))


def _list(read: Read) -> Read:
    def read_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Unexpected(value, "a list")
        return tuple(_below(number, read, one) for number, one in enumerate(value))

    return read_list


def _map(read: Read) -> Read:
    def read_map(value: Any) -> Mapping[str, Any]:
        return MappingProxyType({key: _below(key, read, one) for key, one in _OBJECT(value).items()})

    return read_map


def _below(key: str | int, read: Read, value: Any) -> Any:
    try:
        return read(value)
    except _Unexpected as error:
        raise error.below(key) from None


_OBJECT = _value("an object", lambda value: isinstance(value, dict))
_FLAG = _value("true or false", lambda value: isinstance(value, bool))
_TEXT = _value("text of at most 1,000,000 characters", lambda text: isinstance(text, str) and len(text) <= 1_000_000)
_AMOUNT = _value(
    "a number of at least 0", lambda value: isinstance(value, int | float) and value is not True and 0 <= value < math.inf
)
_COUNT = _whole(0, (1 << 63) - 1)
_FACTS = _map(lambda value: value)  # what only people read
_RECORDS = _list(_FACTS)
_SHA256 = _pattern("64 hexadecimal digits in lower case", "[0-9a-f]{64}")
_SIZE = _numbers("a list of two whole numbers", 2, 1, LARGEST_SIDE)
_NAME = _pattern("a name of at most 200 printable characters", r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,200}")
_LINE = _value(
    "at most 300 printable characters", lambda text: isinstance(text, str) and len(text) <= 300 and text.isprintable()
)
_DATE = _pattern("a date and time such as 2030-01-31T12:00:00+00:00", r"[0-9T:.Z+-]{10,40}")
_FILE = _value(
    f"a relative path of at most {LONGEST_PATH} characters, such as onnx/model.onnx: letters, digits and . _ + - only, and no "
    f"part that begins or ends with a dot",
    lambda value: isinstance(value, str) and len(value) <= LONGEST_PATH and _PATH.fullmatch(value),
)


class _Key(NamedTuple):
    """A key of a JSON object: how its value is read, and its value if it is absent; MISSING if it is required."""

    read: Read
    default: Any


def _key(read: Read, default: Any = MISSING) -> Any:
    return _Key(read, default)


if TYPE_CHECKING:
    _Base = object
else:
    _Base = Mapping


class _Record(_Base):
    """A JSON object whose keys are attributes. For callers outside the package, it is also a mapping of the JSON values.

    It is what a frozen dataclass is, without the code that each dataclass generates when the module is imported: 15 ms in all.
    """

    _keys: ClassVar[dict[str, _Key]] = {}
    _json: Mapping[str, Any]

    def __init_subclass__(cls) -> None:
        cls._keys = {**cls._keys, **{name: value for name, value in vars(cls).items() if isinstance(value, _Key)}}

    @classmethod
    def read(cls: type[T], value: Any) -> T:
        """Read a JSON object."""
        _OBJECT(value)
        made = cls()
        for name, key in cls._keys.items():
            absent = name not in value and key.default is not MISSING
            made.__dict__[name] = key.default if absent else _below(name, key.read, value.get(name, MISSING))
        made.__dict__["_json"] = value
        made.check()
        return made

    def check(self) -> None:
        """Raise _Unexpected if two of the values contradict each other."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object as it is in the file, with keys that this release does not know."""
        return copy.deepcopy(dict(self._json))

    def has(self, facts: Mapping[str, Any]) -> bool:
        """Return whether the JSON object has these values."""
        return all(self._json.get(key) == value for key, value in facts.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).read, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._keys)})"

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(f"{type(self).__name__} cannot be changed")

        def __getitem__(self, key: str) -> Any:
            return copy.deepcopy(self._json[key])

        def __iter__(self) -> Iterator[str]:
            return iter(self._json)

        def __len__(self) -> int:
            return len(self._json)


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output: numpy dtype name, and a shape whose free axes are names (`("batch", 3, 224, 224)`)."""

    name: str = field(metadata={"read": _NAME})
    dtype: str = field(metadata={"read": _choice(("float32", "float16", "float64", "uint8", "int8", "int32", "int64", "bool"))})
    shape: tuple[int | str, ...] = field(
        metadata={"read": _list(lambda value: (_NAME if isinstance(value, str) else _whole(1, (1 << 31) - 1))(value))}
    )

    @property
    def image_size(self) -> Size:
        """(height, width) of the images of an input: uint8 frames have their channels last, prepared arrays first."""
        height, width = self.shape[1:3] if self.dtype == "uint8" else self.shape[2:4]
        return int(height), int(width)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def read(cls, value: Any) -> TensorSpec:
        """Read the JSON object that `to_dict` returns."""
        _OBJECT(value)
        return cls(**{one.name: _below(one.name, one.metadata["read"], value.get(one.name, MISSING)) for one in fields(cls)})

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(str(size) for size in self.shape)}]"


class FileEntry(_Record):
    """A file: its digest and size, and the digest of the file that it was made from."""

    sha256: str = _key(_SHA256)
    bytes: int = _key(_COUNT)
    parent: str | None = _key(_optional(_SHA256), None)


class StoredVerdict(_Record):
    """Result of a comparison with PyTorch. "not verified" stands for a graph that was never compared."""

    verified: bool = _key(_FLAG)
    relative_l2: float | None = _key(_optional(_AMOUNT), None)


class EmbeddedSteps(_Record):
    """Preprocessing in the graph: size of the frames that it resizes (None: it does not resize), and its steps.

    Frames are uint8 [batch, height, width, channels], or in the layout "nchw" float32 [batch, channels, height, width].
    """

    frame_size: Size | None = _key(_optional(_numbers("null, or a list of two whole numbers", 2, 1, LARGEST_FRAME)))
    steps: Mapping[str, Any] = _key(_FACTS)
    layout: str = _key(_choice(LAYOUTS), LAYOUTS[0])
    order: str = _key(_choice(ORDERS), ORDERS[0])


class EmbeddedAnswer(_Record):
    """Answer in the graph: the activation of its scores, and the number of best classes; None: the scores of all classes."""

    activation: str = _key(_choice(SCORES))
    top_k: int | None = _key(_optional(_whole(1, (1 << 31) - 1)), None)


class CalibrationFacts(_Record):
    """Options of the quantization that made a graph; `target` is one of TARGETS."""

    target: str = _key(_choice(TARGETS), TARGETS[0])


class GraphEntry(FileEntry):
    """An ONNX graph. `reference` and `weights` are other files of the bundle."""

    precision: str = _key(_choice(PRECISIONS))
    image_size: Size = _key(_SIZE)
    inputs: tuple[TensorSpec, ...] = _key(_list(TensorSpec.read))
    outputs: tuple[TensorSpec, ...] = _key(_list(TensorSpec.read))
    reference: str = _key(_FILE)
    weights: str | None = _key(_optional(_FILE), None)
    preprocessing: EmbeddedSteps | None = _key(_optional(EmbeddedSteps.read), None)
    postprocessing: EmbeddedAnswer | None = _key(_optional(EmbeddedAnswer.read), None)
    agreement: StoredVerdict | None = _key(lambda value: None if value == "not verified" else StoredVerdict.read(value), None)
    calibration: CalibrationFacts | None = _key(_optional(CalibrationFacts.read), None)
    opset: int | None = _key(_whole(1, 1000), None)
    sensitivity: Sequence[Any] | None = _key(_RECORDS, None)
    gate: Mapping[str, Any] | None = _key(_FACTS, None)
    speed: Mapping[str, Any] | None = _key(_FACTS, None)
    on_samples: Mapping[str, Any] | None = _key(_FACTS, None)
    ranges: Mapping[str, Any] | None = _key(_FACTS, None)
    left_out: Mapping[str, Any] | None = _key(_FACTS, None)
    amplitudes: Mapping[str, Any] | None = _key(_FACTS, None)
    passes: Sequence[Any] = _key(_RECORDS, ())
    fallbacks: Sequence[Any] = _key(_RECORDS, ())
    layers: Sequence[Any] = _key(_RECORDS, ())

    @property
    def verified(self) -> bool:
        """Whether the graph was compared with PyTorch and agreed."""
        return self.agreement is not None and self.agreement.verified

    @property
    def relative_l2(self) -> float | None:
        """Distance from PyTorch of a graph that agreed; None for others."""
        return self.agreement.relative_l2 if self.agreement is not None and self.verified else None

    @property
    def target(self) -> str:
        """Which of TARGETS a quantized graph was made for."""
        return TARGETS[0] if self.calibration is None else self.calibration.target

    def check(self) -> None:
        size, frames = self.image_size, self.preprocessing
        if frames is not None and frames.frame_size is not None:
            size = frames.frame_size
        pixels = self.inputs[0] if self.inputs else None
        axes = () if pixels is None else pixels.shape
        planar = frames is None or frames.layout == "nchw"
        sides = axes[2:4] if planar else axes[1:3]
        fits = pixels is not None and (pixels.name, pixels.dtype) == ("pixel_values", "float32" if planar else "uint8")
        numbered = isinstance(axes[1 if planar else 3], int) if len(axes) == 4 else False
        if not (fits and numbered and sides == size):
            shape = f"[batch, channels, {size[0]}, {size[1]}]" if planar else f"[batch, {size[0]}, {size[1]}, channels]"
            expected = f"pixel_values, {'float32' if planar else 'uint8'} {shape}"
            raise _Unexpected(", ".join(map(str, self.inputs)), f"the first input to be {expected}", "inputs")
        for number, spec in enumerate(self.inputs[1:], 1):
            if (spec.name, spec.dtype, len(spec.shape)) != ("bool_masked_pos", "bool", 2) or number > 1:
                raise _Unexpected(str(spec), "bool_masked_pos: bool [batch, patches], or nothing", "inputs", number)


class EngineOptions(_Record):
    """Options of the compiler that an engine was built with."""

    workspace: int | None = _key(_whole(1, (1 << 63) - 1), None)
    optimization_level: int | None = _key(_whole(0, 5), None)
    version_compatible: bool = _key(_FLAG, False)
    hardware_compatible: bool = _key(_FLAG, False)
    fused_attention: bool = _key(_FLAG, True)
    strip_weights: bool = _key(_FLAG, False)
    refitted: bool = _key(_FLAG, False)

    def chosen(self, *without: str) -> dict[str, Any]:
        """Return the options that are not the default, except those named."""
        values = {name: getattr(self, name) for name in self._keys if name not in without}
        return {name: value for name, value in values.items() if value is not None and value is not (name == "fused_attention")}


class KernelFigures(_Record):
    """Figures of the kernels of one role; None if unknown."""

    kernels: int | None = _key(_optional(_COUNT), None)
    bytes_read: int | None = _key(_optional(_COUNT), None)
    bytes_written: int | None = _key(_optional(_COUNT), None)


class EngineProfile(_Record):
    """An optimization profile of an engine: its batch range, and the figures of its kernels; None if unknown."""

    batch: Batch = _key(_numbers("a list of three whole numbers in ascending order", 3, 1, (1 << 31) - 1))
    kernels: int | None = _key(_optional(_COUNT), None)
    fused_attention: int | None = _key(_optional(_COUNT), None)
    bytes_moved: int | None = _key(_optional(_COUNT), None)
    roles: Mapping[str, KernelFigures] = _key(_map(KernelFigures.read), MappingProxyType({}))
    types: Mapping[str, int] = _key(_map(_COUNT), MappingProxyType({}))
    layers: Sequence[Any] = _key(_RECORDS, ())

    def of(self, role: str) -> KernelFigures:
        """Return the figures of the kernels of one role."""
        return self.roles.get(role) or KernelFigures.read({})

    def check(self) -> None:
        if list(self.batch) != sorted(self.batch):
            raise _Unexpected(list(self.batch), "three numbers in ascending order", "batch")


class EngineProfiles(_Record):
    """The layer report of an engine: its profiles with the layers of each."""

    profiles: tuple[EngineProfile, ...] = _key(_list(EngineProfile.read))


class BatchChoice(_Record):
    """How `--latency-ms` chose the batch of an engine: the budget, and the time that was estimated or measured for `gpu`."""

    latency_ms: float = _key(_AMOUNT)
    milliseconds: float = _key(_AMOUNT)
    by: str = _key(_choice(("roofline", "measurement")))
    gpu: str = _key(_LINE)


class EngineEntry(FileEntry):
    """A TensorRT engine. `parent` is the digest of `graph` when the engine was compiled; the graph may have changed."""

    precision: str = _key(_choice(PRECISIONS))
    image_size: Size = _key(_SIZE)
    graph: str = _key(_FILE)
    parent: str = _key(_SHA256)
    backend: str = _key(_choice(COMPILERS))
    backend_version: str = _key(_pattern("a version such as 10.3.0", r"[0-9A-Za-z_.+-]{1,64}"))
    gpu: str = _key(_pattern("a compute capability such as sm_89", r"sm_\d{2,3}"))
    options: EngineOptions = _key(EngineOptions.read)
    profiles: tuple[EngineProfile, ...] = _key(_list(EngineProfile.read))
    fingerprint: str | None = _key(_optional(_TEXT), None)
    batch_choice: BatchChoice | None = _key(_optional(BatchChoice.read), None)
    refitted_from: str | None = _key(_optional(_SHA256), None)
    seconds: float | None = _key(_optional(_AMOUNT), None)


class StoredTask(_Record):
    """The task head; see TaskSpec."""

    name: str = _key(_choice(TASKS))
    output_hidden_states: bool = _key(_FLAG, False)
    output_attentions: bool = _key(_FLAG, False)
    add_pooling_layer: bool = _key(_FLAG, True)
    use_mask_token: bool = _key(_FLAG, False)
    out_features: tuple[str, ...] = _key(_list(_NAME), ())


class StatedPreprocessing(_Record):
    """Source and steps of the preprocessing, and a warning if no source states it."""

    source: str = _key(_TEXT, "")
    steps: str = _key(_TEXT, "")
    assumed: str = _key(_TEXT, "")


class TunedCandidate(_Record):
    """A candidate of `auto` that `tune` measured. `files` is the digest of what it runs; without a time, it is not used."""

    backend: str = _key(_LINE)
    precision: str = _key(_LINE)
    device: str = _key(_LINE)
    libraries: Mapping[str, Any] = _key(_FACTS)
    files: str = _key(_SHA256)
    milliseconds: float | None = _key(_optional(_AMOUNT))
    verdict: str = _key(_LINE)


class Tuning(_Record):
    """What `tune` measured on a kind of machine, with one number of threads."""

    measured: str = _key(_DATE)
    machine: Mapping[str, Any] = _key(_FACTS)
    candidates: tuple[TunedCandidate, ...] = _key(_list(TunedCandidate.read))


_KINDS: dict[str, type[FileEntry]] = {"onnx": GraphEntry, "engine": EngineEntry}


def _files(value: Any) -> Mapping[str, FileEntry]:
    seen = {"manifest.json": "", "onnx": "onnx/"}  # in lower case -> as it is spelled
    for file in _OBJECT(value):
        _FILE(file)
        for name in (file, *(file[: match.end()] for match in re.finditer("/", file))):
            if seen.setdefault(name.lower().rstrip("/"), name) != name:
                raise _Unexpected(file, "a path that differs from others in more than case and is not the manifest or a folder")
    read = {file: _KINDS.get(file.rpartition(".")[2], FileEntry).read for file in value}
    return MappingProxyType({file: _below(file, read[file], entry) for file, entry in value.items()})


class Manifest(_Record):
    """The content of manifest.json."""

    created: str = _key(_DATE)
    name: str = _key(_TEXT)
    task: StoredTask = _key(StoredTask.read)
    semantics: str = _key(_choice(FRAMEWORKS), FRAMEWORKS[0])
    target: str = _key(_choice(TARGETS), TARGETS[0])
    variant: str | None = _key(_optional(_TEXT), None)
    source: str = _key(_TEXT, "")
    weights_key: str | None = _key(_optional(_TEXT), None)
    opset: int | None = _key(_optional(_whole(OPSETS[0], OPSETS[-1])), None)
    notes: tuple[str, ...] = _key(_list(_TEXT), ())
    preprocessing: StatedPreprocessing | None = _key(StatedPreprocessing.read, None)
    tools: Mapping[str, str | None] = _key(_map(_optional(_TEXT)), MappingProxyType({}))
    files: Mapping[str, FileEntry] = _key(_files)
    tuning: tuple[Tuning, ...] = _key(_list(Tuning.read), ())

    def check(self) -> None:
        """Every file that an entry names is in the manifest, and is not itself a graph or an engine."""
        for file, entry in self.files.items():
            for key in ("reference", "weights"):
                named = getattr(entry, key, None)
                if named is not None and type(self.files.get(named)) is not FileEntry:
                    raise _Unexpected(named, "a file of this manifest that is not a graph or an engine", "files", file, key)
            if isinstance(entry, GraphEntry) and entry.weights and entry.weights.rpartition("/")[0] != file.rpartition("/")[0]:
                raise _Unexpected(entry.weights, "a file in the folder of the graph", "files", file, "weights")
            if isinstance(entry, EngineEntry) and not isinstance(self.files.get(entry.graph), GraphEntry | None):
                raise _Unexpected(entry.graph, "a graph", "files", file, "graph")


def manifest_from_json(value: Any, file: object) -> Manifest:
    """Return the content of the manifest `file`. Raises BundleError for a value that breaks a rule."""
    return _checked(Manifest.read, value, file)


def profiles_from_json(value: Any, file: object) -> tuple[EngineProfile, ...]:
    """Return the profiles in the layer report `file`. Raises BundleError for a value that breaks a rule."""
    return _checked(EngineProfiles.read, value, file).profiles


def _checked(read: Callable[[Any], T], value: Any, file: object) -> T:
    try:
        return read(value)
    except _Unexpected as error:
        raise BundleError(f"{file}: {error.sentences()} Export the bundle again.") from None
