"""What a user may get wrong: an argument of another type is one sentence that names it, of every function of the package."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import digits

import swin_deploy
from swin_deploy.arguments import checked, kinds_of
from swin_deploy.bench.run import bench
from swin_deploy.bundle import Bundle
from swin_deploy.doctor.checks import doctor
from swin_deploy.errors import InputError, SwinDeployError, UsageError
from swin_deploy.preprocess import read_image
from swin_deploy.runtimes.model import Model
from swin_deploy.tasks import TaskSpec

API = [getattr(swin_deploy, name) for name in swin_deploy.__all__ if not name.startswith("__")]
FUNCTIONS = [*API, bench, doctor, Bundle.open, Model.warm_up, Model.classify, Model.features, Model.reconstruct, Model.stream]
CHECKED_WHERE_READ = {"self", "images", "frames", "mask"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_every_argument_of_every_function(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    needed = {name: None for name, one in parameters.items() if one.default is one.empty}
    for name, one in parameters.items():
        if name in CHECKED_WHERE_READ:
            continue
        assert kinds_of(str(one.annotation)), f"{name}: {one.annotation} is not checked"
        with pytest.raises(UsageError, match=rf"^{name} is .*<object object at .*> \(object\), and must be [^\n]+\.$"):
            function(**{**dict.fromkeys(needed, Any), **_right(needed, parameters), name: object()})


def _right(needed: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """Paths for what is needed and is one; nothing gets as far as to read them."""
    return {name: "path" for name in needed if "path" in str(parameters[name].annotation).lower()}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: swin_deploy.load(None), r"path is None \(NoneType\), and must be a path\."),  # type: ignore[arg-type]
        (lambda: swin_deploy.load("a\0b"), r"path is 'a\\x00b' \(str\), and must be a path\."),
        (lambda: swin_deploy.load("b", threads="2"), r"threads is '2' \(str\), and must be a whole number\."),  # type: ignore[arg-type]
        (lambda: swin_deploy.load("b", threads=True), r"threads is True \(bool\), and must be a whole number\."),
        (lambda: swin_deploy.load("b", device=0), r"device is 0 \(int\), and must be a text\."),  # type: ignore[arg-type]
        (lambda: swin_deploy.load("b", rebuild="no"), "must be True or False"),  # type: ignore[arg-type]
        (lambda: swin_deploy.build_engine("b", gpus="sm_89"), r"gpus is 'sm_89' \(str\), and must be a list of texts\."),
        (lambda: swin_deploy.build_engine("b", batches=8), "a list of tuples of 3 whole numbers"),  # type: ignore[arg-type]
        (lambda: swin_deploy.build_engine("b", batches=(1, 8, 32)), "a list of tuples of 3 whole numbers"),  # type: ignore[arg-type]
        (lambda: swin_deploy.build_engine("b", workspace=2.5), "a whole number or None"),  # type: ignore[arg-type]
        (lambda: swin_deploy.export("swin-tiny", image_sizes=(224, 224)), "a list of tuples of 2 whole numbers"),  # type: ignore[arg-type]
        (lambda: swin_deploy.export("swin-tiny", image_sizes=[(0, 4)]), r"size is \(0, 4\), and .* must be at least 1\."),
        (lambda: swin_deploy.export("swin-tiny", embed_preprocess=True, embed_resize=(-1, 4)), r"\(-1, 4\), and .* at least 1"),
        (lambda: swin_deploy.export("swin-tiny", window_size=7.0), "a whole number or a list of whole numbers or None"),  # type: ignore[call-overload]
        (lambda: swin_deploy.quantize("b", 3), r"data is 3 \(int\), and must be a path or a list of images or None"),  # type: ignore[arg-type]
        (lambda: swin_deploy.quantize("b", keep="layer"), "a list of texts"),
        (lambda: swin_deploy.load(np.zeros((99, 99))), "path is a ndarray, and must be a path"),  # type: ignore[arg-type]
        (lambda: Bundle.open(3), r"path is 3 \(int\), and must be a path\."),  # type: ignore[arg-type]
        (lambda: TaskSpec("backbone", out_features="stage1"), "expected a list of names"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_is_said(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        call()


def test_numbers_of_numpy_are_numbers() -> None:
    @checked
    def taken(whole: int, number: float, flag: bool, sizes: Sequence[tuple[int, int]] = ()) -> tuple[object, ...]:
        return whole, number, flag, sizes

    given = taken(np.int64(3), np.float32(0.5), np.bool_(True), sizes=[(np.int32(1), 2)])  # type: ignore[arg-type]
    assert json.dumps(given) == "[3, 0.5, true, [[1, 2]]]"  # as a manifest would hold them
    assert taken(3, 2, flag=False, sizes=[(1, 2)]) == (3, 2, False, ((1, 2),))
    with pytest.raises(TypeError, match=r"taken\(\) missing 2 required positional arguments"):
        taken(3)  # type: ignore[call-arg]


def test_data_that_is_known_by_number_alone() -> None:
    """As PyTorch's data sets, and torchvision's, which have no __iter__."""

    class Numbered:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, number: int) -> Any:
            return np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)

    [score] = swin_deploy.evaluate(digits(2), Numbered(), precisions=["fp32"]).scores  # type: ignore[arg-type]
    assert (score.precision, score.not_finite) == ("fp32", 0)


def test_names_that_are_too_long() -> None:
    for call in (lambda: read_image("x" * 5000), lambda: swin_deploy.inspect("x" * 5000), lambda: swin_deploy.load("x" * 5000)):
        with pytest.raises(SwinDeployError, match=r"[Nn]ame too long"):
            call()


def test_a_model() -> None:
    with swin_deploy.load(digits(2), backend="onnxruntime", precision="fp32") as model:
        image = np.zeros((32, 32, 3), np.uint8)
        for name, call in {
            "batch": lambda: model.warm_up("a"),  # type: ignore[arg-type]
            "top_k": lambda: model.classify(image, top_k="5"),  # type: ignore[arg-type]
            "batch_size": lambda: model.classify(image, batch_size=1.5),  # type: ignore[arg-type]
            "prefetch": lambda: model.stream([image], prefetch="2"),  # type: ignore[arg-type]
        }.items():
            with pytest.raises(UsageError, match=f"^{name} is .* must be a whole number"):
                call()
        with pytest.raises(UsageError, match=r"batch is 0\.5 \(float\)"):
            model.stream([image], batch=0.5)  # type: ignore[arg-type]
        for what in (None, 3, b"x"):
            with pytest.raises(InputError):
                model.classify(what)  # type: ignore[arg-type]
        assert model.classify(Path(__file__).parents[1] / "examples/digits/images/3.png", np.int64(1))[0][0].label == "three"  # type: ignore[arg-type]
