"""Observations do not depend on batches, and their ranges equal those of published calibrators."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from swin_deploy.calib.calibrators import METHODS, round_to_fp8
from swin_deploy.calib.observers import HALF, Observation, from_arrays, to_arrays
from swin_deploy.errors import InputError, UsageError


def observed(values: np.ndarray) -> Observation:
    return Observation.of(values, len(values))


def merged(parts: list[np.ndarray]) -> Observation:
    found = observed(parts[0])
    for part in parts[1:]:
        found = found.merged(observed(part))
    return found


def same(a: Observation, b: Observation) -> bool:
    one, other = to_arrays({"x": a}), to_arrays({"x": b})
    return all(np.array_equal(one[key], other[key]) for key in one)


def tailed(count: int, seed: int = 0, channels: int = 4) -> np.ndarray:
    """Values with a few channels of much larger range."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, channels)) * np.geomspace(1, 12, channels) + 0.3
    return values.astype(np.float32)


def one_sided(count: int, seed: int = 0) -> np.ndarray:
    values = tailed(count, seed)
    return np.where(values < 0, -0.17 * np.exp(values), values).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 300.0, 1e30])
def test_observations_do_not_depend_on_batches(scale: float) -> None:
    values = tailed(600) * np.float32(scale)
    values[::7] *= 1e-3
    whole = observed(values)
    order = np.random.default_rng(1).permutation(600)
    for cuts in ([1, 2, 3], [599], [100, 101, 480], [300]):
        assert same(whole, merged(np.split(values, cuts)))
        assert same(whole, merged(np.split(values[order], cuts)))


def test_counts_equal_numpy() -> None:
    for values in (tailed(5000), one_sided(5000), np.array([[-1.0, 1.0, 0.5, -0.5, 0.0]], np.float32)):
        found = observed(values)
        edges = np.arange(-HALF, HALF + 1) * found.width
        np.testing.assert_array_equal(found.counts, np.histogram(values.astype(np.float64), edges)[0])
        assert HALF / 2 * found.width <= found.amax < HALF * found.width
        assert (found.low, found.high, found.values) == (values.min(), values.max(), values.size)


def test_every_value_of_every_batch_counts() -> None:
    values = tailed(60).reshape(3, 20, 4)
    found = observed(values).merged(observed(values[..., :2]))  # the last axis may change
    assert (found.samples, found.values, found.counts.sum()) == (6, 360, 360)


def test_zeros_have_no_range() -> None:
    zero = observed(np.zeros((2, 3), np.float32))
    for method in METHODS:
        assert (zero.compute_amax(method), zero.compute_range(method)) == (0.0, (0.0, 0.0))
    assert same(zero.merged(observed(tailed(50))), observed(tailed(50)).merged(zero))
    assert zero.merged(observed(tailed(50))).counts.sum() == 206


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    values = tailed(10)
    values[3, 2] = bad
    with pytest.raises(InputError, match="hidden contains NaN or infinity"):
        Observation.of(values, 10, "hidden")


def test_conversion_to_arrays_and_back() -> None:
    ones = {"a": observed(tailed(30)), "b/c": observed(one_sided(20)[:, :2]), "d": observed(np.ones((4, 3), np.float32))}
    back = from_arrays(to_arrays(ones))
    assert list(back) == list(ones)
    for name, one in ones.items():
        assert same(one, back[name])
    assert from_arrays(to_arrays({})) == {}


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentiles_equal_numpy(percentile: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swin_deploy.calib.calibrators.PERCENTILE", percentile)
    for values in (tailed(50_000), one_sided(50_000)):
        found = observed(values)
        expected = np.percentile(np.abs(values), percentile, method="inverted_cdf")
        assert found.compute_amax("percentile") == pytest.approx(expected, abs=found.width)
        tail = (100 - percentile) / 2
        ends = np.percentile(values, [tail, 100 - tail], method="inverted_cdf")
        np.testing.assert_allclose(found.compute_range("percentile"), ends, atol=found.width, rtol=0)


def test_fp8_rounding_equals_ml_dtypes() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(20_000) * 10.0 ** rng.uniform(-5, 2.6, 20_000), [0, 448, -448, 2**-9, 2**-10]])
    values = values[np.abs(values) <= 448].astype(np.float32)  # beyond that, ml_dtypes gives NaN
    np.testing.assert_array_equal(round_to_fp8(values), values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert list(round_to_fp8(np.array([1e4, -1e4]))) == [448, -448]


def int8_error(values: np.ndarray, top: float) -> float:
    step = top / 127
    return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values, dtype=np.float64).mean())


def fp8_error(values: np.ndarray, top: float) -> float:
    scaled = np.clip(values / np.float32(top / 448), -448, 448)
    return float(np.square(scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * (top / 448) - values).mean())


@pytest.mark.parametrize("outlier", [0, 40, 400])
def test_mse_is_the_best_of_many(outlier: int) -> None:
    for values in (tailed(5_000), one_sided(5_000)):
        values[5, 1] = max(outlier, values[5, 1])
        found = observed(values)
        candidates = found.amax * np.geomspace(1 / 128, 1, 200)
        for kind, error in (("int8", int8_error), ("fp8", fp8_error)):
            best = min(error(values, top) for top in candidates)
            assert error(values, found.compute_amax("mse", kind)) <= best * 1.02


def test_mse_of_an_interval_is_the_best_of_many() -> None:
    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(np.rint(np.clip(values, low, high) / step) * step - values, dtype=np.float64).mean())

    for values in (tailed(10_000), one_sided(10_000), -one_sided(10_000)):
        found = observed(values)
        shares = np.geomspace(1 / 8, 1, 30)
        best = min(error(found.low * a, found.high * b) for a in shares for b in shares)
        assert error(*found.compute_range("mse")) <= best * 1.02


def published_entropy(bins: np.ndarray) -> int:
    """The loop of `_compute_amax_entropy` of pytorch-quantization for 8 bits, without optimization."""
    bins = bins.astype(np.float64)
    bins[0] = bins[1]
    divergences = []
    for cut in range(128, len(bins) + 1):
        place = np.digitize(range(cut), np.linspace(0, cut, num=129)) - 1
        place[bins[:cut] == 0] = -1
        sums = np.zeros(128)
        for index, level in enumerate(place):
            if level != -1:
                sums[level] += bins[index]
        for level, count in Counter(place.tolist()).items():
            if level != -1:
                sums[level] /= count
        spread = np.array([sums[level] if level != -1 else 0.0 for level in place])
        reference = bins[:cut].copy()
        reference[-1] += bins[cut:].sum()
        p, q = reference / reference.sum(), spread / spread.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences.append(np.where(p > 0, p * np.log(p / q), 0).sum())
    return len(bins) - int(np.argmin(divergences[::-1]))


@pytest.mark.parametrize("outlier", [20.0, 60.0])
def test_entropy_equals_pytorch_quantization(outlier: float) -> None:
    values = tailed(4000)
    values[0, 0] = outlier
    found = observed(values)
    group = -(-(int(found.amax / found.width) + 1) // 300)  # with 2048 bins the plain loop takes a minute
    folded = found.counts[HALF:] + found.counts[:HALF][::-1]
    padded = np.pad(folded, (0, -len(folded) % group)).reshape(-1, group).sum(axis=1)
    padded = padded[: np.flatnonzero(padded)[-1] + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swin_deploy.calib.calibrators.ENTROPY_BINS", 300)
        expected = min(published_entropy(padded) * group * found.width, found.amax)
        assert found.compute_amax("entropy") == expected


def test_ranges_stay_within_what_was_seen() -> None:
    for values in (tailed(3000), one_sided(3000), -one_sided(3000), np.full((3, 4), 2.5, np.float32)):
        found = observed(values)
        assert found.compute_amax("minmax") == np.abs(values).max()
        assert found.compute_range("minmax") == (min(values.min(), 0), max(values.max(), 0))
        for method in METHODS:
            for kind in ("int8", "fp8"):
                assert 0 < found.compute_amax(method, kind) <= found.amax
            low, high = found.compute_range(method)
            assert min(found.low, 0) <= low <= 0 <= high <= max(found.high, 0)
            assert low < high


def test_unknown_methods_and_types_are_refused() -> None:
    found = observed(tailed(10))
    with pytest.raises(UsageError, match='Unknown method "max"'):
        found.compute_amax("max")
    with pytest.raises(UsageError, match='Unknown quantized type "int4"'):
        found.compute_amax("mse", "int4")
    with pytest.raises(UsageError, match='Unknown method "max"'):
        found.compute_range("max")
