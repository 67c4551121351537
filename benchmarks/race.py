"""Race our graphs against the alternatives on this CPU: every network, batch size and type, each beside its limit.

    python benchmarks/race.py --work FOLDER                      # make what is missing, race, write tables and plot
    python benchmarks/race.py make --work FOLDER --minutes 10    # exports, INT8 graphs and compiled networks only
    python benchmarks/race.py run --work FOLDER --minutes 35     # race what has been made
    python benchmarks/race.py table                              # the tables and the plot again, from the kept results

Select with --networks, --batches, --types, --candidates. What is in FOLDER is not made again. A network, batch size and type
in benchmarks/results is not measured again, so an interrupted run continues. --again makes and measures what is selected.

Every candidate runs in a process of its own. Rounds are interleaved, and after some rounds all processes are started anew,
because a process can be 10 % faster or slower than another one with the same program. Each ratio compares a candidate with the
fp32 export of transformers in ONNX Runtime, for the same batch, in the same round. A candidate's distance is the relative L2
distance of its logits from PyTorch in fp64. It is comparable with ours if it is at most 1.5 times ours, or under 1e-5. The
limit is the time of the linear layers and attention products alone. Weights are random.

ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI simulates a processor without AMX and bf16, for OpenVINO and PyTorch. Its results have a
folder of their own.

NNCF, torchao and timm are installed into environments of their own in FOLDER. Needs the extras "export", "onnxruntime",
"openvino", "bench" and "test".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from race_candidates import (
    CANDIDATES,
    ENVIRONMENT_OF,
    NEEDS,
    NETWORKS,
    OWN_ENVIRONMENTS,
    REFERENCE,
    ROOT,
    TYPES,
    Candidate,
)  # fmt: skip

RESULTS = ROOT / "benchmarks/results"
RESTRICTED = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # OpenVINO and PyTorch obey it, ONNX Runtime does not
BATCHES = (1, 8, 4, 32)  # in the order of their importance
EXACT, COMPARABLE = 1e-5, 1.5  # see the text above
LEAD = 0.97  # of the ratio of the best comparable alternative
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino")
TEXT = {"fp32": "fp32", "bf16": "bf16", "int8": "INT8"}


@dataclass(frozen=True)
class Cell:
    """What is raced at once: a network, a batch size and a type."""

    network: str
    batch: int
    precision: str

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}, {TEXT[self.precision]}"

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.network}-{self.batch}-{self.precision}.json"


@dataclass
class Row:
    """What was measured of a candidate: milliseconds of each round, those of the reference, and the distance from fp64."""

    ms: list[float] = field(default_factory=list)
    reference_ms: list[float] = field(default_factory=list)
    distance: float | None = None
    failed: str = ""

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The lower quartile, median and upper quartile of the ratio to the reference in the same round."""
        low, middle, high = np.quantile(np.array(self.ms) / np.array(self.reference_ms), (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    def joined(self, later: Row) -> Row:
        """Return this row with the rounds of another process."""
        return Row(self.ms + later.ms, self.reference_ms + later.reference_ms, later.distance, later.failed)


Rows = Mapping[str, Row]


def comparable(name: str, rows: Rows) -> bool:
    """Whether a candidate is about as exact as the most exact of ours, or exact."""
    ours = [row.distance for other, row in rows.items() if CANDIDATES[other].ours and row.distance is not None]
    distance = rows[name].distance
    return distance is not None and distance <= max(EXACT, COMPARABLE * min(ours, default=np.inf))


@dataclass(frozen=True)
class Standing:
    """Ratios of the fastest of ours, the fastest comparable alternative of the same type, and the limit; None if absent."""

    ours: float | None
    best: float | None
    best_name: str
    limit: float | None

    @property
    def leads(self) -> bool | None:
        """Whether ours is at least 3 % ahead."""
        return None if self.ours is None or self.best is None else self.ours <= LEAD * self.best


def standing(cell: Cell, rows: Rows) -> Standing:
    """Compare ours with the alternatives of a cell."""
    ratios: dict[str, dict[str, float]] = {"ours": {}, "limit": {}, "other": {}}
    for name, row in rows.items():
        candidate = CANDIDATES[name]
        if row.ms and candidate.precision == cell.precision:
            kind = "ours" if candidate.ours else "limit" if candidate.limit else "other"
            if kind != "other" or comparable(name, rows):
                ratios[kind][name] = row.ratio[1]
    best = min(ratios["other"], key=ratios["other"].__getitem__, default="")
    smallest = {kind: min(found.values(), default=None) for kind, found in ratios.items()}
    return Standing(smallest["ours"], smallest["other"], best, smallest["limit"])


def names_of(cell: Cell, wanted: Sequence[str]) -> list[str]:
    """Return the candidates of a cell, the reference first."""
    asked = [n for n, c in CANDIDATES.items() if c.precision == cell.precision and any(n.startswith(part) for part in wanted)]
    return [REFERENCE, *(name for name in asked if name != REFERENCE)]


def read_rows(file: Path) -> dict[str, Row]:
    """Return the rows of a cell that are kept in a file; none if it does not exist."""
    if not file.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(file.read_text())["rows"].items() if name in CANDIDATES}


def missing(cell: Cell, kept: Rows, wanted: Sequence[str]) -> list[str]:
    """Return the candidates of a cell that have not been measured, without the reference; those that failed are tried again."""
    return [name for name in names_of(cell, wanted)[1:] if name not in kept or not kept[name].ms]


# Making what the candidates need


class Workshop:
    """The work folder: makes each artefact once, in the environment that it needs."""

    def __init__(self, folder: Path, pythons: Mapping[str, str | None], end: float) -> None:
        self.folder, self._pythons, self._end = folder.resolve(), dict(pythons), end

    def path(self, network: str, artefact: str, batch: int) -> Path:
        return self.folder / network / artefact.replace("BATCH", str(batch))

    def forget(self, network: str, candidate: Candidate, batch: int) -> None:
        """Make the artefact again, next time."""
        self._done(network, candidate.artefact, batch).unlink(missing_ok=True)

    def _done(self, network: str, artefact: str, batch: int) -> Path:
        path = self.path(network, artefact, batch)
        return path.with_name(f"{path.name}.made")

    def reason_against(self, network: str, artefact: str, batch: int, make: bool) -> str:
        """Make an artefact if necessary, and return why it is not there; empty if it is."""
        done = self._done(network, artefact, batch)
        if done.exists():
            return done.read_text()
        if not make or time.monotonic() > self._end:
            return "not made"
        before = NEEDS.get(artefact, "checkpoint")
        if before and (reason := self.reason_against(network, before, batch, make)):
            return reason
        done.parent.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        try:
            python = self._python(ENVIRONMENT_OF.get(artefact, ""))
            script = ROOT / "benchmarks/race_candidates.py"
            command = [python, str(script), artefact, network, str(self.folder / network), str(batch)]
            made = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            lines = [line.strip() for line in made.stderr.splitlines() if line.strip()]
            reason = "" if made.returncode == 0 else (lines[-1][:200] if lines else f"exit code {made.returncode}")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = " ".join(str(error).split())[:200]
        print(f"{network}: {done.stem}: {reason or 'made'} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        done.write_text(reason)
        return reason

    def _python(self, environment: str) -> str:
        """Return the Python of an environment, which is created if it does not exist."""
        if not environment:
            return sys.executable
        if given := self._pythons.get(environment):
            return given
        folder = self.folder / f"env-{environment}"
        python = folder / "bin/python"
        if not (folder / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            packages, beside = OWN_ENVIRONMENTS[environment]
            names = [name.format(openvino=version("openvino")) for name in packages]
            subprocess.run([str(python), "-m", "pip", "install", "-q", *(["--no-deps"] if beside else []), *names], check=True)
            if beside:
                here = [path for path in sys.path if path.endswith("site-packages")]
                where = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
                (where / "zz_beside.pth").write_text("\n".join(here) + "\n")
            (folder / "installed").touch()
        return str(python)


# Racing


def race(cell: Cell, names: Sequence[str], workshop: Workshop, seconds: float, rounds: int, end: float) -> dict[str, Row]:
    """Measure candidates, the reference first, as many at once as fit into memory."""
    from swin_deploy.machine import memory_sizes

    rows: dict[str, Row] = {name: Row() for name in names}
    waiting = list(names[1:])
    while waiting and time.monotonic() < end:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            racers: dict[str, Any] = {}

            def load(name: str, racers: dict[str, Any] = racers, stack: contextlib.ExitStack = stack) -> None:
                try:
                    racers[name] = stack.enter_context(racer(name, workshop.folder / cell.network, cell.batch))
                except Exception as error:  # noqa: BLE001 - a candidate that does not load is a cell of the table
                    rows[name].failed = str(error)[:200]

            load(REFERENCE)
            if REFERENCE not in racers:
                return rows
            while waiting:
                two, waiting = waiting[:2], waiting[2:]
                list(pool.map(load, two))
                free, largest = memory_sizes()[1], max(one.peak_memory for one in racers.values())
                if waiting and free is not None and free < 2.5 * largest:
                    break
            timed: dict[str, list[float]] = {name: [] for name in racers}
            order = list(racers)
            for turn in range(rounds):
                if turn >= 3 and time.monotonic() > end:
                    break
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    timed[name].append(float(np.median(racers[name].milliseconds(seconds))))
            for name, one in racers.items():
                if name == REFERENCE and rows[name].ms:
                    continue
                rows[name] = Row(timed[name], timed[REFERENCE], one.distance)
    return {name: row for name, row in rows.items() if row.ms or row.failed}


def racer(name: str, folder: Path, batch: int) -> Any:
    """Start the process of a candidate, and wait until it has run."""
    from swin_deploy.bench.worker import Process

    class Racer(Process):
        def __init__(self) -> None:
            code = "import race_candidates; race_candidates.serve()"
            super().__init__(f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); {code}")
            try:
                loaded = self.ask({"candidate": name, "folder": str(folder), "batch": batch})
            except BaseException:
                self.close()
                raise
            self.distance, self.peak_memory = loaded["distance"], loaded["peak_memory"]

        def milliseconds(self, seconds: float) -> list[float]:
            return list(self.ask({"seconds": seconds})["ms"])

    return Racer()


def keep(cell: Cell, rows: Rows, folder: Path) -> None:
    """Write the rows of a cell beside those that are there."""
    from swin_deploy.machine import this_machine

    file = cell.file(folder)
    every = {**read_rows(file), **rows}
    facts = {
        "machine": f"{this_machine()}, restricted to {RESTRICTED}" if RESTRICTED else str(this_machine()),
        "versions": {name: version(name) for name in PACKAGES} | {"swin-deploy": version("swin-deploy")},
        "date": time.strftime("%Y-%m-%d"),
        "rows": {name: rounded(vars(every[name])) for name in CANDIDATES if name in every},
    }
    folder.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(facts, indent=1) + "\n")
    scratch.replace(file)


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row, times to the microsecond."""
    return {key: [round(one, 3) for one in value] if isinstance(value, list) else value for key, value in row.items()}


def processor_folder() -> Path:
    """Return the folder of this kind of processor's results."""
    from swin_deploy.machine import this_machine

    machine = this_machine()
    kinds = [feature for feature in machine.features if feature.startswith(("AVX-512 VNNI", "AVX-512 bf16", "AMX", "i8mm"))]
    text = " ".join([re.sub(r"\(.*?\)|@.*", "", machine.processor), *kinds, f"{machine.usable_cores} cores", RESTRICTED])
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# Tables and plot


def cells_in(folder: Path) -> Iterator[tuple[Cell, dict[str, Row]]]:
    """Yield the cells that are kept in a folder, in the order of the tables."""
    for network in NETWORKS:
        for batch in sorted(BATCHES):
            for precision in TYPES:
                cell = Cell(network, batch, precision)
                if rows := read_rows(cell.file(folder)):
                    yield cell, rows


def table(folder: Path) -> str:
    """Return the tables of a processor as markdown: where we stand in each cell, then every row."""
    cells = list(cells_in(folder))
    if not cells:
        return ""
    facts = [json.loads(cell.file(folder).read_text()) for cell, _ in cells]
    texts = dict.fromkeys(
        f"{one['machine']}; {', '.join(f'{name} {number}' for name, number in one['versions'].items())}; {one['date']}"
        for one in facts
    )
    lines = [f"# {next(iter(texts)).partition(',')[0]}", "", *(f"{text}.  " for text in texts), "", *EXPLANATION, ""]
    lines += ["| network | batch | type | ours | best alternative | ours / it | limit | ours / limit |"]
    lines += ["|---|--:|---|--:|---|--:|--:|--:|"]
    for cell, rows in cells:
        found = standing(cell, rows)
        lead = f"{found.ours / found.best:.3f}{'' if found.leads else ' ✗'}" if found.ours and found.best else ""
        best = f"{found.best:.3f} ({CANDIDATES[found.best_name].title})" if found.best is not None else "none"
        far = f"{found.ours / found.limit:.2f}" if found.ours and found.limit else ""
        figures = (number(found.ours), best, lead, number(found.limit), far)
        lines.append(f"| {NETWORKS[cell.network]} | {cell.batch} | {TEXT[cell.precision]} | {' | '.join(figures)} |")
    for network, title in NETWORKS.items():
        for batch in sorted(BATCHES):
            here = [(cell, rows) for cell, rows in cells if (cell.network, cell.batch) == (network, batch)]
            if here:
                lines += ["", f"## {title}, batch {batch}", ""]
                lines += ["| type | candidate | median ms | ratio | quartiles | distance from fp64 | exactness |"]
                lines += ["|---|---|--:|--:|--:|--:|---|"]
                for cell, rows in here:
                    lines += rows_of(cell, rows)
    return "\n".join(lines) + "\n"


EXPLANATION = (
    "Ratio: time relative to the fp32 export of transformers in ONNX Runtime with the same batch size in the same round.",
    "The first table has the fastest of ours, and the fastest alternative of the same type that is comparable in exactness:",
    "its distance from PyTorch in fp64 is at most 1.5 times ours, or under 1e-5. ✗: ours is not 3 % ahead. The limit is the",
    "time of the linear layers and attention products alone, each in the fastest kernel of oneDNN or MKL.",
)


def rows_of(cell: Cell, rows: Rows) -> Iterator[str]:
    """Yield the lines of a cell, the fastest first."""
    shown = [name for name in rows if CANDIDATES[name].precision == cell.precision]
    for name in sorted(shown, key=lambda name: rows[name].ratio[1] if rows[name].ms else np.inf):
        row, candidate = rows[name], CANDIDATES[name]
        if not row.ms:
            yield f"| {TEXT[cell.precision]} | {candidate.title} | | | | | fails: {row.failed.replace('|', '/')} |"
            continue
        low, middle, high = row.ratio
        far = "" if row.distance is None else f"{row.distance:.1e}"
        exact = "" if candidate.limit else "comparable" if comparable(name, rows) else "less exact"
        times = f"{np.median(row.ms):.1f} | {middle:.3f} | {low:.3f} to {high:.3f}"
        yield f"| {TEXT[cell.precision]} | {candidate.title} | {times} | {far} | {exact} |"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plot(folder: Path) -> bytes:
    """Draw the ratios of every cell as SVG: ours, comparable and less exact alternatives, and the limit."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    from swin_deploy.plots import BLUE, GREY, RED

    cells = list(cells_in(folder))
    drawn = {
        "ours": ("o", BLUE, BLUE),
        "alternative": ("o", RED, RED),
        "less exact": ("o", "none", RED),
        "limit": ("d", "black", "black"),
    }
    points: dict[str, list[tuple[float, int]]] = {kind: [] for kind in drawn}
    for line, (cell, rows) in enumerate(cells):
        for name, row in rows.items():
            candidate = CANDIDATES[name]
            if row.ms and candidate.precision == cell.precision:
                exact = "alternative" if comparable(name, rows) else "less exact"
                kind = "ours" if candidate.ours else "limit" if candidate.limit else exact
                points[kind].append((row.ratio[1], line))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "swin-deploy", "font.size": 9}):
        figure = Figure(figsize=(9, 1.2 + 0.24 * len(cells)), layout="constrained")
        axes = figure.subplots()
        for kind, (marker, face, edge) in drawn.items():
            x, y = zip(*points[kind], strict=True) if points[kind] else ((), ())
            axes.scatter(x, y, s=28, marker=marker, facecolors=face, edgecolors=edge, label=kind)
        axes.set_yticks(
            range(len(cells)), [f"{NETWORKS[cell.network]}, {cell.batch}, {TEXT[cell.precision]}" for cell, _ in cells]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1.5)
        axes.set_xlabel("time relative to the fp32 export of transformers in ONNX Runtime")
        axes.grid(axis="x", color=GREY, linewidth=0.4)
        axes.legend(loc="lower right")
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def write_tables() -> None:
    """Write the table and the plot of every processor beside its results."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if text := table(folder):
            (folder / "README.md").write_text(text, encoding="utf-8")
            (folder / "race.svg").write_bytes(plot(folder))
            print(f"{folder / 'README.md'}\n{folder / 'race.svg'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=("all", "make", "run", "table"), default="all")
    parser.add_argument("--work", type=Path, default=ROOT / "build/race", help="folder of exports and environments")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, separated by commas")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="batch sizes, the most important first")
    parser.add_argument("--types", default=",".join(TYPES), help="fp32, bf16, int8")
    parser.add_argument("--candidates", default="", help="only candidates whose names start so (ours, eager, nncf); see --list")
    parser.add_argument("--list", action="store_true", help="list the names of the candidates")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each process")
    parser.add_argument("--processes", type=int, default=4, help="processes of each candidate, one after the other")
    parser.add_argument("--seconds", type=float, default=0.3, help="time of each candidate in a round; at least one call")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no cell, and make nothing, after this time")
    parser.add_argument("--again", action="store_true", help="make and measure the selected candidates again")
    for name in OWN_ENVIRONMENTS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"the Python of an environment that has {name}")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name}: {TEXT[one.precision]}, {one.title}" for name, one in CANDIDATES.items()))
        return 0
    if given.step != "table":
        follow(given)
    if given.step != "make":
        write_tables()
    return 0


def follow(given: argparse.Namespace) -> None:
    """Make and measure what is selected, one cell after the other."""
    end = time.monotonic() + 60 * given.minutes
    workshop = Workshop(given.work, {name: getattr(given, name) for name in OWN_ENVIRONMENTS}, end)
    wanted, results = given.candidates.split(","), processor_folder()
    cells = [
        Cell(network, int(batch), precision)
        for batch in given.batches.split(",")
        for network in given.networks.split(",")
        for precision in given.types.split(",")
    ]
    make, run = given.step != "run", given.step != "make"
    fresh: set[Path] = set()
    for cell in cells:
        kept = {} if given.again else read_rows(cell.file(results))
        names = missing(cell, kept, wanted)
        ready = []
        for name in [REFERENCE, *names]:
            candidate = CANDIDATES[name]
            path = workshop.path(cell.network, candidate.artefact, cell.batch)
            if given.again and make and path not in fresh and name in names:
                workshop.forget(cell.network, candidate, cell.batch)
            fresh.add(path)
            if reason := workshop.reason_against(cell.network, candidate.artefact, cell.batch, make):
                print(f"{cell}: {name} is left out: {reason}", file=sys.stderr)
            else:
                ready.append(name)
        if not run or ready[:1] != [REFERENCE] or len(ready) < 2:
            continue
        if time.monotonic() > end:
            print(f"{cell}: not measured, no time is left", file=sys.stderr)
            continue
        begun = time.monotonic()
        rows: dict[str, Row] = {}
        for _ in range(given.processes):
            for name, row in race(cell, ready, workshop, given.seconds, given.rounds, end + 60).items():
                rows[name] = rows[name].joined(row) if name in rows else row
        keep(cell, rows, results)
        print(f"{cell}: {len(rows)} candidates in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
