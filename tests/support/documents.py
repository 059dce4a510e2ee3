"""The README and the guides, and the code that is printed in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "examples" / "guides"
DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md", ROOT / "examples" / "demo" / "README.md"]
DOCUMENTS += sorted(GUIDES.glob("*.md"))


def document_id(document: Path) -> str:
    return str(document.relative_to(ROOT).with_suffix(""))


def code_blocks(document: Path) -> list[tuple[str, str]]:
    """Return language and text of each block that names its language, in the order of the document."""
    text = document.read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def blocks(document: Path, language: str) -> list[str]:
    """Return the blocks of one language."""
    return [text for name, text in code_blocks(document) if name == language]


def commands_in(block: str) -> list[list[str]]:
    """Return the words of each command of a block in bash: one command per line, `\\` continues a line."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def first_column(document: str, heading: str) -> list[str]:
    """The code in the first column of all tables of a guide whose first heading is `heading`."""
    text = (GUIDES / document).read_text(encoding="utf-8")
    tables = re.findall(rf"^\| {heading} \|.*\n\|-.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [
        code for table in tables for row in table.splitlines() for code in re.findall("`(.+?)`", row.split("|")[1])
    ]
