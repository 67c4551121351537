"""Classify the frames of a camera: python examples/camera.py BUNDLE SOURCE [--batch 1] [--backend auto]

SOURCE is a folder of images, read in the order of their names, or a video file, which needs OpenCV (pip install
opencv-python). Frames are read and prepared while the network computes."""

import argparse
import os
import sys
import time
from pathlib import Path

import swin_deploy
from swin_deploy.errors import InputError, SwinDeployError, UsageError


def frames_of(source):
    """Yield paths of images, or uint8 arrays [height, width, 3] in RGB."""
    found = sorted(path for path in source.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".webp"))
    if found:
        yield from found
        return
    if source.is_dir() or not source.exists():
        raise InputError(f"{source} {'has no images' if source.exists() else 'does not exist'}. Pass images or a video.")
    try:
        import cv2
    except ImportError as error:
        raise InputError(f"{source} is not a folder, and OpenCV for videos is not installed. Pass a folder.") from error
    video = cv2.VideoCapture(str(source))
    if not video.isOpened():
        raise InputError(f"{source} is not a video that OpenCV can read. Pass a folder or another video.")
    while (read := video.read())[0]:
        yield read[1][:, :, ::-1].copy()  # OpenCV's channels are blue, green, red


def main():
    parser = argparse.ArgumentParser(description="Classify the frames of a camera and print the time of each.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="frames per run")
    parser.add_argument("--backend", default="auto", help="onnxruntime, openvino, or auto for the fastest")
    given = parser.parse_args()
    with swin_deploy.load(given.bundle, backend=given.backend) as model:
        print(model.describe(), file=sys.stderr)
        if model.task.name != "image-classification":
            raise UsageError(f"{given.bundle} is for {model.task.name}. Pass a bundle for image classification.")
        model.warm_up(given.batch)
        before = time.perf_counter()
        for number, best in enumerate(model.stream(frames_of(given.source), batch=given.batch, top_k=1)):
            took, before = time.perf_counter() - before, time.perf_counter()
            print(f"{number:6d}  {best[0].score:7.2%}  {took * 1e3:8.2f} ms  {best[0].label}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except SwinDeployError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or stdout was closed
        os._exit(130)
