"""Names what a camera sees, frame by frame: python examples/camera.py BUNDLE SOURCE [--batch 1] [--backend auto]

SOURCE is a folder of images, in the order of their names, or a video file, where OpenCV (pip install opencv-python) is
installed to read it. Frames are read and prepared while the network computes; one that this is too slow for waits."""

import argparse
import os
import sys
import time
from pathlib import Path

import swin_deploy
from swin_deploy.errors import InputError, SwinDeployError, UsageError


def frames_of(source):
    """Paths of images, or uint8 arrays [height, width, 3] in RGB."""
    found = sorted(path for path in source.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".webp"))
    if found:
        yield from found
        return
    if source.is_dir() or not source.exists():
        raise InputError(f"{source} {'holds no image' if source.exists() else 'is not there'}. Give images or a video.")
    try:
        import cv2
    except ImportError as error:
        raise InputError(f"{source} is no folder, and OpenCV, which reads videos, is not installed. Give a folder.") from error
    video = cv2.VideoCapture(str(source))
    if not video.isOpened():
        raise InputError(f"{source} is neither a folder nor a video that OpenCV can read.")
    while (read := video.read())[0]:
        yield read[1][:, :, ::-1].copy()  # OpenCV's channels are blue, green, red


def main():
    parser = argparse.ArgumentParser(description="Names what a camera sees, frame by frame, with the time of each.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="frames that are run together")
    parser.add_argument("--backend", default="auto", help="onnxruntime, openvino, or the fastest here")
    given = parser.parse_args()
    with swin_deploy.load(given.bundle, backend=given.backend) as model:
        print(model.describe(), file=sys.stderr)
        if model.task.name != "image-classification":
            raise UsageError(f"{given.bundle} is for {model.task.name} and names nothing. Give one that classifies.")
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
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or nobody reads on
        os._exit(130)
