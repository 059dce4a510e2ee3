"""Dry runs, what they print, and what they leave."""

import hashlib
import re
from pathlib import Path


def plan_of(printed: str) -> dict[str, str]:
    """The lines of a plan by "section: name", further lines of a value joined by line breaks."""
    assert printed.startswith("Plan of the run. Nothing was trained, saved or pushed.\n\nstudent\n"), printed
    found: dict[str, str] = {}
    section = last = ""
    for line in printed.splitlines()[1:]:
        row = re.match(r"  (\S[^:]*?)(  +)(\S.*)$", line)
        if line and not line.startswith(" "):
            section = line
        elif line.split() in (["student"], ["student", "teacher"]):  # the heads of columns
            continue
        elif row:
            last = f"{section}: {row[1]}"
            assert last not in found, last
            found[last] = row[3]
        elif line.strip():
            found[last] += f"\n{line.strip()}"
    return found


def table(printed: str) -> str:
    """The schedule as a run prints it."""
    return re.search(r"^phase +steps .*(?:\n(?:teacher|self|labels) .*)+", printed, re.MULTILINE)[0]


def tree(*directories: Path) -> dict[str, str]:
    """Every directory and file below, with a hash of its content."""
    found = {}
    for directory in directories:
        for path in directory.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = hashlib.sha256(content).hexdigest()
    return found


def sizes(text: str) -> list[float]:
    """The sizes in a text, in bytes."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
    return [float(value.replace(",", "")) * units[unit] for value, unit in re.findall(r"([\d,.]+) (kB|MB|GB)", text)]


def number(text: str) -> float:
    """The first number of a text, such as 1,234.5."""
    return float(re.search(r"[\d,]+(?:\.\d+)?", text)[0].replace(",", ""))
