"""Shared by the benchmarks: their options, measurement and tables."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from evolving_attention.commands import add_overwrite, check_output, positive

OURS = "ours"
LITERAL = "literal"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEBIBYTE = 2**20

Step = Callable[[], None]

# Otherwise the profiler announces each start and stop between the progress bars.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bfloat16 by autocast, on every side"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=11,
        help="timed calls of every side (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single time there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    add_overwrite(parser)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses and checks the options, and sets the threads and the seed."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device here")
    for name, value in vars(args).items():
        if isinstance(value, Path):
            try:
                check_output(value, args.overwrite)
            except OSError as error:
                parser.error(f"--{name}: {error}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = DTYPES[args.dtype]
    return torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32)


def training(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], args: argparse.Namespace
) -> Step:
    """A forward and backward pass; the optimiser, the same on every side, is left out."""
    model.train()

    def step() -> None:
        with autocast(args):
            value = loss(model)
        value.backward()
        model.zero_grad()  # a step leaves no memory for the next one to free

    return step


def inference(
    model: nn.Module, forward: Callable[[nn.Module], object], args: argparse.Namespace
) -> Step:
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with autocast(args):
            forward(model)

    return step


def peak_memory(step: Step, device: str) -> int:
    """The peak of the bytes that a step allocates, beyond those allocated before.

    On the CPU these are all bytes from torch's allocator: tensors and temporary buffers. The step
    must not free memory that an earlier call of this function allocated.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # The profiler sums by operator; the peak needs single events in their order.
    events = profiler.profiler.kineto_results.events()
    return max(accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(sides: dict[str, Step], rounds: int, device: str, title: str = "") -> dict[str, dict]:
    """Times and peak memory of all sides.

    The sides take turns, so that a slow phase of the machine affects all of them, and each round
    starts with another side, so that none always follows the same one.

    Returns:
        For every side ``{"seconds": [one for each round], "peak_bytes": int}``.
    """
    names = list(sides)
    results = {name: {"seconds": [], "peak_bytes": 0} for name in names}
    with tqdm(total=len(names) * (rounds + 1), desc=title) as progress:
        for name, step in sides.items():
            step()  # fills caches, chooses algorithms
            results[name]["peak_bytes"] = peak_memory(step, device)
            progress.update()
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                synchronize(device)
                start = time.perf_counter()
                sides[name]()
                synchronize(device)
                results[name]["seconds"].append(time.perf_counter() - start)
                progress.update()
    return results


def machine(device: str) -> str:
    """The machine and the versions of the software, in one line."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    packages = [sys.modules[name] for name in ("torch", "timm", "fairseq") if name in sys.modules]
    return ", ".join([name, *(f"{package.__name__} {package.__version__}" for package in packages)])


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Report:
    """Measures one setting after another, and prints and writes the results.

    Args:
        args: the options, see :func:`make_parser`.
        unit: of the data that a side processes ("images", "tokens"), for its speed.
    """

    def __init__(self, args: argparse.Namespace, unit: str) -> None:
        self.args = args
        self.unit = unit
        self.tables: list[dict] = []

    def measure(
        self, setting: str, sides: dict[str, Step], items: int, calls: int = 1
    ) -> dict[str, dict]:
        """Calls :func:`measure`, and keeps the result for the report.

        Args:
            setting: name of the setting; ratios are to the first of its sides.
            sides: among them :data:`OURS`.
            items: that a step processes, in the report's unit.
            calls: of the network in a step; the table gives the time of one.
        """
        results = measure(sides, self.args.rounds, self.args.device, setting)
        self.tables.append({"setting": setting, "items": items, "calls": calls, "sides": results})
        self.write()
        return results

    def write(self) -> None:
        """Writes the files; called after every setting, so that interrupted runs keep theirs."""
        if self.args.json:
            content = {
                "machine": machine(self.args.device),
                "options": vars(self.args),
                "unit": self.unit,
                "settings": self.tables,
            }
            text = json.dumps(content, indent=1, default=str)  # paths
            self.args.json.write_text(f"{text}\n", encoding="utf-8")
        if self.args.markdown:
            self.args.markdown.write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        rows = [
            "setting|side|ms|time ratio|memory, MiB|memory ratio"
            f"|{self.unit}/s|{OURS} / this, time|{OURS} / this, memory".split("|")
        ]
        rows.append(["---", "---"] + ["---:"] * (len(rows[0]) - 2))
        rows += [row for table in self.tables for row in table_rows(table)]
        return (
            f"{machine(self.args.device)}, {self.args.dtype}. Medians of {self.args.rounds} "
            "rounds. Ratios are to the first side of a setting, in the last two columns of "
            f"{OURS} to the row's side. Ratios of times are medians of each round's own, "
            "with the smallest and the largest. Memory is the peak within a step, beyond what is "
            "there before it (weights, inputs).\n\n"
            + "".join(f"| {' | '.join(row)} |\n" for row in rows)
        )

    def print(self) -> None:
        print(self.markdown(), end="")


def table_rows(table: dict) -> list[list[str]]:
    """The rows of one setting; see :meth:`Report.markdown`."""
    sides = table["sides"]
    first, ours = next(iter(sides.values())), sides[OURS]
    rows = []
    for name, side in sides.items():
        seconds = statistics.median(side["seconds"])
        rows.append(
            [
                table["setting"],
                name,
                f"{1000 * seconds / table['calls']:.4g}",
                ratio_of_times(side, first),
                f"{side['peak_bytes'] / MEBIBYTE:.4g}",
                ratio_of_memory(side, first),
                f"{table['items'] / seconds:.4g}",
                ratio_of_times(ours, side),
                ratio_of_memory(ours, side),
            ]
        )
    return rows


def ratio_of_times(side: dict, to: dict) -> str:
    if side is to:
        return "1"
    ratios = [x / y for x, y in zip(side["seconds"], to["seconds"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def ratio_of_memory(side: dict, to: dict) -> str:
    return "1" if side is to else f"{side['peak_bytes'] / to['peak_bytes']:.2f}"
