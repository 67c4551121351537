import numpy as np

ENVIRONMENTS = {"OpenCV 4": ["opencv-python-headless<5"], "OpenCV 5": ["opencv-python-headless>=5"]}


def logits(folder, pixels):
    import cv2

    network, found = cv2.dnn.readNetFromONNX(str(folder / "onnx/model.onnx")), []
    for image in pixels:
        network.setInput(image[None], "pixel_values")
        found.append(network.forward("logits").reshape(-1))
    return np.stack(found)
