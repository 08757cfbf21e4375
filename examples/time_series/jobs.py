"""A list of trainings, one after another, that continues after an interruption."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any, Callable, Dict, Hashable, List, Optional, Tuple

import aeon
import torch

from evolving_attention.commands import DataError, whole_or_not_at_all

Record = Dict[str, Any]  # of one job: what it is, its score and its seconds of processor time


def machine() -> Dict[str, str]:
    """What the figures depend on besides the options."""
    return {
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "aeon": aeon.__version__,
    }


def read(path: Path, script: str) -> List[Record]:
    """The records in a file that this script wrote; none if there is no such file.

    Raises:
        DataError: the file is another one.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--json {path}: not a file that {script} wrote: {error}") from None
    records = content.get("records") if isinstance(content, dict) else None
    if not isinstance(records, list) or content.get("script") != script:
        raise DataError(f"--json {path}: not a file that {script} wrote; choose another name")
    return records


def run(
    jobs: Dict[Hashable, Callable[[], Record]],
    key: Callable[[Record], Hashable],
    path: Optional[Path],
    script: str,
) -> List[Record]:
    """Runs the jobs whose records `path` does not hold yet, and returns the records of all jobs.

    Prints each score, and the time that is probably left. The file is written after each job.
    """
    known = {key(record): record for record in (read(path, script) if path else [])}
    left = [name for name in jobs if name not in known]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} trainings were finished before", flush=True)
    start = time.monotonic()
    for number, name in enumerate(left, 1):
        begin, busy = time.monotonic(), time.process_time()
        record = jobs[name]()
        record["seconds"] = round(time.process_time() - busy, 1)
        known[name] = {**record, "machine": machine()}
        if path:
            # Another process may have added to the file.
            known = {key(record): record for record in read(path, script)} | known
            content = {"script": script, "records": list(known.values())}
            with whole_or_not_at_all(path, overwrite=True) as part:
                part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        rest = (time.monotonic() - start) / number * (len(left) - number)
        print(
            f"{number}/{len(left)} {record['name']}: {record['score']:.3f} "
            f"({time.monotonic() - begin:.0f} s; about {rest / 60:.0f} minutes left)",
            flush=True,
        )
    return [known[name] for name in jobs]


def by(records: List[Record], *fields: str) -> Dict[Tuple, List[Record]]:
    """The records grouped by the values of some of their fields."""
    groups: Dict[Tuple, List[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[field] for field in fields), []).append(record)
    return groups
