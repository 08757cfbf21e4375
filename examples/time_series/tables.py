#!/usr/bin/env python3
"""Writes the tables of README.md from run.json and search.json.

python examples/time_series/tables.py
"""

import re
from pathlib import Path

import run
import search
from jobs import read

FOLDER = Path(__file__).parent


def document() -> str:
    """What README.md should be."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, script in (("run.json", run), ("search.json", search)):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        table = "\n".join(script.table(read(FOLDER / name, script.SCRIPT)))
        pattern = re.compile(f"{start}.*?{end}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"there must be {start.strip()} and {end} in README.md")
        text = pattern.sub(lambda _, new=f"{start}{table}\n{end}": new, text)
    return text


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(document(), encoding="utf-8")
