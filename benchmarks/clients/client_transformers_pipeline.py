"""The pipeline of transformers, which reads the labels and prepares the images, with optimum's ONNX Runtime models."""

from scored import rows

ENVIRONMENTS = {"transformers pipeline": ["torch", "pillow", "optimum[onnxruntime]", "transformers"]}


def scores(folder, images):
    from optimum.onnxruntime import ORTModelForImageClassification
    from transformers import AutoImageProcessor, pipeline

    network = ORTModelForImageClassification.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
    processor = AutoImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=network, image_processor=processor)
    return rows(folder, [classify(str(image), top_k=len(network.config.id2label)) for image in images])
