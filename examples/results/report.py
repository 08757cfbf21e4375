"""Makes the tables and plots of docs/results.md and the README's summary from the JSON files.

    python examples/results/report.py
    python examples/results/report.py --again FOLDER

The second compares the results in a folder that run.py wrote with `--out FOLDER` to these.

A paired difference is that of two runs with the same seed: one in a setting, one of the plain
model. Its interval is the 95 % confidence interval of Student's t distribution.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import matplotlib
import numpy as np
from experiment import ROOT, Experiment, Options
from experiments import EXPERIMENTS
from matplotlib.figure import Figure
from scipy.stats import t as student

RESULTS = Path(__file__).parent / "json"
COLORS = {"plain": "#000000", "evolving": "#D55E00"}


@dataclass
class Comparison:
    """A setting beside another one, such as the plain model, over the seeds that both have.

    Attributes:
        other, ours: means over the seeds.
        difference: mean of the paired differences, ours - other.
        error: standard error of that mean; None for a single pair.
        interval: the mean may be this far off with 95 % confidence; None for a single pair.
    """

    seeds: List[int]
    other: float
    ours: float
    difference: float
    error: Optional[float]
    interval: Optional[float]

    def verdict(self, lower_is_better: bool) -> str:
        """Better, worse or no clear difference; of a single pair, that it is one."""
        if self.interval is None:
            return "single pair"
        if not abs(self.difference) > self.interval:  # or NaN
            return "no clear difference"
        return "better" if (self.difference < 0) == lower_is_better else "worse"

    def text(self, digits: int) -> str:
        """The difference and its standard error."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.difference:+.{digits}f}{error}"


def read(folder: Path, experiment: Experiment) -> Dict[str, Dict[int, dict]]:
    """The results of an experiment by setting and seed.

    Raises:
        ValueError: a file was made with other options than the experiment now has.
    """
    found: Dict[str, Dict[int, dict]] = {}
    for setting, options in experiment.settings.items():
        for path in (folder / experiment.name).glob(f"{setting}-seed*.json"):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["options"] != options:
                raise ValueError(f"{path} has options {result['options']}, not {options}")
            found.setdefault(setting, {})[int(path.stem.rpartition("-seed")[2])] = result
    return found


def compare(other: Dict[int, dict], ours: Dict[int, dict], score: str) -> Optional[Comparison]:
    """The comparison by one score; None without a common seed."""
    seeds = sorted(other.keys() & ours.keys())
    if not seeds:
        return None
    before, after = ([side[seed]["scores"][score] for seed in seeds] for side in (other, ours))
    differences = np.subtract(after, before)
    error = interval = None
    if len(seeds) > 1:
        error = float(differences.std(ddof=1) / math.sqrt(len(seeds)))
        interval = float(student.ppf(0.975, len(seeds) - 1) * error)
    return Comparison(
        seeds,
        float(np.mean(before)),
        float(np.mean(after)),
        float(differences.mean()),
        error,
        interval,
    )


def reached(experiment: Experiment, plain: dict, ours: dict) -> Optional[float]:
    """The share of its updates after which `ours` has the last score of `plain`; None if never.

    Between the points of its learning curve, the score is interpolated.
    """
    sign = 1 if experiment.lower_is_better else -1
    goal = sign * plain["curve"][-1][1]
    last = ours["curve"][-1][0]
    before: Optional[Tuple[float, float]] = None
    for update, score in ours["curve"]:
        value = sign * score
        if value <= goal:
            if before is not None:
                start, higher = before
                update = start + (update - start) * (higher - goal) / (higher - value)
            return update / last
        before = update, value
    return None


def speed(experiment: Experiment, found: Dict[str, Dict[int, dict]]) -> str:
    """A sentence on how early evolving attention reaches what plain attention ends with."""
    plain, ours = found["plain"], found[experiment.default]
    seeds = sorted(plain.keys() & ours.keys())
    shares = [reached(experiment, plain[seed], ours[seed]) for seed in seeds]
    known = [share for share in shares if share is not None]
    score = experiment.scores[0].partition(",")[0]
    text = f"Evolving attention reaches the final {score} of plain attention "
    if known:
        share = f"{100 * np.mean(known):.0f} % of the updates"
        text += f"in {len(known)} of {count_pairs(seeds)}, on average after {share}."
    else:
        text += f"in none of {count_pairs(seeds)}."
    return text


def time_ratios(experiment: Experiment, folder: Path) -> Tuple[List[float], str]:
    """How many times as long as plain attention the default trains, by round; the processor.

    Raises:
        ValueError: the default was another one when the times were measured.
    """
    path = folder / f"{experiment.name}.json"
    if not path.exists():
        return [], ""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["setting"] != experiment.default:
        raise ValueError(
            f"{path} has times of {content['setting']}, not of {experiment.default}: delete it and "
            "measure them again with run.py --time"
        )
    ratios = [after / before for before, after in content["seconds"]]
    return ratios, content["machine"]["processor"]


def median_and_range(ratios: List[float]) -> str:
    """The median and the range, such as 1.05 (1.01 to 1.12); nothing if there are none."""
    if not ratios:
        return ""
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def cost(experiment: Experiment, folder: Path) -> List[str]:
    """What a training in the default setting costs, if that was measured."""
    ratios, processor = time_ratios(experiment, folder)
    if not ratios:
        return []
    return [
        f"Training takes {median_and_range(ratios)} times as long as with plain attention, the "
        f"median and the range of {len(ratios)} rounds on one thread of {processor}.",
        "",
    ]


def count_pairs(seeds: List[int]) -> str:
    return f"{len(seeds)} pair{'' if len(seeds) == 1 else 's'}"


def lower(experiment: Experiment, score: str) -> bool:
    return experiment.lower_is_better and score == experiment.scores[0]


def text_of(options: Options) -> str:
    """A setting in a cell of the table: "0.1, 0.1, 3", and what else there is."""
    named = ("alpha", "beta", "kernel_size")
    parts = [str(options.get(name, 3)) for name in named]
    for name, value in options.items():
        if name not in named:
            parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)


def table(experiment: Experiment, found: Dict[str, Dict[int, dict]]) -> List[str]:
    """One row per setting and score."""
    lines = [
        "| setting | \u03b1, β, kernel, ... | score | pairs | plain | this setting | difference "
        "± standard error | 95 % interval | verdict | vs `evolving` |",
        "|---|---|---|---:|---:|---:|---:|---|---|---:|",
    ]
    for setting, results in found.items():
        if setting == "plain":
            continue
        numbers = text_of(experiment.settings[setting])
        for score in experiment.scores:
            it = compare(found.get("plain", {}), results, score)
            if it is None:
                continue
            span, default = "", ""
            if it.interval is not None:
                low, high = it.difference - it.interval, it.difference + it.interval
                span = f"{low:+.3f} to {high:+.3f}"
            against = compare(found.get("evolving", {}), results, score)
            if against is not None and setting != "evolving":
                verdict = against.verdict(lower(experiment, score))
                clear = verdict in ("better", "worse")
                default = f"{against.text(3)}{f', {verdict}' if clear else ''}"
            lines.append(
                f"| {setting} | {numbers} | {score} | {len(it.seeds)} | {it.other:.3f} | "
                f"{it.ours:.3f} | {it.text(3)} | {span} | "
                f"{it.verdict(lower(experiment, score))} | {default} |"
            )
    return lines


def learned(found: Dict[str, Dict[int, dict]]) -> List[str]:
    """Where learned alpha and beta ended, a sentence per setting."""
    lines = []
    for setting, results in found.items():
        pairs = [pair for result in results.values() for pair in result.get("learned") or []]
        if pairs:
            alphas, betas = zip(*pairs, strict=True)
            lines += [
                f"In `{setting}`, the learned \u03b1 of the layers end between {min(alphas):.3f} "
                f"and {max(alphas):.3f}, β between {min(betas):.3f} and {max(betas):.3f}. "
                "Numbers below 0 act as 0.",
                "",
            ]
    return lines


def plot(experiment: Experiment, found: Dict[str, Dict[int, dict]], path: Path) -> None:
    """Learning curves of plain and evolving attention, and their paired difference.

    Lines are means over the pairs. The bands are the range of the curves, and the 95 % confidence
    interval of the difference.
    """
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes, beside = figure.subplots(1, 2, sharex=True)
    sides = {"plain": found["plain"], "evolving": found[experiment.default]}
    seeds = sorted(sides["plain"].keys() & sides["evolving"].keys())
    curves = {
        name: [dict(map(tuple, side[seed]["curve"])) for seed in seeds]
        for name, side in sides.items()
    }
    updates = sorted(set.intersection(*(set(curve) for side in curves.values() for curve in side)))
    values = {
        name: np.array([[curve[update] for update in updates] for curve in side])
        for name, side in curves.items()
    }
    for name, color in COLORS.items():
        low, high = values[name].min(axis=0), values[name].max(axis=0)
        axes.plot(updates, values[name].mean(axis=0), color=color, label=name)
        axes.fill_between(updates, low, high, color=color, alpha=0.15)
    axes.set_ylabel(experiment.scores[0])
    axes.legend()
    differences = values["evolving"] - values["plain"]
    mean = differences.mean(axis=0)
    beside.axhline(0, color=COLORS["plain"], linewidth=0.8)
    beside.plot(updates, mean, color=COLORS["evolving"])
    if len(seeds) > 1:
        error = differences.std(axis=0, ddof=1) / math.sqrt(len(seeds))
        span = student.ppf(0.975, len(seeds) - 1) * error
        beside.fill_between(updates, mean - span, mean + span, color=COLORS["evolving"], alpha=0.15)
    beside.set_ylabel("evolving - plain")
    figure.suptitle(count_pairs(seeds), fontsize=9)
    figure.supxlabel("updates", fontsize=9)
    # Without dates, so that the same results make the same file.
    figure.savefig(path, metadata={"Date": None})


def section(experiment: Experiment, found: Dict[str, Dict[int, dict]]) -> List[str]:
    """An experiment's part of the document."""
    machines = [x["machine"] for results in found.values() for x in results.values()]
    processors, versions = (
        " or ".join(sorted({machine[name] for machine in machines}))
        for name in ("processor", "torch")
    )
    plot_of = f"results-{experiment.name}.svg"
    return [
        f"## {experiment.title}",
        "",
        experiment.about,
        f"One thread of {processors}, torch {versions}.",
        "",
        "```bash",
        f"python examples/results/run.py {experiment.name} --data FOLDER --out again",
        "```",
        "",
        *table(experiment, found),
        "",
        *learned(found),
        speed(experiment, found),
        "",
        *cost(experiment, RESULTS),
        f"![{experiment.scores[0]} by updates, plain and evolving, and the paired difference with "
        f"its 95 % interval]({plot_of})",
        "",
    ]


def summary(experiment: Experiment, found: Dict[str, Dict[int, dict]]) -> List[str]:
    """An experiment's rows in the README's table, one per score that it shows there."""
    rows = []
    scores = experiment.scores[:1] if experiment.headline is None else experiment.headline
    options = experiment.settings[experiment.default]
    mixing = f"{options['alpha']}, {options['beta']}"
    time = median_and_range(time_ratios(experiment, RESULTS)[0])
    for score in scores:
        it = compare(found["plain"], found[experiment.default], score)
        assert it is not None
        lowers = lower(experiment, score)
        rows.append(
            f"| {'' if rows else experiment.title} | {score} {'↓' if lowers else '↑'} | {mixing} | "
            f"{it.other:.2f} | {it.ours:.2f} | {it.text(2)} | {len(it.seeds)} | "
            f"{it.verdict(lowers)} | {'' if rows else time} |"
        )
    return rows


def replace_between(text: str, marker: str, lines: List[str]) -> str:
    """The text with `lines` between <!-- marker --> and <!-- /marker -->."""
    start, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there must be {start.strip()} and {end} in the document")
    return pattern.sub(lambda _: start + "\n".join(lines) + "\n" + end, text)


def finished() -> List[Tuple[Experiment, Dict[str, Dict[int, dict]]]]:
    """The experiments with at least one pair of plain attention and the default."""
    results = [(experiment, read(RESULTS, experiment)) for experiment in EXPERIMENTS.values()]
    return [
        (experiment, found)
        for experiment, found in results
        if found.get("plain", {}).keys() & found.get(experiment.default, {}).keys()
    ]


def documents() -> Dict[Path, str]:
    """What README.md and docs/results.md should be, by path."""
    results = finished()
    sections = [line for experiment, found in results for line in section(experiment, found)]
    lines = [
        "| task | score | \u03b1, β | plain | evolving | difference ± standard error | pairs "
        "| verdict | training time, ratio |",
        "|---|---|---|---:|---:|---:|---:|---|---:|",
        *(line for experiment, found in results for line in summary(experiment, found)),
    ]
    parts = {ROOT / "docs" / "results.md": sections, ROOT / "README.md": lines}
    return {
        path: replace_between(path.read_text(encoding="utf-8"), "results", part)
        for path, part in parts.items()
    }


def compare_again(folder: Path) -> List[str]:
    """A line per experiment, setting and score of another folder: is it in the interval?"""
    lines = []
    for experiment, ours in finished():
        again = read(folder, experiment)
        for setting in (name for name in again if name in ours and name != "plain"):
            for score in experiment.scores:
                before = compare(ours["plain"], ours[setting], score)
                after = compare(again.get("plain", {}), again[setting], score)
                if before is None or before.interval is None or after is None:
                    continue
                low, high = (before.difference + x * before.interval for x in (-1, 1))
                where = "inside" if low <= after.difference <= high else "outside"
                lines.append(
                    f"{experiment.name}, {setting}, {score}: {after.difference:+.3f} "
                    f"({count_pairs(after.seeds)}), {where} {low:+.3f} to {high:+.3f}"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", type=Path, metavar="FOLDER")
    folder = parser.parse_args().again
    if folder is not None:
        try:
            lines = compare_again(folder)
        except ValueError as error:
            parser.error(f"--again: {error}")
        if not lines:
            parser.error(f"--again: {folder} has no pair of an experiment that is reported here")
        print("\n".join(lines))
        return
    matplotlib.rcParams["svg.hashsalt"] = "results"
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    for experiment, found in finished():
        path = ROOT / "docs" / f"results-{experiment.name}.svg"
        plot(experiment, found, path)
        print(path)


if __name__ == "__main__":
    main()
