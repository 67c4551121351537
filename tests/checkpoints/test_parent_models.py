"""Models with a Swin inside: their encoders, exported from a checkpoint of the whole model, give the outputs that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from checkpoint_cases import DATA, state_dict
from detector_swin import DetectorSwin, renamed
from torch import Tensor, nn

import swin_deploy
from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints import Checkpoint, checkpoint_from_path
from swin_deploy.models.checkpoints.parent_models import parent_from_config
from swin_deploy.models.checkpoints.recognise import recognise_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import ExportSpec

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 2, "image_size": 64}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
LAST = {"out_features": STAGES[1:]}
FOUR = {"out_features": STAGES}
SIZES = ((64, 64), (52, 76), (96, 64))  # three of images: one not a multiple of window and patch, one not square
LIMIT = 2e-6  # relative L2 of an output
TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_queries": 3,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
GROUNDING = {**DETR, "decoder_layers": 2, "text_config": tf.BertConfig(**TEXT), "num_feature_levels": 4}
MASK = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 8, "dim_feedforward": 8,
        "encoder_layers": 1, "decoder_layers": 2, "num_queries": 3, "num_attention_heads": 2}  # fmt: skip


def v1(**more: Any) -> Any:
    return tf.SwinConfig(**SMALL | more)


def v2(**more: Any) -> Any:
    return tf.Swinv2Config(**SMALL | more)


def maskformer() -> Any:
    decoder = tf.DetrConfig(**DETR, backbone_config=v1())
    backbone = tf.MaskFormerSwinConfig(**SMALL | FOUR)
    return tf.MaskFormerForInstanceSegmentation(
        tf.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32)
    )


def oneformer() -> Any:
    sizes = {"hidden_dim": 32, "conv_dim": 32, "mask_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 3}
    text = {"text_encoder_width": 8, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 20}
    return tf.OneFormerForUniversalSegmentation(
        tf.OneFormerConfig(
            backbone_config=v1(**FOUR), **sizes, **text, num_attention_heads=2, dim_feedforward=8, encoder_feedforward_dim=8
        )
    )


def dpt() -> Any:
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": []}
    return tf.DPTForDepthEstimation(tf.DPTConfig(backbone_config=v2(**FOUR), **sizes))


def upernet(backbone: Any) -> Any:
    sizes = {"hidden_size": 8, "auxiliary_in_channels": 32, "auxiliary_channels": 8}
    return tf.UperNetForSemanticSegmentation(tf.UperNetConfig(backbone_config=backbone, **sizes))


def omdet() -> Any:
    text = tf.CLIPTextConfig(**TEXT, projection_dim=8, max_position_embeddings=8)
    sizes = {"encoder_in_channels": [16, 32, 64], "vision_features_channels": [16] * 3, "encoder_hidden_dim": 16,
             "decoder_hidden_dim": 16, "encoder_dim_feedforward": 8, "decoder_dim_feedforward": 8, "decoder_num_layers": 1,
             "text_projection_in_dim": 8, "text_projection_out_dim": 8, "class_embed_dim": 8, "task_encoder_hidden_dim": 8,
             "num_queries": 3}  # fmt: skip
    return tf.OmDetTurboForObjectDetection(tf.OmDetTurboConfig(text_config=text, backbone_config=v1(**LAST), **sizes))


def reader(encoder: Any) -> Any:
    decoder = tf.MBartConfig(vocab_size=20, d_model=16, decoder_layers=1, decoder_ffn_dim=8, decoder_attention_heads=2)
    return tf.VisionEncoderDecoderModel(tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))


def dual() -> Any:
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(v1(), tf.BertConfig(**TEXT), projection_dim=8)
    return tf.VisionTextDualEncoderModel(config)


def donut(**more: Any) -> Any:
    return tf.DonutSwinConfig(**SMALL | {"image_size": (64, 96)} | more)


# Family -> the whole model, and where it has its encoder.
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "Mask2Former": (
        lambda: tf.Mask2FormerForUniversalSegmentation(tf.Mask2FormerConfig(backbone_config=v1(**FOUR), **MASK)),
        "model.pixel_level_module.encoder",
    ),
    "MaskFormer": (maskformer, "model.pixel_level_module.encoder"),
    "OneFormer": (oneformer, "model.pixel_level_module.encoder"),
    "UperNet": (lambda: upernet(v1(**FOUR)), "backbone"),
    "UperNet, V2": (lambda: upernet(v2(**FOUR)), "backbone"),
    "DPT, V2": (dpt, "backbone"),
    "Grounding DINO": (
        lambda: tf.GroundingDinoForObjectDetection(tf.GroundingDinoConfig(backbone_config=v1(**LAST), **GROUNDING)),
        "model.backbone.conv_encoder.model",
    ),
    "MM Grounding DINO": (
        lambda: tf.MMGroundingDinoForObjectDetection(tf.MMGroundingDinoConfig(backbone_config=v1(**LAST), **GROUNDING)),
        "model.backbone.conv_encoder.model",
    ),
    "OmDet-Turbo": (omdet, "vision_backbone.vision_backbone"),
    "DETR": (
        lambda: tf.DetrForObjectDetection(tf.DetrConfig(backbone_config=v1(out_indices=[4]), **DETR)),
        "model.backbone.model",
    ),
    "Deformable DETR": (
        lambda: tf.DeformableDetrForObjectDetection(
            tf.DeformableDetrConfig(backbone_config=v1(out_indices=[2, 4]), **DETR | {"decoder_layers": 2})
        ),
        "model.backbone.model",
    ),
    "VisionEncoderDecoder": (lambda: reader(v1()), "encoder"),
    "VisionEncoderDecoder, V2": (lambda: reader(v2()), "encoder"),
    "VisionTextDualEncoder": (dual, "vision_model"),
    "Donut": (lambda: reader(donut()), "encoder"),
    "DonutSwinForImageClassification": (lambda: tf.DonutSwinForImageClassification(donut(num_labels=3)), ""),
}


def randomized(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


def opened(path: Path) -> Checkpoint:
    return checkpoint_from_path(path, ExportSpec(weights=path).task_spec)


def outputs(result: Any) -> dict[str, Tensor]:
    """The outputs of a model of transformers, under the names of the graph."""
    if "feature_maps" in result:
        return {f"feature_maps.{i}": tensor for i, tensor in enumerate(result.feature_maps)}
    return {name: result[name] for name in ("last_hidden_state", "pooler_output", "logits") if name in result}


def worst(checkpoint: Checkpoint, expected: Callable[[Tensor], dict[str, Tensor]], sizes: Any = SIZES) -> float:
    """The largest relative L2 of an output, over three sizes of images."""
    found = []
    for size in sizes:
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[1]))
        with torch.no_grad():
            theirs = expected(pixels)
            ours = SwinNetwork(checkpoint.config, size, checkpoint.tensors, checkpoint.task).named(pixels)
        assert list(ours) == list(theirs)
        found += [float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs]
    return max(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_of_transformers(family: str, tmp_path: Path) -> None:
    build, where = FAMILIES[family]
    model = randomized(build())
    model.save_pretrained(tmp_path)
    checkpoint = opened(tmp_path)
    encoder = model.get_submodule(where)
    assert checkpoint.parent == (type(model).__name__ if where else "")
    figure = worst(checkpoint, lambda pixels: outputs(encoder(pixels)))
    assert figure <= LIMIT


@pytest.mark.parametrize("name", ["donut", "maskformer"])
def test_recorded_outputs(name: str) -> None:
    """Encoders of checkpoints from elsewhere, with the outputs that transformers computed for two sizes of images."""
    folder = DATA.parent / "nested" / name
    checkpoint, recorded = opened(folder), np.load(folder / "reference.npz")
    for key in [key for key in recorded if key.endswith("/pixel_values")]:
        size, pixels = key.partition("/")[0], torch.from_numpy(recorded[key])
        with torch.no_grad():
            found = SwinNetwork(checkpoint.config, tuple(pixels.shape[2:]), checkpoint.tensors, checkpoint.task).named(pixels)
        wanted = [one for one in recorded if one.startswith(f"{size}/") and one != key]
        assert wanted
        for one in wanted:
            expected = torch.from_numpy(recorded[one])
            assert (found[one.partition("/")[2]] - expected).norm() <= LIMIT * expected.norm(), one


def test_the_encoder_inside_its_model(tmp_path: Path) -> None:
    """The whole model calls its encoder with the pixels alone, and reads what the graph returns."""
    model = randomized(FAMILIES["Mask2Former"][0]())
    model.save_pretrained(tmp_path)
    seen: list[Any] = []
    model.model.pixel_level_module.encoder.register_forward_hook(lambda module, inputs, result: seen.append(result))

    def inside(pixels: Tensor) -> dict[str, Tensor]:
        model(pixel_values=pixels)
        return outputs(seen[-1])

    assert worst(opened(tmp_path), inside, SIZES[:1]) <= LIMIT


def test_a_maskformer_of_transformers_before_its_own_swin(tmp_path: Path) -> None:
    """Its config says "swin", and the model replaces that, with the maps of every stage."""
    model = randomized(maskformer())
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["backbone_config"] |= {"model_type": "swin", "out_features": ["stage4"], "out_indices": [4]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert worst(opened(tmp_path), lambda x: outputs(model.model.pixel_level_module.encoder(x)), SIZES[1:2]) <= LIMIT


@pytest.mark.parametrize("family", ["MaskFormer", "OneFormer", "Grounding DINO", "DETR", "Donut", "VisionTextDualEncoder"])
def test_weights_alone(family: str, tmp_path: Path) -> None:
    """Without a config of the Swin, and with the names of the modules in memory, which are not those of save_pretrained."""
    build, where = FAMILIES[family]
    model = randomized(build())
    torch.save(model.state_dict(), tmp_path / "a.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "backbone_config": None}))
    encoder = model.get_submodule(where)
    assert worst(opened(tmp_path), lambda x: outputs(encoder(x)), SIZES[1:2]) <= LIMIT


def test_a_bundle_has_the_outputs_and_the_images_of_the_model(tmp_path: Path) -> None:
    backbone = v1(depths=[1], num_heads=[1], image_size=32, out_indices=[0, 1])
    model = randomized(tf.DetrForObjectDetection(tf.DetrConfig(backbone_config=backbone, **DETR)))
    model.save_pretrained(tmp_path)
    processor = {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 24, "longest_edge": 40}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    bundle = swin_deploy.export(weights=tmp_path, output=tmp_path / "b")
    assert (
        bundle.preprocessor.to_dict()["pad_size"]
        == {"height": 24, "width": 40}
        == dict(zip(("height", "width"), bundle.image_size, strict=True))
    )
    assert json.loads((tmp_path / "b/preprocessor_config.json").read_text())["image_processor_type"] == "DetrImageProcessor"
    assert "Swin encoder of DetrForObjectDetection" in bundle.manifest.notes[0]
    with swin_deploy.load(bundle.path, backend="onnxruntime") as encoder:
        pixels = encoder.preparation(np.zeros((30, 40, 3), np.uint8))
        found = encoder.run({"pixel_values": pixels})
    with torch.no_grad():
        wanted = outputs(model.model.backbone.model(torch.from_numpy(pixels)))
    for name, tensor in wanted.items():
        assert np.linalg.norm(found[name] - tensor.numpy()) <= LIMIT * float(tensor.norm())


def test_only_the_encoder_is_read_from_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(upernet(v1(**FOUR)))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read: list[int] = []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *given, **more: read.append(given[2]) or fromfile(*given, **more))
    checkpoint = opened(tmp_path)
    assert not read
    size = sum(checkpoint.tensors[name].nbytes for name in checkpoint.tensors)
    assert sum(read) == size < sum(tensor.nbytes for tensor in model.state_dict().values())


OMDET = {"always_partition": True, "img_size": 640, "out_indices": [1, 2, 3]}
TIMM = {"architecture": "swin_tiny_patch4_window7_224", "num_classes": 0}
LAST_OF_TIMM = ("stage2", "stage3", "stage4")


@pytest.mark.parametrize(
    ("raw", "timm", "features"),
    [
        ({"backbone": TIMM["architecture"], "backbone_config": None, "use_timm_backbone": True, "backbone_kwargs": OMDET},
         {**TIMM, "model_args": {"img_size": 640, "always_partition": True}}, LAST_OF_TIMM),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": TIMM["architecture"], "num_channels": 1, **OMDET}},
         {**TIMM, "model_args": {"img_size": 640, "always_partition": True, "in_chans": 1}}, LAST_OF_TIMM),
        ({"encoder_name": f"tu-{TIMM['architecture']}", "_model_class": "Unet", "in_channels": 4},
         {**TIMM, "model_args": {"in_chans": 4}}, ()),
    ],
)  # fmt: skip
def test_configs_that_name_a_network_of_timm(raw: dict[str, Any], timm: dict[str, Any], features: tuple[str, ...]) -> None:
    found = parent_from_config({"model_type": "omdet-turbo", **raw})
    assert found is not None
    assert (found.task, found.timm, found.out_features) == ("backbone", timm, features)


def test_configs_that_name_a_checkpoint_of_the_hub() -> None:
    raw = {"backbone": "microsoft/swin-tiny-patch4-window7-224", "backbone_kwargs": {"out_indices": [2, 4]}}
    found = parent_from_config({"model_type": "mask2former", **raw})
    assert found is not None
    config = SwinConfig.from_dict(found.config or {})
    assert (config.embed_dim, config.out_features) == (96, ("stage2", "stage4"))
    for other in ({"backbone": "resnet50"}, {"backbone_config": {"model_type": "swin2sr"}}, {"backbone": "swinv2_cr_tiny_224"}):
        assert parent_from_config({"model_type": "detr", **other}) is None


# Files without a config.json: network, its prefix in the file, another tensor of the file, what has both. The networks are
# detector_swin.py's, after the published sources.
FILES: dict[str, tuple[DetectorSwin, str, str, str]] = {
    "mmdetection": (DetectorSwin((0, 1, 2)), "backbone.", "roi_head.bbox_head.fc_cls.weight", "a detector"),
    "mmsegmentation": (DetectorSwin((0, 1, 2)), "backbone.", "decode_head.conv_seg.weight", "a segmentation network"),
    "mmdetection, some stages": (DetectorSwin((1, 2)), "backbone.", "bbox_head.cls.weight", "a detector"),
    "Microsoft's detectors": (DetectorSwin((0, 1, 2), unfold=False), "backbone.", "rpn_head.rpn_cls.weight", "a detector"),
    "Mask2Former of detectron2": (
        DetectorSwin((0, 1, 2), unfold=False), "backbone.", "sem_seg_head.predictor.weight", "MaskFormer or Mask2Former"
    ),
    "Grounding DINO": (
        DetectorSwin((1, 2), unfold=False), "module.backbone.0.", "module.input_proj.0.0.weight", "a DETR or Grounding DINO"
    ),
    "BiRefNet": (DetectorSwin((0, 1, 2), unfold=False), "bb.", "squeeze_module.0.conv_in.weight", "BiRefNet"),
    "Swin V2 in a detector": (
        DetectorSwin((0, 2), version=2), "backbone.", "neck.conv.weight", "a detector or a segmentation network"
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FILES)
def test_encoders_in_files_without_a_config(family: str, tmp_path: Path) -> None:
    network, prefix, beside, parent = FILES[family]
    weights = randomized(network).state_dict()
    weights = weights if network.unfold else renamed(weights)
    content = {f"{prefix}{name}": tensor for name, tensor in weights.items()} | {beside: torch.ones(4, 3, 1, 1)}
    torch.save({"state_dict": content, "meta": {"epoch": 3}}, tmp_path / "a.pth")
    checkpoint = opened(tmp_path / "a.pth")
    assert (checkpoint.parent, checkpoint.config.always_partition) == (parent, True)
    figure = worst(checkpoint, lambda x: {f"feature_maps.{i}": tensor for i, tensor in enumerate(network(x))})
    assert figure <= LIMIT


@pytest.mark.parametrize("version", [1, 2])
def test_classifiers_of_mmpretrain(version: int, tmp_path: Path) -> None:
    network, head = randomized(DetectorSwin((2,), version, always=False)), nn.Linear(32, 5)
    content = {f"backbone.{name}": t for name, t in network.state_dict().items()}
    content |= {"head.fc.weight": head.weight, "head.fc.bias": head.bias}
    torch.save({"state_dict": content, "meta": {}}, tmp_path / "a.pth")
    checkpoint = checkpoint_from_path(tmp_path / "a.pth", ExportSpec(weights="a").task_spec, image_size=(64, 64))
    assert checkpoint.config.num_labels == 5
    assert worst(checkpoint, lambda x: {"logits": head(network(x)[0].mean((2, 3)))}, SIZES[::2]) <= LIMIT


def test_the_swin_of_a_tagger_gives_tokens(tmp_path: Path) -> None:
    """RAM has Microsoft's classifier without its head, with its masks, and a text model as tagging head."""
    case = "ms__SwinTransformer__strip_32x96"
    weights = {f"visual_encoder.{name}": tensor for name, tensor in state_dict(case).items() if not name.startswith("head.")}
    beside = {"tagging_head.encoder.layer.0.output.dense.weight": torch.ones(8, 8), "fc.weight": torch.ones(1, 8)}
    torch.save({"model": weights | beside}, tmp_path / "a.pth")
    found, plain = opened(tmp_path / "a.pth"), recognise_checkpoint(next((DATA / case).glob("*.pth")))
    assert (found.parent, found.task.name, found.config.image_size) == ("RAM or Tag2Text", "feature-extraction", (32, 96))
    assert all(torch.equal(found.tensors[name], plain.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize("named", [False, True])
def test_a_segmentation_network_with_an_encoder_of_timm(named: bool, tmp_path: Path) -> None:
    weights = torch.load(DATA / "timm__features_only/model.pth", weights_only=True)
    content = {f"encoder.model.{name}": tensor for name, tensor in weights.items()}
    torch.save(content | {"segmentation_head.0.weight": torch.ones(1, 8, 3, 3)}, tmp_path / "a.pth")
    if named:  # its config names an architecture with other sizes
        config = {"_model_class": "Unet", "encoder_name": "tu-swin_tiny_patch4_window7_224", "in_channels": 3}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"has shape .* but the config asks for"):
            opened(tmp_path)
        return
    found = opened(tmp_path / "a.pth")
    assert (found.parent, found.config.framework) == ("a segmentation network", "timm")
    assert found.config.out_features == ("stage1", "stage2")
