"""The stages of an output folder: each is made once, and replaced only if it is as it was made."""

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
    """How a file or folder of --out is made. It appears there whole or not at all.

    The stamp says which options it was made with and what was written. Only that is ever replaced:
    what the stamp does not list, and what has changed since, is the user's."""

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
        """The stamp of an earlier run; empty if there is none. DataError if it is no stamp."""
        try:
            record = json.loads(self.stamp.read_text(encoding="utf-8"))
            return {key: record[key] for key in ("digest", "report", "sizes")} | record
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.stamp} is no stamp of prepare.py; give another --out") from None

    def finished(self) -> Report | None:
        """The report of an earlier run, if all that it wrote is still there."""
        record = self.record()
        if record.get("digest") != self.digest:
            return None
        for name, size in record["sizes"].items():
            path = self.target / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return record["report"]

    def in_the_way(self) -> list[Path]:
        """What stands where the stage is written, but was not written by it, or changed since."""
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
            check_targets([self])  # once more, for the work may have taken hours
            for path in contents(self.target).values():
                path.unlink()
            if self.target.is_dir():
                self.target.rmdir()
            with whole_or_not_at_all(self.stamp, overwrite=True) as stamp:
                stamp.write_text(json.dumps(record), encoding="utf-8")
        print(f"{self.name:9}{describe(report)}", flush=True)
        return report


def run_stages(out: Path, steps: Iterable[Step], reports: dict[str, Report]) -> None:
    """Makes the stages that are not made yet, and puts the report of each into `reports`.

    Raises:
        DataError: what would be replaced is not ours, before any work; another run is at work.
    """
    stages, digest = [], ""
    for name, options, build in steps:
        key = json.dumps([STAMP_VERSION, digest, name, options], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        stages.append(Stage(out, name, digest, build))
    check_targets(stages)
    (out / STAMPS).mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        for left in out.glob(f"{STAMPS}/{PART}*"):  # by a run that was killed
            shutil.rmtree(left)
        for stage in stages:
            reports[stage.name] = stage.run()


def check_targets(stages: Iterable[Stage]) -> None:
    """DataError if what a stage would replace is not its own."""
    paths = [path for stage in stages if stage.finished() is None for path in stage.in_the_way()]
    if paths:
        names = ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" * (len(paths) > 5))
        raise DataError(
            f"in the way of what is to be written: {names}; this prepare.py did not write that, or "
            "it has changed since. Move or delete it, or give another --out"
        )


def written_places(out: Path) -> dict[Path, Path]:
    """Where --out is written to: real paths, and what they are called."""
    return {(out / name).resolve(): out / name for name in (*STAGES, STAMPS)}


def place_of(path: Path, places: dict[Path, Path]) -> Path | None:
    """The one of the places that the path is, or lies in."""
    path = path.resolve()
    return next((places[x] for x in (path, *path.parents) if x in places), None)


def contents(path: Path) -> dict[str, Path]:
    """The file at `path`, or what is in the folder `path`, by relative names."""
    if path.is_dir():
        return {str(found.relative_to(path)): found for found in sorted(path.rglob("*"))}
    return {".": path} if os.path.lexists(path) else {}


def checksum(path: Path) -> str | None:
    """SHA-256 of a file; None for a link, a folder and what else is no file."""
    if path.is_symlink() or not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(partial(file.read, 2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def describe(report: Report) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in report.items())
