"""Put `swin-deploy serve` under load and under attack.

Run: python benchmarks/serve.py load|malformed|stalled|sigterm BUNDLE [IMAGE] [options]

`load` needs hey (https://github.com/rakyll/hey; `apt install hey`). It compares the service with `classify` on the same image,
and measures the latency at half of that rate. `malformed` sends requests that are wrong in one of many ways, made from a seed:
each must get a status of 4xx (or, for broken HTTP, at least a closed connection), and the memory must not grow. `stalled` keeps
connections open that send nothing, a part of a head, or a part of a body. `sigterm` ends the service under load, and counts the
requests that were sent and not answered.

Each prints a row of a markdown table.
"""

from __future__ import annotations

import argparse
import base64
import csv
import http.client
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.machine import processor_name, usable_cores

PHOTO = Path(__file__).resolve().parents[1] / "examples/photos/flower.jpg"
Head = dict[str, str]


class Service:
    """A running `swin-deploy serve`."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "swin_deploy", "serve", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2])

    def memory(self) -> float:
        """Return the resident memory in MB."""
        [line] = [line for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmRSS" in line]
        return int(line.split()[1]) / 1000

    def cpu(self) -> float:
        """Return the seconds of processor time that were used so far."""
        used = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")

    def ask(self, method: str, path: str, body: bytes | None, headers: Head) -> tuple[int, bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            link.request(method, path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.read()
        finally:
            link.close()


@contextmanager
def service(bundle: Path, *options: str) -> Iterator[Service]:
    running = Service(bundle, *options)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        if (code := running.process.wait()) != 0:
            sys.exit(f"The service ended with exit code {code}.")


def hey(url: str, image: Path, *options: str) -> tuple[list[float], Counter[int], float]:
    """Return the seconds of the answers, how often each status occurred, and answers per second."""
    if not shutil.which("hey"):
        sys.exit("hey is not installed. Run: apt install hey")
    command = ["hey", "-o", "csv", "-m", "POST", "-T", "image/jpeg", "-D", str(image), "-t", "60", *options, url]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    seconds = [float(row["response-time"]) for row in rows]
    lasted = max(float(row["offset"]) + float(row["response-time"]) for row in rows) if rows else time.perf_counter() - start
    return seconds, Counter(int(row["status-code"]) for row in rows), len(rows) / lasted


def percentiles(seconds: list[float]) -> str:
    found = statistics.quantiles(seconds, n=100, method="inclusive")
    return ", ".join(f"{1000 * found[place - 1]:.0f}" for place in (50, 95, 99))


def load(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        for number in range(args.images):
            (Path(place) / f"{number}{args.image.suffix}").symlink_to(args.image.resolve())
        before = os.times()
        done = swin_deploy.classify_dataset(
            args.bundle,
            place,
            output=Path(place) / "out.csv",
            workers=usable_cores(),
            backend=args.backend,
            precision=args.precision,
        )
        classify, after = done.images / done.seconds, os.times()
        cpu = 1000 * (sum(after[:4]) - sum(before[:4])) / done.images
    print("| | images/s | CPU ms/image | status | p50, p95, p99 ms |\n|---|---|---|---|---|")
    print(f"| `classify` | {classify:.1f} | {cpu:.1f} | | |", flush=True)
    with service(args.bundle, *args.serve) as running:
        hey(running.url, args.image, "-n", "32", "-c", "8")
        used = running.cpu()
        seconds, statuses, rate = hey(running.url, args.image, "-z", f"{args.seconds}s", "-c", str(args.clients))
        cpu = 1000 * (running.cpu() - used) / len(seconds)
        rates, name = f"{rate:.1f} ({rate / classify:.2f})", f"`serve`, {args.clients} clients"
        print(f"| {name} | {rates} | {cpu:.1f} | {dict(statuses)} | {percentiles(seconds)} |")
        half = ["-c", "8", "-q", f"{rate / 16:.3f}"]
        seconds, statuses, rate = hey(running.url, args.image, "-z", f"{args.seconds}s", *half)
        print(f"| `serve`, half of that rate | {rate:.1f} | | {dict(statuses)} | {percentiles(seconds)} |", flush=True)


def malformed_requests(
    seed: int, count: int, bundle: Bundle, photo: bytes
) -> Iterator[tuple[str, str, str, bytes | None, Head]]:
    """Yield the kind, the method, the path, the body and the headers of wrong requests."""
    make = random.Random(seed)
    infer = f"/v2/models/{bundle.name}/infer"
    graph = next(iter(bundle.graphs.values()))
    shape = [1, *(int(size) for size in graph.inputs[0].shape[1:])]
    few = {"name": "pixel_values", "datatype": "FP32", "shape": shape, "data": [0.5]}
    bomb = io.BytesIO()
    Image.new("L", (9000, 9000)).save(bomb, "PNG")
    odd: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", [], {}, [[]], [None], {"a": 1}, "\ud83d", -(2**63)]
    wrong_types = ["text/plain", "text/html", "application/xml", "video/mp4", "application/x-www-form-urlencoded", "a/b/c", ";"]
    jpeg = {"Content-Type": "image/jpeg"}
    as_json = {"Content-Type": "application/json"}

    def text() -> bytes:
        return make.randbytes(make.randrange(1, 300))

    def tensors() -> bytes:
        changed = {**few, make.choice(list(few)): make.choice(odd)}
        return json.dumps({"inputs": [changed, *([few] * make.randrange(2))]}).encode()

    kinds: dict[str, Any] = {
        "random bytes": lambda: ("POST", "/", b"\1" + text(), jpeg),
        "cut image": lambda: ("POST", "/", photo[: make.randrange(len(photo) // 2)], jpeg),
        "image bomb": lambda: ("POST", "/", bomb.getvalue(), {"Content-Type": "image/png"}),
        "content type": lambda: ("POST", "/", photo[:500], {"Content-Type": make.choice(wrong_types)}),
        "content encoding": lambda: ("POST", "/", photo, {**jpeg, "Content-Encoding": make.choice(["gzip", "br", "x"])}),
        "top_k": lambda: ("POST", f"/?top_k={make.choice(['0', '-1', 'x', '1e3', '9' * 40, '%00'])}", photo, jpeg),
        "form": lambda: (
            "POST",
            "/",
            text(),
            {"Content-Type": f"multipart/form-data; boundary={make.choice(['x', '', 'y' * 99])}"},
        ),
        "form without a file": lambda: (
            *(
                "POST",
                "/",
                b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + text().hex().encode() + b"\r\n--x--\r\n",
            ),
            {"Content-Type": "multipart/form-data; boundary=x"},
        ),
        "random JSON": lambda: ("POST", "/", json.dumps(make.choice(odd)).encode(), as_json),
        "broken JSON": lambda: (
            "POST",
            "/",
            b'{"inputs": ' + make.choice([b"NaN}", b'"', b"[" * 5000, text(), b"1e999}"]),
            as_json,
        ),
        "address": lambda: (
            "POST",
            "/",
            json.dumps({make.choice(["url", "inputs"]): "http://127.0.0.1/a.jpg"}).encode(),
            as_json,
        ),
        "base64": lambda: ("POST", "/", json.dumps({"inputs": base64.b64encode(text()).decode()}).encode(), as_json),
        "parameters": lambda: (
            *("POST", "/", json.dumps({"inputs": "AAAA", "parameters": make.choice([{"a": 1}, [1], "x", 1])}).encode()),
            as_json,
        ),
        "path": lambda: (make.choice(["GET", "POST"]), "/" + text().hex()[:40], None, {}),
        "method": lambda: (make.choice(["PUT", "DELETE", "PATCH", "TRACE"]), make.choice(["/", infer, "/metrics"]), None, {}),
        "model": lambda: ("POST", f"/v2/models/{text().hex()[:20]}/infer", b"{}", as_json),
        "tensors": lambda: ("POST", infer, tensors(), as_json),
        "tensor header": lambda: (
            *("POST", infer, tensors()),
            {"Inference-Header-Content-Length": make.choice(["-1", "x", "9" * 30, "0", "1"])},
        ),
        "large body": lambda: ("POST", "/", bytes(17 << 20), jpeg),
    }
    rare = {"image bomb": 0.05, "large body": 0.02}
    for kind in make.choices(list(kinds), [rare.get(kind, 1) for kind in kinds], k=count):
        yield kind, *kinds[kind]()


BROKEN = (
    b"hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\0 HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\0\1\0\1",
    b"POST / HTTP/1.1\r\n: x\r\n\r\n",
)


def malformed(args: argparse.Namespace) -> None:
    photo = args.image.read_bytes()
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    with service(args.bundle, *args.serve) as running:
        sizes = []
        for part in range(10):
            for kind, *request in malformed_requests(args.seed + part, args.count // 10, Bundle.open(args.bundle), photo):
                try:
                    status, body = running.ask(*request)  # type: ignore[arg-type]
                except OSError as error:  # closed while a large body was sent
                    statuses[type(error).__name__] += 1
                    if kind != "large body":
                        faults.append(f"{kind}: {error!r}")
                    continue
                statuses[str(status)] += 1
                if not 400 <= status < 500:
                    faults.append(f"{kind}: {status} {request[:2]} {body[:200]!r}")
            for content in BROKEN:
                with socket.create_connection(("127.0.0.1", running.port)) as link:
                    link.sendall(content)
                    link.shutdown(socket.SHUT_WR)
                    statuses["broken HTTP " + (link.recv(12)[9:12].decode() or "closed")] += 1
            sizes.append(running.memory())
        good = running.ask("POST", "/", photo, {"Content-Type": "image/jpeg"})[0]
    memory = f"{', '.join(f'{size:.0f}' for size in sizes)} MB"
    print(f"| {args.count} malformed | {dict(statuses)} | {memory} | then {good} | {len(faults)} faults |")
    print("\n".join(faults[:20]), file=sys.stderr)
    sys.exit(bool(faults) or good != 200)


def stalled(args: argparse.Namespace) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, args.count + 1000)), hard))
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n\r\n"
    with service(args.bundle, *args.serve) as running:
        before, memory = hey(running.url, args.image, "-n", "200", "-c", "4"), running.memory()
        links = []
        for number in range(args.count):
            links.append(socket.create_connection(("127.0.0.1", running.port)))
            links[-1].sendall((b"", b"POST / HT", head, head + b"\xff\xd8")[number % 4])
        after = hey(running.url, args.image, "-n", "200", "-c", "4")
        grown = running.memory() - memory
        for name, (seconds, statuses, rate) in (("without", before), (f"with {args.count} stalled", after)):
            print(f"| {name} | {rate:.1f} images/s | {dict(statuses)} | {percentiles(seconds)} ms |")
        print(f"| memory of them | {grown:.1f} MB | | |")
        for link in links:
            link.close()
    sys.exit(after[1].keys() != {200})


def sigterm(args: argparse.Namespace) -> None:
    photo, found = args.image.read_bytes(), Counter[str]()

    def client(port: int) -> None:
        """Send requests, on one connection if the service keeps it, until it refuses connections."""
        while True:
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                link.connect()
            except OSError:
                return
            try:
                while True:
                    link.request("POST", "/", photo, {"Content-Type": "image/jpeg"})
                    answer = link.getresponse()
                    answer.read()
                    found[str(answer.status)] += 1
                    if answer.will_close:
                        break
            except (OSError, http.client.HTTPException) as error:
                found[type(error).__name__] += 1
            finally:
                link.close()

    for number in range(args.count):
        running = Service(args.bundle, *args.serve)
        clients = [threading.Thread(target=client, args=(running.port,)) for _ in range(args.clients)]
        for thread in clients:
            thread.start()
        time.sleep(random.Random(args.seed + number).uniform(0.5, 3))
        running.process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join()
        found[f"exit code {running.process.wait()}"] += 1
    print(f"| {args.count} times SIGTERM, {args.clients} clients | {dict(found)} |")
    sys.exit(found.keys() != {"200", "exit code 0"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "malformed", "stalled", "sigterm"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path, nargs="?", default=PHOTO)
    parser.add_argument("--count", type=int, help="requests, connections or runs")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--images", type=int, default=1000, help="images of classify")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.serve = ("--backend", args.backend, "--precision", args.precision)
    defaults = {"malformed": 10_000, "stalled": 1000, "sigterm": 10}
    args.count = args.count or defaults.get(args.what)
    about = Bundle.open(args.bundle)
    print(f"{processor_name()}, {usable_cores()} cores; {about.name}; {args.image.name}", file=sys.stderr)
    {"load": load, "malformed": malformed, "stalled": stalled, "sigterm": sigterm}[args.what](args)


if __name__ == "__main__":
    main()
