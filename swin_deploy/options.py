"""The options of every command and function: frozen values, one for each verb, and the choices that they have."""

from __future__ import annotations

import os
import re
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy import option_parsers as parse
from swin_deploy.errors import EngineError, UsageError, unknown
from swin_deploy.option_parsers import Progress as Progress
from swin_deploy.option_parsers import Spec, option, progress_option
from swin_deploy.option_parsers import no_progress as no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from swin_deploy.tasks import TaskSpec

    Array = NDArray[Any]
else:
    Array = Any  # only used in annotations; without numpy, `--help` takes half the time

QUANTIZED = ("int8", "fp8")
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
TARGETS = ("tensorrt", "onnxruntime", "openvino")  # runtimes that a graph layout is made for
TASKS = ("image-classification", "feature-extraction", "backbone", "masked-image-modeling")
FRAMEWORKS = ("hf", "timm", "microsoft", "torchvision")  # source of the window, shift and padding rules
SCORES = ("softmax", "sigmoid", "none")  # activations that turn logits into scores
LAYOUTS = ("nhwc", "nchw")  # of frames: uint8, or float32 pixels from 0 to 255
ORDERS = ("rgb", "bgr")  # of their channels
ANSWERS = ("softmax", "sigmoid", "top-k")  # outputs that a graph may have beside its logits
ON_ERROR = ("continue", "stop")  # what to do after an image that cannot be read
METHODS = ("minmax", "percentile", "entropy", "mse")  # how a range is chosen from what was observed
COMPILERS = ("tensorrt", "tensorrt-rtx")
PROGRAMS = ("triton", "openvino-model-server", "deepstream", "gstreamer", "huggingface", "epcontext", "web")  # of publish
BACKEND_NAMES = ("onnxruntime", "openvino", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "torch", *COMPILERS)
OPSETS = range(17, 27)  # of the graphs; ONNX Runtime 1.31 reads no later one
MOST_THREADS = 1024  # back ends start as many as they are asked for, until memory runs out
Size = tuple[int, int]
Batch = tuple[int, int, int]  # smallest, optimal, largest
PathLike = str | os.PathLike[str]


def device_from_text(text: str) -> str:
    """Return "cuda:0" for "cuda" or "cuda:0", and "cpu" for "cpu". Raises UsageError for anything else."""
    if text == "cpu":
        return text
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", text)
    if match is None:
        raise UsageError(f'Unknown device "{text}". Expected cpu, cuda, or one of several GPUs such as cuda:1.')
    return f"cuda:{int(match[1] or 0)}"


def device(name: str, value: Any) -> str:
    """Accept "auto", "cpu", "cuda" or "cuda:1"."""
    if parse.text(name, value) != "auto":
        device_from_text(value)
    return str(value)


def _answer(name: str, value: Any) -> str:
    """Accept one of ANSWERS, and "top-k=3"; "top-k" becomes "top-k=5"."""
    kind, equals, count = parse.text(name, value).partition("=")
    if kind not in ANSWERS or (equals and kind != ANSWERS[-1]):
        raise unknown("answer", value, (*ANSWERS, "top-k=N"))
    return kind if kind != ANSWERS[-1] else f"{kind}={parse.whole(1)(name, count if equals else 5)}"


def _on_error_option() -> Any:
    return option(
        "continue",
        parse.choice("reaction to errors", ON_ERROR),
        "What to do if an image cannot be read: continue without it and exit with 1 at the end, or stop at once.",
    )


def _trust_option() -> Any:
    return option(
        False, parse.flag, "Run engines that were compiled elsewhere. An engine is code: pass it only if you trust its author."
    )


def _image_labels_option() -> Any:
    return option(
        None,
        parse.path,
        "File with lines `image,class`, or `image,label,label,...`. Default: the folders of the images are their classes.",
    )


@dataclass(frozen=True)
class ExportSpec(Spec):
    """Options of `swin_deploy.export` and `swin-deploy export`."""

    variant: str | None = option(
        None, parse.text, "A published checkpoint, such as swinv2-tiny. `swin-deploy variants` lists them."
    )
    _: KW_ONLY
    weights: PathLike | None = option(
        None,
        parse.location,
        "A checkpoint: a folder, a file, or a Hugging Face hub id. Default: the hub id of the variant.",
        metavar="PATH|ID",
    )
    random_weights: bool = option(False, parse.flag, "Use reproducible random weights instead of a checkpoint.")
    seed: int = option(0, parse.whole(0), "Seed of the random weights.")
    task: str | TaskSpec | None = option(
        None,
        parse.anything,
        "Task head to export. Default: image-classification; for a Swin inside another model, the outputs that the model uses.",
        choices=TASKS,
    )
    image_sizes: Any = option(
        (),
        parse.image_sizes,
        "Height and width of the images in pixels, one graph for each size. Default: the output size of the image processor.",
        flags=("--image-size",),
        many=True,
    )
    output_hidden_states: bool = option(False, parse.flag, "Add the hidden states of every stage to the outputs.")
    output_attentions: bool = option(
        False, parse.flag, "Add the attention weights of the last block of every stage to the outputs."
    )
    out_features: Any = option(
        (),
        parse.texts,
        "Feature maps of a backbone: stem, stage1, ..., or their numbers 0, 1, ..., -1.",
        flags=("--out-features", "--out-indices"),
        metavar="NAME,...",
    )
    use_mask_token: bool = option(False, parse.flag, "Add the input bool_masked_pos to feature extraction.")
    add_pooling_layer: bool = option(
        True, parse.flag, "Add pooler_output to the outputs of feature extraction.", flags=("--no-pooling-layer",)
    )
    framework: str | None = option(
        None,
        parse.choice("framework", FRAMEWORKS),
        "Window, shift and padding rules of this framework. Default: those of the checkpoint.",
        hidden_flags=("--semantics",),
    )
    weights_key: str | None = option(
        None,
        parse.text,
        "Which weights to load if a file has several sets: model, ema, or the key of the set. Default: the EMA, if any.",
        metavar="KEY",
    )
    head_activation: str | None = option(
        None,
        parse.text,
        "Activation between the linear layers of a head that has several: relu, gelu, ...; linear for none.",
        metavar="NAME",
    )
    always_partition: bool = option(
        False, parse.flag, "Shift windows on feature maps of every size, as detectors with Microsoft's code do."
    )
    window_size: Any = option(
        None,
        parse.per_stage,
        "Window size in patches (8, or 4x8), or one for each stage. Position tables of the checkpoint are resized to it.",
    )
    pretrained_window_sizes: Any = option(
        None, parse.per_stage, "Swin V2: the window sizes of the pretraining, one for each stage."
    )
    preprocessor: PathLike | None = option(
        None, parse.path, "File that states the preprocessing: preprocessor_config.json, or timm's config.json."
    )
    mean: Any = option(None, parse.numbers, "Mean of the pixels divided by 255: one number, or one for each channel.")
    std: Any = option(None, parse.numbers, "Standard deviation of the pixels divided by 255, like --mean.")
    crop_pct: float | None = option(
        None, parse.number(0.01, 1), "Resize the image to the graph's size divided by this number, then crop the center."
    )
    labels: str | None = option(
        None,
        parse.location,
        "Names of the classes: a text file with one per line, JSON, CSV with a column `name`, or imagenet-1k.",
        metavar="FILE",
    )
    activation: str | None = option(
        None,
        parse.choice("activation", SCORES),
        "Function that turns logits into scores. Default: as problem_type states, else softmax, or sigmoid for one class.",
    )
    target: str = option(
        "tensorrt",
        parse.choice("target", TARGETS),
        "Runtime whose graph layout is written. fp32 graphs of every layout give the same results everywhere.",
    )
    opset: int | None = option(
        None,
        parse.whole(OPSETS[0], OPSETS[-1]),
        "ONNX opset of all graphs, with the lowest IR version that it allows. Default: 20; 21 or 22 for types that need it.",
    )
    static_batch: int | None = option(
        None,
        parse.whole(1, 4096),
        "Write graphs for exactly this number of images, without a free axis: for NPUs, Windows ML and old parsers.",
        metavar="N",
    )
    embed_preprocess: bool = option(
        False,
        parse.flag,
        "Write graphs that accept uint8 frames [batch, height, width, channels], and rescale and normalize them.",
    )
    embed_resize: Any = option(
        None,
        parse.image_size,
        "Like --embed-preprocess, for frames of this height and width in pixels, which the graph also resizes and crops.",
    )
    input_layout: str | None = option(
        None,
        parse.choice("layout", LAYOUTS),
        "Layout of embedded frames: nhwc for uint8 (default), nchw for float32 pixels from 0 to 255.",
    )
    input_order: str | None = option(
        None, parse.choice("order of channels", ORDERS), "Order of the color channels of embedded frames. Default: rgb."
    )
    embed_postprocess: str | None = option(
        None,
        _answer,
        "Add the scores of all classes to the outputs of the graph, or the indices and scores of the best ones (5 by default).",
        metavar="softmax|sigmoid|top-k[=N]",
    )
    output: PathLike | None = option(
        None,
        parse.path,
        "Folder of the bundle to write. Default: named after the variant or the checkpoint, in the current directory.",
        flags=("-o", "--output"),
    )
    force: bool = option(False, parse.flag, "Replace an existing bundle.")
    progress: Progress = progress_option()

    def check(self) -> None:
        if self.task is not None or self.weights is None:
            self.task_spec()
        if not (self.embed_preprocess or self.embed_resize) and (self.input_layout or self.input_order):
            raise UsageError(
                "--input-layout and --input-order describe the frames that a graph accepts. Pass --embed-preprocess or "
                "--embed-resize."
            )

    def task_spec(self, default: str = TASKS[0]) -> TaskSpec:
        """Return the task and its options as one value. `default` is the task of the checkpoint."""
        from swin_deploy.tasks import TaskSpec

        if isinstance(self.task, TaskSpec):
            return self.task
        return TaskSpec(
            default if self.task is None else parse.text("task", self.task),
            output_hidden_states=self.output_hidden_states,
            output_attentions=self.output_attentions,
            add_pooling_layer=self.add_pooling_layer,
            use_mask_token=self.use_mask_token,
            out_features=self.out_features,
        )


# Options that TensorRT for RTX lacks, and why. tests/exporters/test_engine_options.py asks the compiler about each.
RTX_LACKS = {
    "optimization_level": "optimization levels: it builds the same engine at each of them",
    "timing_cache": "timing cache: it times nothing while it compiles, and its timing-cache functions have no effect",
    "version_compatible": "version-compatible engines: it does not include the lean runtime that would run them",
    "hardware_compatible": "hardware-compatible engines: it compiles one engine for each GPU",
}


@dataclass(frozen=True)
class EngineSpec(Spec):
    """Options of `swin_deploy.build_engine` and `swin-deploy build-engine`."""

    _: KW_ONLY
    precision: str = option(
        "fp16",
        parse.choice("precision", PRECISIONS),
        "Precision to compute in. int8 and fp8 need the graph that `quantize` writes.",
        values_as_flags=True,
    )
    data: Any = option(
        None, parse.images, "Images to calibrate fp16 with: nodes with values above half of the fp16 maximum stay in fp32."
    )
    samples: int | None = option(None, parse.whole(1), "Number of images to use from the data, evenly spaced.")
    gpus: Any = option(
        (),
        parse.texts,
        "GPUs to compile for: sm_86, rtx-4090, ..., or current. Default: this machine's GPU, else sm_86, sm_89 and sm_120.",
        flags=("--gpu",),
        metavar="SM,...",
    )
    backend: str = option(
        "auto",
        parse.choice("compiler", ("auto", *COMPILERS)),
        "TensorRT compiler. auto: tensorrt if it and a GPU are available, else tensorrt-rtx, which compiles without a GPU.",
    )
    batches: Any = option(
        None,
        parse.batches,
        "Batch size or range, one optimization profile for each. Default: 1.",
        flags=("--batch",),
        many=True,
    )
    latency_ms: float | None = option(
        None,
        parse.number(0.001),
        "Build for the largest batch up to 256 that runs within N milliseconds: measured on this machine's GPU, or estimated "
        "by the roofline of another one.",
        metavar="N",
    )
    workspace: Any = option(None, parse.memory, "Scratch memory for each kernel, such as 2GiB.")
    optimization_level: int | None = option(
        None, parse.whole(0, 5), "0 compiles fastest, 5 searches the most kernels. tensorrt only."
    )
    timing_cache: PathLike | None = option(None, parse.path, "File to read and write kernel timings. tensorrt only.")
    version_compatible: bool = option(
        False, parse.flag, "Build an engine that newer TensorRT releases also run. tensorrt only."
    )
    hardware_compatible: bool = option(
        False, parse.flag, "Build an engine for any GPU from sm_80 on (FP8: sm_89). tensorrt only."
    )
    fused_attention: bool = option(
        True,
        parse.flag,
        "Fuse the kernels of each attention. A few GPUs and releases compute the fused kernel wrongly.",
        flags=("--no-fused-attention",),
    )
    strip_weights: bool = option(False, parse.flag, "Leave the weights out; `swin-deploy refit` adds them. Needs a GPU.")
    force: bool = option(False, parse.flag, "Compile again even if the bundle has this engine.")
    progress: Progress = progress_option()

    def check(self) -> None:
        if self.latency_ms is not None and self.batches is not None:
            raise UsageError("--latency-ms chooses the batch. Leave out --batch, or --latency-ms.")
        if self.latency_ms is not None and self.strip_weights:
            raise UsageError(
                "--latency-ms times the engine, which does not run without its weights. Leave out --strip-weights."
            )
        if self.batches is None:
            object.__setattr__(self, "batches", ((1, 1, 1),))
        if self.data is not None and self.precision != "fp16":
            raise UsageError(f"{self.precision} has the range of fp32 and needs no calibration images. Leave out the data.")
        if self.samples is not None and self.data is None:
            raise UsageError("A number of samples needs images to take them from. Pass --data.")
        if self.backend == "tensorrt-rtx":
            for name, reason in RTX_LACKS.items():
                if (value := getattr(self, name)) is not None and value is not False:
                    raise UsageError(
                        f"TensorRT for RTX has no {reason}. Leave out the option, or use the back end tensorrt on the target "
                        f"machine."
                    )
            from swin_deploy.gpus import cuda_devices

            if self.strip_weights and not cuda_devices():
                raise EngineError(
                    "TensorRT for RTX needs a GPU to build engines without weights, and this machine has no usable NVIDIA GPU. "
                    "Run this on a machine with one, or keep the weights in the engine."
                )
        cache = self.timing_cache
        if isinstance(cache, Path) and (cache.is_dir() or not cache.absolute().parent.is_dir()):
            raise UsageError(f"The timing cache {cache} is not a file in an existing folder. Pass the path of one.")

    @property
    def gpu(self) -> str:
        """The first GPU to compile for, or "current"."""
        return str(self.gpus[0]) if self.gpus else "current"


@dataclass(frozen=True)
class QuantSpec(Spec):
    """Options of `swin_deploy.quantize` and `swin-deploy quantize`."""

    data: Any = option(
        None,
        parse.images,
        "Images like those of the application: a folder, or an .npz or .npy file. In Python also any iterable.",
    )
    _: KW_ONLY
    precision: str = option(
        "int8", parse.choice("quantized precision", QUANTIZED), "Type of the quantized layers.", values_as_flags=True
    )
    target: str | None = option(
        None, parse.choice("target", TARGETS), "Runtime to quantize for. Default: the one that the bundle was exported for."
    )
    method: str | None = option(
        None,
        parse.choice("method", METHODS),
        "How activation ranges are chosen. Default: mse for tensorrt, else the least error of the layer's output.",
    )
    samples: int | None = option(None, parse.whole(1), "Number of images to use, evenly spaced, the same number per class.")
    batch: int = option(8, parse.whole(1), "Images to run at a time.")
    keep: Any = option((), parse.texts, "Layer that is not quantized.", metavar="LAYER", many=True)
    max_drop: float | None = option(
        None,
        parse.number(0),
        "Largest accepted loss in percentage points: of top-1 or mAP if labels are known, else of agreement with fp32.",
        metavar="POINTS",
    )
    min_speedup: float | None = option(
        None,
        parse.number(0),
        "Smallest accepted speedup over the fp32 graph on this machine. For TensorRT: over the fp16 graph, by the roofline.",
        metavar="FACTOR",
    )
    labels: PathLike | None = _image_labels_option()
    ignore_labels: bool = option(False, parse.flag, "Compare with fp32 only, even if the images have labels.")
    on_error: str = _on_error_option()
    gpu: str | None = option(None, parse.text, "GPU of the roofline that --min-speedup uses, such as rtx-4090.")
    ranges: PathLike | None = option(None, parse.path, "ONNX graph of the same network with Q/DQ nodes. Its scales are used.")
    ignore_ranges: bool = option(False, parse.flag, "Measure all ranges, even if the checkpoint has QAT ranges.")
    progress: Progress = progress_option()

    def check(self) -> None:
        if self.precision == "fp8" and self.target not in (None, TARGETS[0]):
            raise UsageError(f"{self.target} does not compute in FP8. Use int8, or --target tensorrt.")
        if self.data is None and (self.max_drop, self.min_speedup) != (None, None):
            raise UsageError("--max-drop and --min-speedup are measured on images. Pass --data.")
        for name in ("samples", "labels", "method"):
            if self.data is None and getattr(self, name) is not None:
                raise UsageError(f"--{name} is about the images of --data. Pass --data, or leave out --{name}.")
        if self.gpu is not None and self.min_speedup is None:
            raise UsageError(
                "--gpu is the GPU of the roofline that --min-speedup uses. Pass --min-speedup, or leave out --gpu."
            )


@dataclass(frozen=True)
class _CandidateSpec(Spec):
    """Options that leave a choice to "auto"."""

    _: KW_ONLY
    backend: str = option(
        "auto", parse.choice("back end", ("auto", *BACKEND_NAMES)), "Back end to run the model. auto: the fastest verified one."
    )
    precision: str = option(
        "auto",
        parse.choice("precision", ("auto", *PRECISIONS)),
        "Precision to run. auto: the fastest verified one of the bundle.",
    )
    device: str = option("auto", device, "Device: auto, cpu, cuda or cuda:1.")
    trust: bool = _trust_option()


@dataclass(frozen=True)
class TuneSpec(_CandidateSpec):
    """Options of `swin_deploy.tune` and `swin-deploy tune`."""

    _: KW_ONLY
    threads: Any = option(
        (0, 1),
        parse.many(parse.whole(0, MOST_THREADS)),
        "CPU threads. Default: 0, as in `load`, and 1, as in the worker processes of `classify`.",
        metavar="N",
        many=True,
    )


@dataclass(frozen=True)
class LoadSpec(_CandidateSpec):
    """Options of `swin_deploy.load`."""

    _: KW_ONLY
    threads: int = option(0, parse.whole(0, MOST_THREADS), "CPU threads. 0: the back end chooses.")
    rebuild: bool = option(
        False,
        parse.flag,
        "If an engine does not fit this GPU, TensorRT release or graph, compile it again with the same options.",
    )
    batches: Any = option(
        (),
        parse.many(parse.whole(1, 4096)),
        "Batch sizes that OpenVINO compiles a graph for. Default: the first that are run, three at most.",
        flags=(),
    )

    def check(self) -> None:
        if self.batches and self.backend not in ("auto", "openvino"):
            raise UsageError(
                f"batches are the sizes that OpenVINO compiles. {self.backend} runs every size with one graph or engine, so "
                "leave them out."
            )
        if self.rebuild and self.backend not in COMPILERS:
            raise UsageError(
                f"rebuild compiles an engine again and needs its back end, not {self.backend}. Name {' or '.join(COMPILERS)}."
            )


@dataclass(frozen=True)
class ClassifySpec(_CandidateSpec):
    """Options of `swin_deploy.classify_dataset` and `swin-deploy classify`."""

    source: Any = option(
        MISSING,
        parse.anything,
        "Images: a folder, a pattern, a text file of paths, tar shards, Parquet files, a list of paths, or a Ray dataset.",
        flags=(),
    )
    _: KW_ONLY
    output: PathLike = option(
        MISSING, parse.path, "File to write: .parquet, .jsonl or .csv.", flags=("-o", "--output"), metavar="FILE"
    )
    features: bool = option(
        False, parse.flag, "Write the feature vector of each image. The bundle needs the task feature-extraction."
    )
    top_k: int | None = option(
        None,
        parse.whole(1),
        "Number of classes for each image. Default: 5; for multi-label networks and regressions, all.",
        flags=("-k", "--top-k"),
    )
    threshold: float | None = option(
        None,
        parse.number(0),
        "Write only classes with a higher score. Default: 0.5 for multi-label networks, unless top_k is set.",
    )
    batch: int = option(8, parse.whole(1, 4096), "Images that a process runs at a time.")
    workers: int | None = option(
        None,
        parse.whole(1, MOST_THREADS),
        "Processes, each with one thread. Default: the fastest number on this machine, measured once. With Ray: actors.",
    )
    ray: str | None = option(
        None,
        parse.text,
        "Classify with Ray Data: the address of a cluster, auto for the one running on this machine, or local to start one.",
        metavar="ADDRESS",
    )
    num_gpus: float | None = option(None, parse.number(0, 64), "GPUs for each actor of Ray, or a fraction of one.", metavar="X")
    image_column: str | None = option(
        None, parse.text, "Parquet: column of image bytes or paths. Default: found by type and name."
    )
    key_column: str | None = option(
        None, parse.text, "Parquet: column that identifies an image. Default: key, id or path, else the number of the row."
    )
    force: bool = option(False, parse.flag, "Replace an existing output, and discard an unfinished run that had other options.")
    progress: Progress = progress_option()

    def check(self) -> None:
        if self.num_gpus is not None and self.ray is None:
            raise UsageError("--num-gpus is for actors of Ray. Pass --ray, or --device cuda for a GPU of this machine.")
        if self.num_gpus and self.device == "cpu":
            raise UsageError("--num-gpus gives GPUs to actors, but --device is cpu. Leave one of them out.")
        for name in ("top_k", "threshold"):
            if self.features and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for classes. Leave it out, or leave out --features.")


@dataclass(frozen=True)
class ServeSpec(_CandidateSpec):
    """Options of `swin_deploy.serving.application` and `swin-deploy serve`."""

    _: KW_ONLY
    host: str = option(
        "127.0.0.1", parse.text, "Address to listen on. 0.0.0.0 accepts requests from anywhere, without authentication."
    )
    port: int = option(8000, parse.whole(0, 65535), "Port to listen on. 0: a free one, which is printed.")
    workers: int | None = option(
        None, parse.whole(1, MOST_THREADS), "Requests to run at a time. Default: one for each core, 8 at most; 4 on a GPU."
    )
    threads: int = option(0, parse.whole(0, MOST_THREADS), "CPU threads of each worker. 0: the cores divided by the workers.")
    batch: int | None = option(
        None,
        parse.whole(1, 1024),
        "Largest batch that a worker makes of waiting images. Default: 8 if that is faster on this machine, else 1.",
    )
    queue: int = option(64, parse.whole(1), "Requests that may wait. Further ones are refused with status 503.")
    timeout: float = option(
        30.0, parse.number(0.1, 86_400), "Seconds to receive a request, and then to answer it.", metavar="S"
    )
    max_body: Any = option("16MiB", parse.memory, "Largest body of a request, such as 16MiB.")
    max_pixels: int = option(50_000_000, parse.whole(1), "Largest number of pixels of an image.")
    ray: str | None = option(
        None,
        parse.text,
        "Deploy with Ray Serve: the address of a cluster, auto for the one running on this machine, or local to start one.",
        metavar="ADDRESS",
    )


@dataclass(frozen=True)
class VerifySpec(Spec):
    """Options of `swin_deploy.verify` and `swin-deploy verify`."""

    _: KW_ONLY
    backend: str = option("onnxruntime", parse.choice("back end", BACKEND_NAMES), "Back end to run the graphs or engines.")
    device: str = option("cpu", device, "Device: cpu, cuda or cuda:1.")
    trust: bool = _trust_option()


# Options of publish that only some programs have.
FOR_PROGRAMS = {
    "precision": tuple(one for one in PROGRAMS if one != "huggingface"),
    "image_size": tuple(one for one in PROGRAMS if one != "huggingface"),
    "engine": ("triton", "deepstream", "epcontext"),
    "batch": ("triton", "deepstream"),
    "no_logits": ("triton", "openvino-model-server"),
    "ir": ("openvino-model-server",),
    "embed_engine": ("epcontext",),
    "onnxruntime_web": ("web",),
}


@dataclass(frozen=True)
class PublishSpec(Spec):
    """Options of `swin_deploy.publish` and `swin-deploy publish`."""

    _: KW_ONLY
    target: str = option(MISSING, parse.choice("target", PROGRAMS), "Program to write files for.", flags=("--for",))
    output: PathLike = option(
        MISSING, parse.path, "Folder to write. It must be new or empty.", flags=("-o", "--output"), metavar="DIR"
    )
    precision: str | None = option(
        None, parse.choice("precision", PRECISIONS), "Precision of the graph or the engine. Default: fp32; for engines, any."
    )
    image_size: Any = option(
        None, parse.image_size, "Height and width of the images in pixels. Default: the first image size of the bundle."
    )
    engine: str | None = option(
        None,
        parse.text,
        "Engine of the bundle, such as engines/NAME.engine. triton, deepstream: instead of a graph; epcontext: one of several.",
        metavar="FILE",
    )
    batch: int | None = option(
        None, parse.whole(1, 4096), "Largest batch. Default: that of the engine; for graphs, 8 (triton) or 1 (deepstream)."
    )
    no_logits: bool = option(
        False,
        parse.flag,
        "Leave the logits out of a graph that has other outputs (export --embed-postprocess). triton, openvino-model-server.",
    )
    ir: bool = option(False, parse.flag, "Write OpenVINO IR instead of ONNX. openvino-model-server only.")
    embed_engine: bool = option(False, parse.flag, "Put the engine into the ONNX file. epcontext only.")
    onnxruntime_web: PathLike | None = option(
        None,
        parse.path,
        "Folder of the npm package onnxruntime-web. Default: in node_modules of the current directory or above. web only.",
        metavar="DIR",
    )

    def check(self) -> None:
        for name, programs in FOR_PROGRAMS.items():
            if getattr(self, name) not in (None, False) and self.target not in programs:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is for {', '.join(programs)}, not for {self.target}. Leave out {flag}.")


@dataclass(frozen=True)
class RefitSpec(Spec):
    """Options of `swin_deploy.refit` and `swin-deploy refit`."""

    _: KW_ONLY
    trust: bool = _trust_option()


@dataclass(frozen=True)
class EvaluateSpec(Spec):
    """Options of `swin_deploy.evaluate` and `swin-deploy evaluate`."""

    data: Any = option(
        MISSING, parse.images, "Images, with or without labels: a folder, or an .npz or .npy file. In Python also any iterable."
    )
    _: KW_ONLY
    labels: PathLike | None = _image_labels_option()
    ignore_labels: bool = option(False, parse.flag, "Compare with fp32 only, even if the images have labels.")
    threshold: float = option(
        0.5, parse.number(0), "Score above which a label is predicted, if an image may have several.", metavar="SCORE"
    )
    on_error: str = _on_error_option()
    samples: int | None = option(None, parse.whole(1), "Number of images to use, evenly spaced, the same number per class.")
    batch: int = option(8, parse.whole(1), "Images to run at a time.")
    precisions: Any = option(
        (),
        parse.texts,
        "Precision to evaluate besides fp32. Default: every graph of the bundle.",
        flags=("--precision",),
        choices=PRECISIONS,
        many=True,
    )
    backend: str = option("onnxruntime", parse.choice("back end", BACKEND_NAMES), "Back end to run the graphs or engines.")
    weights: PathLike | None = option(
        None,
        parse.location,
        "The exported checkpoint: a folder, a file, or a hub id. The reference is then PyTorch, not the fp32 graph.",
        metavar="PATH|ID",
    )
    trust: bool = _trust_option()
    progress: Progress = progress_option()

    def check(self) -> None:
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise unknown("precision", precision, PRECISIONS)


@dataclass(frozen=True)
class DiffSpec(Spec):
    """Options of `swin_deploy.diff` and `swin-deploy diff`."""

    b: Any = option(
        MISSING, parse.location, "The network to check: a bundle, an ONNX file, or a checkpoint, named as the first.", flags=()
    )
    _: KW_ONLY
    data: Any = option(
        None, parse.images, "Images to run. Default: the reference inputs of the first bundle, or noise if neither is a bundle."
    )
    samples: int | None = option(None, parse.whole(1), "Number of images to run. Default: 2.")
    polygraphy: PathLike | None = option(
        None, parse.path, "Folder for the inputs and the outputs of both networks, as Polygraphy reads them.", metavar="DIR"
    )
    progress: Progress = progress_option()


@dataclass(frozen=True)
class DebugSpec(Spec):
    """Options of `swin_deploy.debug` and `swin-deploy debug`."""

    data: Any = option(
        MISSING,
        parse.images,
        "Images like those of the application: a folder, or an .npz or .npy file. In Python also any iterable.",
    )
    _: KW_ONLY
    precision: str = option("int8", parse.choice("quantized precision", QUANTIZED), "Type of the quantized layers.")
    target: str | None = option(
        None, parse.choice("target", TARGETS), "Runtime to quantize for. Default: the one that the bundle was exported for."
    )
    bound: float = option(0.02, parse.number(0), "Largest accepted relative L2 distance from fp32.", metavar="X")
    samples: int | None = option(None, parse.whole(1), "Number of images to use, evenly spaced.")
    output: PathLike | None = option(
        None, parse.path, "ONNX file to write with these layers put back.", flags=("-o", "--output"), metavar="FILE"
    )
    progress: Progress = progress_option()


@dataclass(frozen=True)
class InspectSpec(Spec):
    """Options of `swin_deploy.inspect` and `swin-deploy inspect`."""

    _: KW_ONLY
    gpu: str | None = option(
        None,
        parse.text,
        "GPU of the roofline, such as rtx-4090 or sm_89. An ONNX file is compiled for it. Default: the engine's GPU; for an "
        "ONNX file, this machine's GPU, else sm_89.",
        metavar="NAME",
    )
    batch: int = option(1, parse.whole(1), "Batch size to compile an ONNX file for.")
    backend: str = option("auto", parse.choice("compiler", ("auto", *COMPILERS)), "TensorRT compiler for an ONNX file.")
    trex: PathLike | None = option(
        None, parse.path, "Folder for the layers of the engines of a bundle, as NVIDIA's TREx reads them.", metavar="DIR"
    )
    progress: Progress = progress_option()


@dataclass(frozen=True)
class ReportSpec(Spec):
    """Options of `swin_deploy.report` and `swin-deploy report`."""

    _: KW_ONLY
    output: PathLike = option(MISSING, parse.path, "HTML file to write.", flags=("-o", "--output"), metavar="FILE")
    data: Any = option(
        None,
        parse.images,
        "Images to show with their labels and attention, and to compare the graphs on: a folder, or an .npz or .npy file.",
    )
    samples: int = option(
        16,
        parse.whole(1),
        "Number of images to use from the data, evenly spaced, the same number per class. The first are shown.",
    )
    labels: PathLike | None = _image_labels_option()
    ignore_labels: bool = option(False, parse.flag, "Compare with fp32 only, even if the images have labels.")
    verify: Any = option(
        (),
        parse.many(parse.choice("back end", BACKEND_NAMES)),
        "Back end to run `verify` with now. Default: show the verdicts that the manifest has.",
        metavar="NAME",
        many=True,
    )
    evaluation: PathLike | None = option(
        None,
        parse.path,
        "Output of `evaluate --json`, such as of a validation set. Default: evaluate on the data.",
        metavar="FILE",
    )
    bench: PathLike | None = option(None, parse.path, "Output of `bench --json` to show.", metavar="FILE")
    gpu: str | None = option(
        None, parse.text, "GPU of the roofline, such as rtx-4090 or sm_89. Default: the engine's GPU.", metavar="NAME"
    )
    force: bool = option(False, parse.flag, "Replace an existing file.")
    trust: bool = _trust_option()
    progress: Progress = progress_option()

    def check(self) -> None:
        if self.data is None and (self.labels is not None or self.ignore_labels):
            raise UsageError("--labels and --ignore-labels are about the images of --data. Pass --data.")


@dataclass(frozen=True)
class BenchSpec(Spec):
    """Options of `swin-deploy bench`."""

    _: KW_ONLY
    backends: Any = option(
        (),
        parse.many(parse.choice("back end", BACKEND_NAMES)),
        "Back end to measure. Default: all that are installed, except torch.",
        flags=("--backend",),
        metavar="NAME",
        many=True,
    )
    precisions: Any = option(
        (),
        parse.many(parse.choice("precision", PRECISIONS)),
        "Precision to measure. Default: all that the bundle and the back end have.",
        flags=("--precision",),
        metavar="NAME",
        many=True,
    )
    batches: Any = option(
        (), parse.many(parse.whole(1)), "Batch size to measure. Default: 1 and 8.", flags=("--batch",), metavar="N", many=True
    )
    latency_ms: float | None = option(
        None,
        parse.number(0.001),
        "Find and measure the largest batch up to 256 of each candidate whose median time is within N milliseconds.",
        metavar="N",
    )
    device: str = option("auto", device, "Device: cpu, cuda or cuda:1. auto: the CPU and the first GPU.")
    weights: str | None = option(
        None, parse.location, "The exported checkpoint. PyTorch runs it as the reference.", metavar="PATH|ID"
    )
    baselines: bool = option(
        False, parse.flag, "Add the ONNX exports of transformers and timm, if they are installed.", hidden_flags=("--peers",)
    )
    threads: int = option(0, parse.whole(0, MOST_THREADS), "CPU threads. 0: the back end chooses.")
    seconds: float = option(6.0, parse.number(0.1, 86_400), "Seconds to measure each candidate, over all rounds.", metavar="S")
    rounds: int = option(10, parse.whole(1), "Measurement rounds; candidates are interleaved within each.")
    trust: bool = _trust_option()
    progress: Progress = progress_option()

    def check(self) -> None:
        if self.latency_ms is not None and (self.batches or self.baselines):
            raise UsageError(
                "--latency-ms finds a batch for each candidate, and baselines are exported for one batch. Leave out --batch "
                "and --baselines, or --latency-ms."
            )
