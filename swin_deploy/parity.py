"""Numerical agreement of graphs with the outputs of fp32 PyTorch, which a bundle contains for fixed inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from swin_deploy.bundle import Bundle, TensorSpec
from swin_deploy.errors import BundleError, VerificationError, shown
from swin_deploy.files import read_arrays
from swin_deploy.options import Array

# Largest relative L2 distance from fp32 PyTorch at which a graph of this precision counts as verified. Published
# architectures stay below 1.5e-3 in fp16; a Swin V2 whose every block has a head at the largest scale, 100, reaches 6e-3.
# bf16 has 3 bits less. The accuracy of a quantized graph depends on the images and is measured on them (`swin-deploy
# evaluate`); on the noise in the bundle it only has to be recognizable as the same network.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2, "int8": 0.3, "fp8": 0.3}
REFERENCE_BYTES = 1 << 26  # of all arrays; more if the file itself is large
SCORE_OUTPUTS = ("probabilities", "scores")  # of graphs with an answer, computed from their logits
SEED = 20210325  # the day of the first Swin paper; any number would do


class Runnable(Protocol):
    """The part of a runtime that a comparison needs (see runtimes/base.py)."""

    title: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]: ...


OpenGraph = Callable[[Path], AbstractContextManager[Runnable]]


@dataclass(frozen=True)
class Agreement:
    """Distance of a test array from a reference.

    `relative_l2` is |test - reference| / |reference| and, like `cosine`, that of the worst sample. `top1` is the fraction of
    samples with the same largest element.
    """

    samples: int
    finite: bool
    max_abs: float
    relative_l2: float
    cosine: float
    top1: float

    def within(self, tolerance: float) -> bool:
        """Return whether everything is finite and the relative L2 distance is at most `tolerance`."""
        return self.finite and self.relative_l2 <= tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; infinity becomes None."""
        return json_figures(self)


def json_figures(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON values; infinity becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(value).items()}


def compare(test: Array, reference: Array) -> Agreement:
    """Compare two arrays [samples, ...]. Raises ValueError if their shapes differ."""
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


def sqnr(reference: Array, test: Array) -> float:
    """Return the energy of `reference` over that of the difference, in dB: infinite if equal, -infinite if not finite."""
    noise = float(np.square(test.astype(np.float64) - reference).sum())
    return decibels(float(np.square(reference.astype(np.float64)).sum()), noise)


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two energies in dB: infinite without noise, -infinite without signal or if noise is not finite."""
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass(frozen=True)
class Reference:
    """Inputs and the outputs of fp32 PyTorch for them, by name, samples first.

    `noise` is the relative L2 distance of fp32 from float64 PyTorch by output; empty if it was not measured.
    """

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    noise: Mapping[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return len(next(iter(self.feeds.values())))

    def tolerance(self, precision: str, output: str) -> float:
        """Return the relative L2 tolerance of an output: the one of the precision, but at least 4 times the noise.

        That of scores follows from the logits: where those differ by at most d, scores differ by at most 2d, relatively.
        """
        tolerance = max(TOLERANCES[precision], 4 * self.noise.get(output, 0.0))
        if output in SCORE_OUTPUTS and (logits := self.outputs.get("logits")) is not None:
            largest = float(np.linalg.norm(logits.astype(np.float64), axis=-1).max())
            tolerance = max(tolerance, 2 * largest * self.tolerance(precision, "logits"))
        return tolerance

    def save(self, path: Path) -> None:
        """Write an .npz file. Floating-point inputs fit into float16 without loss (see `sample_inputs`)."""
        arrays: dict[str, Array] = {
            f"input/{name}": feed.astype(np.float16) if feed.dtype == np.float32 else feed for name, feed in self.feeds.items()
        }
        arrays |= {f"output/{name}": output for name, output in self.outputs.items()}
        arrays |= {f"noise/{name}": np.float64(noise) for name, noise in self.noise.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, bundle: Bundle, file: str) -> Reference:
        """Read `file` of `bundle` after checking its sha256. Raises BundleError if it is damaged."""
        path, again = bundle.verified_path(file), "Export the bundle again."
        limit = max(REFERENCE_BYTES, 20 * path.stat().st_size)  # floating-point values hardly compress
        parts: dict[str, dict[str, Array]] = {"input": {}, "output": {}, "noise": {}}
        for key, array in read_arrays(path, limit, BundleError, again).items():
            kind, _, name = key.partition("/")
            if kind not in parts or array.dtype.kind not in "fbu" or (array.ndim == 0) != (kind == "noise"):
                raise BundleError(f"{path} has an array {shown(key)}, which is no input, output or noise. {again}")
            parts[kind][name] = array
        samples = {len(array) for array in parts["input"].values()}
        rows = {len(array) for array in parts["output"].values()}  # attention weights have one for each window of a sample
        if len(samples) != 1 or not rows or min(*samples, *rows) < 1 or any(count % min(samples) for count in rows):
            raise BundleError(f"{path} does not have inputs and outputs of the same number of samples. {again}")
        if not all(0 <= value < math.inf for value in parts["noise"].values()):
            raise BundleError(f"{path} has a noise that is not a positive number. {again}")
        feeds = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in parts["input"].items()}
        return cls(feeds, parts["output"], {name: float(value) for name, value in parts["noise"].items()})


@dataclass(frozen=True)
class Verdict:
    """Agreement of one graph with PyTorch and relative L2 tolerance, by output.

    All samples were run as one batch and each sample alone. `backend` is the title of the runtime.
    """

    file: str
    precision: str
    backend: str
    agreements: Mapping[str, Agreement]
    tolerances: Mapping[str, float]

    @property
    def verified(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(agreement.within(self.tolerances[name]) for name, agreement in self.agreements.items())

    @property
    def worst(self) -> str:
        """The output that is furthest from PyTorch relative to its tolerance."""
        return max(
            self.agreements, key=lambda n: (not (one := self.agreements[n]).finite, one.relative_l2 / self.tolerances[n])
        )

    @property
    def agreement(self) -> Agreement:
        """Agreement of the worst output."""
        return self.agreements[self.worst]

    @property
    def tolerance(self) -> float:
        """Tolerance of the worst output."""
        return self.tolerances[self.worst]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Verdict:
        """Return the verdict from its fields as JSON values."""
        return cls(**{**raw, "agreements": {name: Agreement(**one) for name, one in raw["agreements"].items()}})

    def mismatch(self) -> str:
        """Describe the worst output as a clause of a sentence."""
        if not self.agreement.finite:
            return f"the output {self.worst} contains NaN or infinity"
        return (
            f"the output {self.worst} differs by {self.agreement.relative_l2:.2e} (relative L2), "
            f"and the tolerance is {self.tolerance:.0e}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for the manifest."""
        return {
            "verified": self.verified,
            "against": "PyTorch fp32",
            "backend": self.backend,
            "tolerance_relative_l2": self.tolerance,
            **self.agreement.to_dict(),
            "worst_output": self.worst,
            "outputs": {n: {"tolerance_relative_l2": self.tolerances[n], **a.to_dict()} for n, a in self.agreements.items()},
        }


def verdict_text(relative_l2: float | None) -> str:
    """Return "verified (relative L2 3.1e-07)", or "not verified" for None."""
    return "not verified" if relative_l2 is None else f"verified (relative L2 {relative_l2:.1e})"


def sample_inputs(specs: tuple[TensorSpec, ...], seed: int = SEED) -> dict[str, Array]:
    """Return two reproducible samples for every input: noise and smooth blobs, scaled like prepared images, and masks.

    Every pixel is a float16 value, which halves the file in the bundle without loss. uint8 frames show the same images.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
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
            pixels = np.clip(feeds[spec.name] * 57 + 120, 0, 255).astype(np.uint8)  # ImageNet's mean and deviation
            feeds[spec.name] = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return feeds


def check_runtime(reference: Reference, runtime: Runnable, file: str, precision: str, *, together: bool = True) -> Verdict:
    """Compare a runtime with PyTorch on each sample alone and, if `together`, on all samples as one batch."""
    found = [runtime.run({name: feed[i : i + 1] for name, feed in reference.feeds.items()}) for i in range(reference.samples)]
    if together:
        found.insert(0, runtime.run(reference.feeds))
    for name, expected in reference.outputs.items():
        given = found[0].get(name)
        if given is None or given.shape[1:] != expected.shape[1:]:
            raise BundleError(
                f"The reference outputs for {file} contain {shown(name)} with shape {list(expected.shape[1:])}, but the graph "
                f"gives {'none' if given is None else list(given.shape[1:])}. Export the bundle again."
            )
    if not all(map(_indices_fit, found)):
        raise VerificationError(f"In {file}, run by {runtime.title}, `indices` are not those of the largest logits. Report it.")
    agreements = {
        name: compare(np.concatenate([outputs[name] for outputs in found]), np.concatenate([expected] * (1 + together)))
        for name, expected in reference.outputs.items()
    }
    tolerances = {name: reference.tolerance(precision, name) for name in reference.outputs}
    return Verdict(file, precision, runtime.title, agreements, tolerances)


def _indices_fit(outputs: Mapping[str, Array]) -> bool:
    """Return whether `indices`, if there are any, are those of the largest logits, largest first."""
    if (indices := outputs.get("indices")) is None:
        return True
    logits = outputs["logits"]
    return np.array_equal(np.take_along_axis(logits, indices, -1), -np.sort(-logits, axis=-1)[:, : indices.shape[-1]])


def check_graph(reference: Reference, open_graph: OpenGraph, path: Path, file: str, precision: str) -> Verdict:
    """Open the ONNX graph at `path` and compare it with PyTorch."""
    with open_graph(path) as runtime:
        return check_runtime(reference, runtime, file, precision)


def _interpolate(values: Array, places: Array, axis: int) -> Array:
    low = np.minimum(places.astype(int), values.shape[axis] - 2)
    part = np.moveaxis(values, axis, -1)
    weight = places - low
    return np.moveaxis(part[..., low] * (1 - weight) + part[..., low + 1] * weight, -1, axis)
