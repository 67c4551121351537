"""Options are values: parsed where they are made, and the same in Python and on the command line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from cli.exported import digits

import swin_deploy
from swin_deploy.cli.flags import given, spec_options
from swin_deploy.errors import InputError, SwinDeployError, UsageError
from swin_deploy.option_parsers import options_of
from swin_deploy.options import BACKEND_NAMES, COMPILERS, EngineSpec, EvaluateSpec, ExportSpec, LoadSpec, QuantSpec, VerifySpec
from swin_deploy.preprocess import read_image
from swin_deploy.runtimes.backends import BACKENDS
from swin_deploy.tasks import TaskSpec

SPECS = {"export": ExportSpec, "build_engine": EngineSpec, "quantize": QuantSpec, "load": LoadSpec, "verify": VerifySpec}


@pytest.mark.parametrize(("verb", "spec"), [*SPECS.items(), ("evaluate", EvaluateSpec)], ids=str)
def test_python_keywords_are_the_fields(verb: str, spec: type[Any]) -> None:
    function = getattr(swin_deploy, verb)
    names = [name for name in inspect.signature(function).parameters if name != "bundle"]
    assert names == list(options_of(spec)) == [field.name for field in dataclasses.fields(spec)]
    for name, one in options_of(spec).items():
        assert f"    {name}: {one.help}" in function.__doc__


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.__name__)
def test_every_field_refuses_a_foreign_value(spec: type[Any]) -> None:
    for name in options_of(spec):
        with pytest.raises(UsageError) as caught:
            spec(**{name: object()})
        assert str(caught.value).startswith("Invalid ")
        assert name in str(caught.value).replace("image size", "image_sizes embed_resize").replace("batch range", "batches")


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.__name__)
def test_a_spec_is_frozen_and_compares_by_value(spec: type[Any]) -> None:
    assert spec() == spec(progress=print) if "progress" in options_of(spec) else spec() == spec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        next(setattr(spec(), name, None) for name in options_of(spec))  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        (ExportSpec("swin-tiny", image_sizes=[256, (224, 320)]), "--variant swin-tiny --image-size 256 --image-size 224X320"),
        (ExportSpec(image_sizes="256x320", force=True), "--image-size 256x320 --force"),
        (ExportSpec(task="backbone", out_features=["stage1", "stage2"]), "--task backbone --out-indices stage1,stage2"),
        (ExportSpec(task="feature-extraction", add_pooling_layer=False), "--task feature-extraction --no-pooling-layer"),
        (ExportSpec(embed_postprocess="top-k"), "--embed-postprocess top-k=5"),
        (ExportSpec(framework="timm", window_size=(8, 8, 8, 4)), "--framework timm --window-size 8,8,8,4"),
        (ExportSpec(framework="timm", window_size=np.int64(8)), "--semantics timm --window-size 8"),
        (EngineSpec(batches=(8,)), "--batch 8"),
        (EngineSpec(batches=[1, (1, 8, 32)], workspace=1 << 31), "--batch 1 --batch 1:8:32 --workspace 2GiB"),
        (EngineSpec(precision="int8", gpus=["sm_86", "rtx-4090"]), "--int8 --gpu sm_86,rtx-4090"),
        (EngineSpec(optimization_level=np.int32(3), timing_cache="c"), "--optimization-level 3 --timing-cache c"),
        (QuantSpec("images", precision="fp8", keep=["a", "b"]), "--data images --fp8 --keep a --keep b"),
        (QuantSpec("images", max_drop=np.float32(0.5), samples=3), "--data images --max-drop 0.5 --samples 3"),
        (EvaluateSpec("images", precisions=["fp16", "int8"]), "--data images --precision fp16 --precision int8"),
        (EvaluateSpec("images", labels="l.csv", ignore_labels=True), "--data images --labels l.csv --ignore-labels"),
        (VerifySpec(backend="openvino"), "--backend openvino"),
    ],
)  # fmt: skip
def test_the_command_line_takes_the_same_values(python: Any, shell: str) -> None:
    found: list[Any] = []
    spec = type(python)

    @click.command()
    @spec_options(spec)
    def command(**options: Any) -> None:
        found.append(spec(**given(spec, options)))

    command.main(shell.split(), standalone_mode=False)
    assert found == [python]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: swin_deploy.load(None), r"Invalid bundle: None \(NoneType\)\. Expected a path\."),  # type: ignore[arg-type]
        (lambda: swin_deploy.load("a\0b"), r"Invalid bundle: 'a\\x00b' \(str\)\. Expected a path\."),
        (lambda: LoadSpec(threads="two"), r"Invalid threads: 'two' \(str\)\. Expected a whole number from 0 to 1024\."),  # type: ignore[arg-type]
        (lambda: LoadSpec(threads=True), r"Invalid threads: True \(bool\)\."),
        (lambda: LoadSpec(device="gpu"), 'Unknown device "gpu"'),
        (lambda: LoadSpec(precision="int4"), 'Unknown precision "int4". Choose one of: auto, fp32, fp16, bf16, int8, fp8.'),
        (lambda: LoadSpec(backend="onnxruntime", rebuild=True), "rebuild compiles an engine again"),
        (lambda: EngineSpec(batches="8:1:2"), r'Invalid batch range "8:1:2"\. Expected MIN:OPT:MAX'),
        (lambda: EngineSpec(batches=(1, 8, 32)), r"for example \[\(1, 8, 32\)\] or \[1, 8, 32\]"),
        (lambda: EngineSpec(batches=[4, 4]), "each of them once"),
        (lambda: EngineSpec(batches=1 << 31), r"MAX < 2\^31"),
        (lambda: EngineSpec(workspace=2.5), r"Invalid workspace 2\.5"),
        (lambda: EngineSpec(precision="int8", data="x"), "needs no calibration images"),
        (lambda: EngineSpec(samples=3), "Pass --data"),
        (lambda: EngineSpec(backend="tensorrt-rtx", optimization_level=0), "TensorRT for RTX has no optimization levels"),
        (lambda: EngineSpec(timing_cache=Path(__file__).parent), "is not a file in an existing folder"),
        (lambda: ExportSpec(image_sizes=(224, 224)), r"for example \[\(224, 224\)\] or \[256, 320\]"),
        (lambda: ExportSpec(image_sizes=[(0, 4)]), r"Invalid image size \(0, 4\)\. Expected HEIGHTxWIDTH"),
        (lambda: ExportSpec(embed_resize=(-1, 4)), r"Invalid image size \(-1, 4\)"),
        (lambda: ExportSpec(embed_postprocess="argmax"), 'Unknown answer "argmax"'),
        (lambda: ExportSpec(embed_postprocess="softmax=3"), 'Unknown answer "softmax=3"'),
        (lambda: ExportSpec(embed_postprocess="top-k=0"), "Invalid embed_postprocess"),
        (lambda: ExportSpec(window_size=7.0), r"Invalid window_size: 7\.0 \(float\)\."),
        (lambda: ExportSpec(task="detection"), 'task "detection"'),
        (lambda: QuantSpec(3), r"Invalid data: 3 \(int\)\. Expected a path, or a list of images\."),
        (lambda: QuantSpec(precision="fp16"), 'Unknown quantized precision "fp16"'),
        (lambda: QuantSpec(max_drop=1), "measured on images"),
        (lambda: QuantSpec("d", max_drop=float("nan")), r"Invalid max_drop: nan"),
        (lambda: EvaluateSpec("d", precisions="fp7"), 'Unknown precision "fp7"'),
        (lambda: EvaluateSpec("d", samples=0), "Invalid samples: 0"),
        (lambda: QuantSpec("d", gpu="l4"), "Pass --min-speedup"),
    ],
)  # fmt: skip
def test_what_is_invalid_is_reported(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        call()


def test_a_flag_for_one_value_is_refused_twice() -> None:
    with pytest.raises(UsageError, match=r"--embed-resize was given 2 times\. Give it once\."):
        given(ExportSpec, {"embed_resize": ("32", "64")})
    with pytest.raises(UsageError, match="--fp16 and --int8 exclude each other"):
        given(EngineSpec, {"precision__fp16": True, "precision__int8": True})


def test_a_task_may_be_one_value() -> None:
    task = TaskSpec("backbone", out_features=("stage1",))
    assert ExportSpec(task=task).task_spec() == ExportSpec(task="backbone", out_features="stage1").task_spec() == task


def test_back_ends_are_those_of_the_table() -> None:
    assert set(BACKEND_NAMES) == BACKENDS.keys()
    assert set(COMPILERS) == {name for name, one in BACKENDS.items() if one.engines}


def test_names_that_are_too_long() -> None:
    for call in (lambda: read_image("x" * 5000), lambda: swin_deploy.inspect("x" * 5000), lambda: swin_deploy.load("x" * 5000)):
        with pytest.raises(SwinDeployError, match=r"[Nn]ame too long"):
            call()


def test_a_model_refuses_what_it_cannot_use() -> None:
    with swin_deploy.load(digits(2), backend="onnxruntime", precision="fp32") as model:
        image = np.zeros((32, 32, 3), np.uint8)
        for name, call in {
            "batch": lambda: model.warm_up("a"),  # type: ignore[arg-type]
            "top_k": lambda: model.classify(image, top_k="five"),  # type: ignore[arg-type]
            "batch_size": lambda: model.classify(image, batch_size=1.5),  # type: ignore[arg-type]
            "prefetch": lambda: model.stream([image], prefetch=0),
        }.items():
            with pytest.raises(UsageError, match=f"^Invalid {name}: .* Expected a whole number of at least 1"):
                call()
        for what in (None, 3, b"x"):
            with pytest.raises(InputError):
                model.classify(what)  # type: ignore[arg-type]
        three = Path(__file__).parents[1] / "examples/digits/images/3.png"
        assert model.classify(three, np.int64(1))[0][0].label == "three"  # type: ignore[arg-type]


def test_data_without_iter() -> None:
    """As the data sets of PyTorch and torchvision, which have no __iter__."""

    class Numbered:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, number: int) -> Any:
            return np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)

    [score] = swin_deploy.evaluate(digits(2), Numbered(), precisions=["fp32"]).scores  # type: ignore[arg-type]
    assert (score.precision, score.not_finite) == ("fp32", 0)
