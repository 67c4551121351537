"""`tune` stores what "auto" measured in the bundle. Machines of the same kind load it without a measurement, others measure."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cli.exported import cli_here, copied, result

import swin_deploy
from swin_deploy.bundle import Bundle, _manifest_text
from swin_deploy.errors import BackendError, BundleError
from swin_deploy.options import LoadSpec
from swin_deploy.runtimes import autoselect
from swin_deploy.runtimes.autoselect import Candidate, Measured, tuned_before
from swin_deploy.runtimes.model_from_bundle import _candidates

pytest.importorskip("openvino", reason="there would be nothing to choose")
ORT, HALF, OV = (Candidate(*name, "cpu") for name in (("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "fp32")))
FP16 = "onnx/model_fp16.onnx"
TIMES = {ORT: 5.0, HALF: 1.0, OV: 3.0}


class Machine:
    """What a test changes of this machine, and the candidates that were measured on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[Candidate] = []
        self.versions: dict[str, str] = {}
        self.patch, plain = monkeypatch, autoselect.installed_versions

        def measure(bundle: Bundle, candidate: Candidate, open_first: Any, best: float = 0.0) -> Measured:
            self.measured.append(candidate)
            return Measured(candidate, TIMES.get(candidate), "verified" if candidate in TIMES else "slow\n" * 99)

        monkeypatch.setattr(autoselect, "_measure", measure)
        monkeypatch.setattr(autoselect, "installed_versions", lambda names: plain(names) | {
            name: version for name, version in self.versions.items() if name in names})  # fmt: skip

    def has(self, **values: Any) -> None:
        for name, value in values.items():
            self.patch.setattr(autoselect, name, lambda value=value: value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was tuned for 0 threads and for 1."""
    path = copied(2, tmp_path_factory.mktemp("tuned") / "b")
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch)
        assert [one.threads for one in swin_deploy.tune(path)] == [0, 1]
    return path


@pytest.fixture
def path(tuned: Path, tmp_path: Path, machine: Machine) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(tuned, tmp_path / "b"))


def loaded(path: Path, **options: Any) -> Any:
    with swin_deploy.load(path, **options) as model:
        return model.describe()


def test_taken_without_a_measurement(path: Path, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "swin_deploy")
    found = loaded(path)
    assert (found.backend, found.precision) == ("onnxruntime", "fp16")
    assert "the fastest of 3 that agree" in found.reason
    assert found.reason.endswith(", stored in the bundle by tune")
    [line] = caplog.messages
    assert line.startswith(f"Using the measurement that tune stored in {path} at 20")
    # A part of the candidates was measured, too.
    assert [row.candidate for row in loaded(path, precision="fp32", threads=1).measured] == [ORT, OV]
    assert loaded(path, precision="fp32").backend == "openvino"
    assert machine.measured == []
    verdicts = [row.verdict for tuning in Bundle.open(path).manifest.tuning for row in tuning.candidates]
    assert max(map(len, verdicts)) <= 300


def test_loaded_by_several_threads_at_once(path: Path, machine: Machine) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: loaded(path).precision, range(8))) == {"fp16"}
    assert machine.measured == []


def version(name: str) -> Callable[[Path, Machine], None]:
    return lambda path, machine: machine.versions.update({name: "99.9"})


def has(**values: Any) -> Callable[[Path, Machine], None]:
    return lambda path, machine: machine.has(**values)


CHANGES: list[tuple[Callable[[Path, Machine], object], dict[str, Any], bool]] = [
    (has(processor_name="another"), {}, True),
    (has(processor_features=("another",)), {}, True),
    (has(usable_cores=77), {}, True),
    (has(usable_cores=77), {"threads": 1}, False),  # the threads are named
    (has(), {"threads": 2}, True),
    (has(cuda_version=13000), {}, True),
    (version("onnxruntime"), {}, True),
    (version("swin-deploy"), {}, True),
    (version("openvino"), {"backend": "onnxruntime"}, False),  # not a library of a candidate
    (version("torch"), {}, False),
    (lambda path, _: Bundle.open(path).with_file("engines/x.json", {}, b"{}"), {}, False),  # no candidate runs it
    (lambda path, _: Bundle.open(path).with_file(FP16, Bundle.open(path).files[FP16].to_dict(), b"another"), {}, True),
    (lambda path, _: Bundle.open(path).without(FP16), {}, False),  # one candidate less
]


@pytest.mark.parametrize(("change", "options", "measures"), CHANGES)
def test_what_it_depends_on(
    change: Callable[[Path, Machine], object], options: dict[str, Any], measures: bool, path: Path, machine: Machine
) -> None:
    change(path, machine)
    bundle, spec = Bundle.open(path), LoadSpec(**options)
    assert (tuned_before(bundle, _candidates(bundle, spec), spec.threads) is None) == measures


def test_a_new_graph_is_measured(tmp_path: Path, machine: Machine) -> None:
    path = copied(2, tmp_path / "b")
    Bundle.open(path).with_entry(FP16, {"agreement": "not verified"})
    swin_deploy.tune(path)
    assert HALF not in machine.measured
    Bundle.open(path).with_entry(FP16, {"agreement": {"verified": True, "relative_l2": 1e-4}})
    machine.measured.clear()
    assert loaded(path).precision == "fp16"
    assert HALF in machine.measured


def test_several_machines_and_a_second_measurement(path: Path, machine: Machine) -> None:
    machine.has(processor_name="another")
    swin_deploy.tune(path, precision="fp32", threads=0)
    assert [len(one.candidates) for one in Bundle.open(path).manifest.tuning] == [5, 5, 2]
    machine.patch.setitem(TIMES, OV, 0.5)
    [done] = result(cli_here("tune", path, "--threads", "0", "--json", cwd=path.parent))  # covers the two, and replaces them
    assert (done["backend"], done["precision"], len(done["measured"])) == ("openvino", "fp32", 5)
    assert [len(one.candidates) for one in Bundle.open(path).manifest.tuning] == [5, 5, 5]
    machine.measured.clear()
    assert loaded(path).backend == "openvino"


def test_one_candidate_is_not_stored(path: Path, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "swin_deploy")
    before = (path / "manifest.json").read_bytes()
    done = cli_here("tune", path, "--backend", "onnxruntime", "--precision", "fp32", cwd=path.parent)
    assert (done.returncode, "only candidate" in done.stdout, "only one candidate" in done.stderr) == (0, True, True)
    machine.patch.setattr("os.access", lambda *_: False)
    with pytest.raises(BundleError, match="read-only"):
        swin_deploy.tune(path)
    assert (machine.measured, (path / "manifest.json").read_bytes()) == ([], before)


def test_what_does_not_load_is_passed_over(path: Path, machine: Machine) -> None:
    from swin_deploy.runtimes.openvino import OpenVino

    def fails(self: Any, *_: Any, **__: Any) -> None:
        raise BackendError("OpenVINO does not start today.")

    machine.patch.setattr(OpenVino, "__init__", fails)
    found = loaded(path, precision="fp32")
    assert (found.backend, found.measured[1].verdict) == ("onnxruntime", "OpenVINO does not start today.")
    assert machine.measured == []


def forged(path: Path, **changes: Any) -> None:
    """Change every stored candidate, and give the manifest a right digest."""
    manifest = Bundle.open(path).manifest.to_dict()
    for tuning in manifest["tuning"]:
        tuning["candidates"] = [one | changes for one in tuning["candidates"]]
    (path / "manifest.json").write_text(_manifest_text(manifest))


@pytest.mark.parametrize("changes", [{"backend": "evil"}, {"device": "cuda:0"}, {"files": "0" * 64}, {"milliseconds": None}])
def test_a_stored_measurement_adds_no_candidate(changes: dict[str, Any], path: Path, machine: Machine) -> None:
    forged(path, **changes)
    assert loaded(path).precision == "fp16"
    assert {ORT, HALF, OV} <= set(machine.measured)


def test_an_unverified_graph_is_not_taken(path: Path, machine: Machine) -> None:
    forged(path, milliseconds=0.0, verdict="verified")
    Bundle.open(path).with_entry(FP16, {"agreement": "not verified"})
    assert loaded(path, backend="onnxruntime").precision == "fp32"
