"""The parity certificate of a bundle: inputs, what fp32 PyTorch answered to them, and the check of a graph against it.

PyTorch's answers travel in the bundle (reference.npz, one for each image size), so that any machine can repeat the
comparison without torch and without the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bundle import Bundle
from swin_deploy.errors import BundleError
from swin_deploy.specs import Array, TensorSpec

# The largest relative L2 distance from fp32 PyTorch with which a graph of that precision counts as verified. Published
# architectures stay below 1.5e-3 in fp16; a Swin V2 whose every block has a head at the largest scale, 100, comes to 6e-3.
# bf16 has 3 bits less. How good a quantised graph is depends on the images and is measured on them (`swin-deploy evaluate`); on
# the bundle's own samples, noise, it only has to be recognisably the same network.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2, "int8": 0.3, "fp8": 0.3}


@dataclass(frozen=True)
class Agreement:
    """`relative_l2` is |test - reference| / |reference|, the worst sample's; `top1` the share of equal best classes."""

    samples: int
    finite: bool
    max_abs: float
    relative_l2: float
    cosine: float
    top1: float

    def within(self, tolerance: float) -> bool:
        """Whether everything is finite and the relative L2 distance is at most `tolerance`."""
        return self.finite and self.relative_l2 <= tolerance

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; infinite ones (of an output with NaN) become None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def compare(test: Array, reference: Array) -> Agreement:
    """The agreement of `test` with `reference`, both [samples, classes]. Raises ValueError when the shapes differ."""
    if test.shape != reference.shape:
        raise ValueError(f"cannot compare shape {test.shape} with {reference.shape}")
    if not (np.isfinite(test).all() and np.isfinite(reference).all()):
        return Agreement(len(test), False, math.inf, math.inf, 0.0, 0.0)
    a = test.reshape(len(test), -1).astype(np.float64)
    b = reference.reshape(len(reference), -1).astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    tiny = np.finfo(np.float64).tiny
    return Agreement(
        samples=len(a),
        finite=True,
        max_abs=float(np.abs(a - b).max()),
        relative_l2=float((np.linalg.norm(a - b, axis=1) / np.maximum(norm_b, tiny)).max()),
        cosine=float(((a * b).sum(axis=1) / np.maximum(norm_a * norm_b, tiny)).min()),
        top1=float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
    )


SEED = 20210325  # the day of the first Swin paper; any number would do
Arrays = Mapping[str, NDArray[Any]]


class Runnable(Protocol):
    """What a runtime must be able to do to be checked (see runtimes/base.py)."""

    title: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]: ...


OpenGraph = Callable[[Path], AbstractContextManager[Runnable]]


@dataclass(frozen=True)
class Reference:
    """Inputs by name, each with the samples first, and PyTorch's outputs by name, float32.

    `noise` is how far fp32 PyTorch itself is from float64 PyTorch, by output (relative L2); empty where that was not needed.
    """

    feeds: Arrays
    outputs: Arrays
    noise: Mapping[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return len(next(iter(self.feeds.values())))

    def tolerance(self, precision: str, output: str) -> float:
        """The relative L2 distance up to which an output counts as verified: fixed, but not below 4 times the noise."""
        return max(TOLERANCES[precision], 4 * self.noise.get(output, 0.0))

    def save(self, path: Path) -> None:
        """Writes the certificate; floating-point inputs fit into float16 without loss (see `sample_inputs`)."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, feed in self.feeds.items():
            arrays[f"input/{name}"] = feed.astype(np.float16) if feed.dtype == np.float32 else feed
        arrays |= {f"output/{name}": output for name, output in self.outputs.items()}
        arrays |= {f"noise/{name}": np.float64(noise) for name, noise in self.noise.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, bundle: Bundle, file: str) -> Reference:
        """The certificate `file` of `bundle`, checked against its sha256 first."""
        try:
            with np.load(bundle.verified_path(file), allow_pickle=False) as arrays:
                parts: dict[str, dict[str, NDArray[Any]]] = {"input": {}, "output": {}, "noise": {}}
                for key in arrays:
                    kind, name = key.split("/", 1)
                    parts[kind][name] = arrays[key]
        except (KeyError, ValueError) as error:
            raise BundleError(f"{bundle.path / file} cannot be read ({error}). Export the bundle again.") from error
        feeds = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in parts["input"].items()}
        return cls(feeds, parts["output"], {name: float(value) for name, value in parts["noise"].items()})


@dataclass(frozen=True)
class Verdict:
    """How one graph of a bundle compares with PyTorch, by output: over a batch of all samples and over each alone."""

    file: str
    precision: str
    backend: str
    agreements: Mapping[str, Agreement]
    tolerances: Mapping[str, float]

    @property
    def verified(self) -> bool:
        return all(agreement.within(self.tolerances[name]) for name, agreement in self.agreements.items())

    @property
    def worst(self) -> str:
        """The output that is furthest from PyTorch, by what is allowed to it."""
        return max(self.agreements, key=lambda n: (not self.agreements[n].finite, self.excess(n)))

    @property
    def agreement(self) -> Agreement:
        """The agreement of the worst output."""
        return self.agreements[self.worst]

    @property
    def tolerance(self) -> float:
        """What is allowed to the worst output."""
        return self.tolerances[self.worst]

    def excess(self, output: str) -> float:
        return self.agreements[output].relative_l2 / self.tolerances[output]

    def complaint(self) -> str:
        """What is wrong, for the middle of a sentence."""
        if not self.agreement.finite:
            return f"the output {self.worst} holds NaN or infinity"
        return (
            f"the output {self.worst} differs by {self.agreement.relative_l2:.2e} (relative L2), "
            f"and {self.tolerance:.0e} is allowed"
        )

    def to_dict(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        outputs = {
            name: {"tolerance_relative_l2": self.tolerances[name], **agreement.to_dict()}
            for name, agreement in self.agreements.items()
        }
        return {
            "verified": self.verified,
            "against": "PyTorch fp32",
            "backend": self.backend,
            "tolerance_relative_l2": self.tolerance,
            **self.agreement.to_dict(),
            "worst_output": self.worst,
            "outputs": outputs,
        }


def sample_inputs(specs: tuple[TensorSpec, ...], seed: int = SEED) -> dict[str, NDArray[Any]]:
    """Two samples for every input: images of noise and of smooth blobs, as the preprocessing would leave them, and masks.

    Every pixel is a float16 value, so that the file in the bundle is half as large and loses nothing. Frames (uint8) show the
    same.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = tuple(int(size) for size in spec.shape[1:])
        if spec.dtype == "bool":
            feeds[spec.name] = rng.random((2, *shape)) < 0.6
            continue
        channels = shape[2] if spec.dtype == "uint8" else shape[0]
        height, width = spec.image_size
        noise = rng.standard_normal((channels, height, width))
        coarse = rng.standard_normal((channels, 9, 9))
        rows, columns = np.linspace(0, 8, height), np.linspace(0, 8, width)
        smooth = _interpolate(_interpolate(coarse, rows, axis=1), columns, axis=2) * 1.5
        feeds[spec.name] = np.stack([noise, smooth]).astype(np.float16).astype(np.float32)
        if spec.dtype == "uint8":
            bytes_ = np.clip(feeds[spec.name] * 57 + 120, 0, 255).astype(np.uint8)  # ImageNet's mean and deviation
            feeds[spec.name] = np.ascontiguousarray(bytes_.transpose(0, 2, 3, 1))
    return feeds


def check_graph(reference: Reference, open_graph: OpenGraph, path: Path, file: str, precision: str) -> Verdict:
    """The verdict on the ONNX graph at `path`, run with all samples at once and with each alone."""
    with open_graph(path) as runtime:
        return check_runtime(reference, runtime, file, precision)


def check_runtime(reference: Reference, runtime: Runnable, file: str, precision: str, *, together: bool = True) -> Verdict:
    """The verdict on what a runtime answers to each sample alone and, with `together`, to all at once."""
    found = [runtime.run({name: feed[i : i + 1] for name, feed in reference.feeds.items()}) for i in range(reference.samples)]
    if together:
        found.insert(0, runtime.run(reference.feeds))
    agreements = {}
    for name, expected in reference.outputs.items():
        answers = np.concatenate([answer[name] for answer in found])
        agreements[name] = compare(answers, np.concatenate([expected] * (1 + together)))
    tolerances = {name: reference.tolerance(precision, name) for name in reference.outputs}
    return Verdict(file, precision, runtime.title, agreements, tolerances)


def verify_bundle(bundle: Bundle, open_graph: OpenGraph, left_out: Container[str] = ()) -> tuple[Verdict, ...]:
    """A verdict on every ONNX graph of `bundle` but those `left_out`, run here and now; each file's sha256 is checked first."""
    for file in bundle.files:
        bundle.verified_path(file)
    return tuple(
        check_graph(Reference.load(bundle, entry["reference"]), open_graph, bundle.path / file, file, str(entry["precision"]))
        for file, entry in bundle.graphs.items()
        if file not in left_out
    )


def described(verdict: Mapping[str, Any] | None) -> str:
    """One phrase on a verdict as the manifest keeps it: "verified (relative L2 3.1e-07)" or "not verified"."""
    if not verdict or not verdict.get("verified"):
        return "not verified"
    return f"verified (relative L2 {verdict['relative_l2']:.1e})"


def _interpolate(values: NDArray[Any], places: NDArray[Any], axis: int) -> NDArray[Any]:
    low = np.minimum(places.astype(int), values.shape[axis] - 2)
    part = np.moveaxis(values, axis, -1)
    weight = places - low
    return np.moveaxis(part[..., low] * (1 - weight) + part[..., low + 1] * weight, -1, axis)


def sqnr(reference: Array, found: Array) -> float:
    """The ratio of the reference's energy to that of the difference, in dB; infinite where there is no difference.

    Where either is not finite it is minus infinity.
    """
    noise = float(np.square(found.astype(np.float64) - reference).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
