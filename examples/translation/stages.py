"""The stages of an output folder, which rerun only if needed and replace only their own files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evolving_attention.commands import PART, DataError, alone_in, whole_or_not_at_all

Report = dict[str, int]
Step = tuple[str, object, Callable[[Path], Report]]  # name, options, what writes it to a path

STAGES = ("raw", "tok", "split", "code", "bpe", "data-bin")
STAMPS = ".stamps"
STAMP_VERSION = 1  # raise it when a stage's output changes for the same options


@dataclass(frozen=True)
class Stage:
    """A file or folder of --out and how it is made. It appears whole or not at all.

    Its stamp records the options and the files written. A rerun replaces only those files; files
    that the stamp does not list, or that have changed since, belong to the user."""

    out: Path
    name: str
    digest: str  # of its options and of all stages before it
    build: Callable[[Path], Report]

    @property
    def target(self) -> Path:
        return self.out / self.name

    @property
    def stamp(self) -> Path:
        return self.out / STAMPS / f"{self.name}.json"

    def record(self) -> dict:
        """The stamp of an earlier run, or {}. DataError if the file is not a stamp."""
        try:
            record = json.loads(self.stamp.read_text(encoding="utf-8"))
            return {key: record[key] for key in ("digest", "report", "sizes")} | record
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{self.stamp} was not written by prepare.py; give another --out"
            ) from None

    def finished(self) -> Report | None:
        """The report of an earlier run, if its options were the same and its files are there."""
        record = self.record()
        if record.get("digest") != self.digest:
            return None
        for name, size in record["sizes"].items():
            path = self.target / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return record["report"]

    def in_the_way(self) -> list[Path]:
        """Files that the stage would replace but did not write, or that have changed since."""
        if self.target.is_symlink():
            return [self.target]
        known = self.record().get("sha256", {})
        found = contents(self.target)
        others = [path for name, path in found.items() if checksum(path) != known.get(name, "")]
        return [self.target] if found and len(others) == len(found) else others

    def run(self) -> Report:
        report = self.finished()
        if report is not None:
            print(f"{self.name:9}{describe(report)} (unchanged, skipped)", flush=True)
            return report
        with whole_or_not_at_all(self.target, within=self.stamp.parent) as part:
            report = self.build(part)
            written = contents(part)
            record = {"digest": self.digest, "report": report}
            record["sizes"] = {name: path.stat().st_size for name, path in written.items()}
            record["sha256"] = {name: checksum(path) for name, path in written.items()}
            check_targets([self])  # again, because the work may have taken hours
            for path in contents(self.target).values():
                path.unlink()
            if self.target.is_dir():
                self.target.rmdir()
            with whole_or_not_at_all(self.stamp, overwrite=True) as stamp:
                stamp.write_text(json.dumps(record), encoding="utf-8")
        print(f"{self.name:9}{describe(report)}", flush=True)
        return report


def run_stages(out: Path, steps: Iterable[Step], reports: dict[str, Report]) -> None:
    """Runs the stages that are not finished and puts the report of each stage into `reports`.

    Raises:
        DataError: a stage would replace files of the user, or another run is using `out`.
    """
    stages, digest = [], ""
    for name, options, build in steps:
        key = json.dumps([STAMP_VERSION, digest, name, options], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        stages.append(Stage(out, name, digest, build))
    check_targets(stages)
    (out / STAMPS).mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        for left in out.glob(f"{STAMPS}/{PART}*"):  # left by a run that was killed
            shutil.rmtree(left)
        for stage in stages:
            reports[stage.name] = stage.run()


def check_targets(stages: Iterable[Stage]) -> None:
    """DataError if a stage would replace files that are not its own."""
    paths = [path for stage in stages if stage.finished() is None for path in stage.in_the_way()]
    if paths:
        names = ", ".join(f"{path}{' (a link)' * path.is_symlink()}" for path in paths[:5])
        names += f" and {len(paths) - 5} more" * (len(paths) > 5)
        raise DataError(
            f"will not overwrite {names}: not written by this version of prepare.py, or changed "
            "since; move or delete it, or give another --out"
        )


def written_places(out: Path) -> dict[Path, Path]:
    """The places that a run with this --out writes to: real path -> path as given."""
    return {(out / name).resolve(): out / name for name in (*STAGES, STAMPS)}


def place_of(path: Path, places: dict[Path, Path]) -> Path | None:
    """The place that the path is, or is inside of."""
    path = path.resolve()
    return next((places[x] for x in (path, *path.parents) if x in places), None)


def contents(path: Path) -> dict[str, Path]:
    """The file at `path`, or everything in the folder `path`, by relative name."""
    if path.is_dir():
        return {str(found.relative_to(path)): found for found in sorted(path.rglob("*"))}
    return {".": path} if os.path.lexists(path) else {}


def checksum(path: Path) -> str | None:
    """SHA-256 of a regular file; None for anything else."""
    if path.is_symlink() or not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(partial(file.read, 2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def describe(report: Report) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in report.items())
