"""README and guides: commands parse, Python compiles, links and messages exist. test_guides.py runs the commands."""

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
from documents import DOCUMENTS, GUIDES, ROOT, blocks, commands_in, first_column
from transformers import HfArgumentParser

from askd_hf import ASKDConfig
from askd_hf.arguments import ModelArguments
from askd_hf.arguments.parser import parse_args
from askd_hf.config import RENAMED_METRICS
from askd_hf.training.run_dir import set_default_output_dir

WITH_LINKS = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]
REPOSITORY = r"https://(?:github\.com/askd-hf/askd-hf/(?:blob|tree)|raw\.githubusercontent\.com/askd-hf/askd-hf)/main/"
MODULE = "askd_hf.commands.main"  # of `askd-hf`
STARTS = ("python examples/", "askd-hf ", "accelerate launch ")


def commands(document: Path) -> list[list[str]]:
    """The words of each command of ours in the bash blocks of a document."""
    found = [words for block in blocks(document, "bash") for words in commands_in(block)]
    return [words for words in found if " ".join(words).startswith(STARTS)]


def script_and_arguments(words: list[str]) -> tuple[Path, list[str]]:
    """The script that a command runs, and its arguments: `askd-hf a-b` is `examples/a_b.py`."""
    if MODULE in words:  # of `accelerate launch -m`
        words = ["askd-hf", *words[words.index(MODULE) + 1 :]]
    if words[0] == "askd-hf":
        return ROOT / "examples" / f"{words[1].replace('-', '_')}.py", words[2:]
    at = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[at], words[at + 1 :]


def all_words() -> list[list[str]]:
    return [words for document in DOCUMENTS for words in commands(document)]


ALL_COMMANDS = [
    pytest.param(words, id=f"{document.stem}-{number}-{script_and_arguments(words)[0].stem}")
    for document in DOCUMENTS
    for number, words in enumerate(commands(document))
]


class Parsed(BaseException):
    """Raised in place of running a script, once its own parser has accepted the options.

    Args: the arguments as the parser got them, old names replaced; values without an option; all options it has.
    """


@pytest.fixture
def parse(monkeypatch):
    """A function that parses a command by its script, in this process, and returns the three values of `Parsed`."""
    parse_dataclasses = HfArgumentParser.parse_args_into_dataclasses
    parse_all, parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def dataclasses_only(self, args=None, **kwargs):
        *_, stray = parse_dataclasses(self, args, **kwargs)
        raise Parsed(args, stray, set(self._option_string_actions))

    def plain_only(self, args=None, namespace=None):
        parse_all(self, args, namespace)
        raise Parsed(sys.argv, [], set(self._option_string_actions))

    def known_only(self, args=None, namespace=None):
        known, others = parse_known(self, args, namespace)
        if sys._getframe(1).f_globals["__name__"] == "__main__":  # called by the script, not by another parser
            raise Parsed(sys.argv, others, set(self._option_string_actions))
        return known, others

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", dataclasses_only)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", plain_only)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", known_only)
    monkeypatch.chdir(ROOT)

    def run(script: Path, arguments: list[str]) -> tuple:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path, str(script.parent)])  # last: evaluate.py isn't the library
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(str(script), run_name="__main__")
        return parsed.value.args

    return run


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_a_command_is_accepted_by_the_parser_of_its_script(parse, words):
    script, arguments = script_and_arguments(words)
    assert script.is_file(), script
    parsed, stray, _ = parse(script, arguments)
    assert stray == []
    named = {argument for argument in arguments if argument.startswith("--") and argument != "--config"}
    assert named <= set(parsed)  # none is an old name


def test_options_in_the_text_are_options_of_a_script(parse):
    options = {"--help", "--config", "--multi_gpu", "--num_processes"}
    for script, arguments in dict(map(script_and_arguments, all_words())).items():
        options |= parse(script, arguments)[2]
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        code = " ".join(re.findall("`([^`]+)`", text))
        assert set(re.findall(r"--\w+", code)) <= options, document


def test_the_readme_loads_the_student_that_its_command_trains():
    _, arguments = script_and_arguments(commands(ROOT / "README.md")[0])
    models, config = parse_args((ModelArguments, ASKDConfig), arguments)
    set_default_output_dir(config, models)
    assert f'model="{config.output_dir}"' in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.parent.name + "-" + document.stem)
def test_python_in_a_document_compiles(document):
    for code in blocks(document, "python"):
        compile(code, document.name, "exec")


def test_the_python_examples_of_the_readme_are_short():
    first, *_ = examples = blocks(ROOT / "README.md", "python")
    assert "askd_hf.distill(" in first and any("ASKDTrainer(" in code for code in examples)
    assert max(len(code.splitlines()) for code in examples) <= 20


def anchors(document: Path) -> set[str]:
    """The anchors of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", WITH_LINKS, ids=lambda document: document.parent.name + "-" + document.stem)
def test_links_between_documents_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = re.sub(REPOSITORY, f"{ROOT}/", link).partition("#")
        if path.startswith("http"):
            continue
        # on the index of packages README stands alone, so its links are absolute
        assert document != ROOT / "README.md" or re.match(REPOSITORY, link), link
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_demo_has_the_same_error_rates_everywhere():
    readme, page, card, of_teacher = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "README.md",
            "examples/demo/README.md",
            "model_cards/demo-student.md",
            "model_cards/demo-teacher.md",
        )
    )
    (table,) = re.findall(r"^The demo:\n.*?(?=```)", readme, re.DOTALL | re.MULTILINE)
    assert table in page
    for name, role in (("teacher", "teacher"), ("ASKD student", "student")):
        (rates,) = re.findall(rf"^{name} +(\S+ \[.+?\]) +(\S+ \[.+?\])", table, re.MULTILINE)
        for split, rate in zip(("calls", "studio"), rates, strict=True):
            assert f"\n| {split} | {role} | {rate} | " in card
            assert role == "student" or f" | {rate.split()[0]} % |\n" in of_teacher


def test_the_indexes_name_all_guides_and_scripts():
    for index, guide in ((index, guide) for index in DOCUMENTS[:2] for guide in GUIDES.glob("*.md")):
        assert f"guides/{guide.name})" in index.read_text(encoding="utf-8"), (index, guide)
    for script in (ROOT / "examples").glob("*.py"):
        assert f"]({script.name})" in DOCUMENTS[1].read_text(encoding="utf-8"), script


def test_paths_in_the_documents_exist():
    for document in DOCUMENTS:
        for path in re.findall(r"`((?:askd_hf|examples|model_cards|tests)/[\w./-]*)`", document.read_text("utf-8")):
            assert (ROOT / path).exists(), (document, path)


def strings_of_the_package() -> str:
    """All string literals, one a line; the fields of f-strings as {}."""
    found = []
    for file in (ROOT / "askd_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_guide_are_those_of_the_package():
    messages, source = first_column("troubleshooting.md", "message"), strings_of_the_package()
    assert len(messages) >= 15
    assert [message for message in messages if message not in source] == []


def test_log_keys_of_the_method_guide_are_those_of_the_package():
    keys = first_column("method.md", "key")
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "askd_hf").rglob("*.py"))
    assert len(keys) >= 10
    assert [key for key in keys if key in RENAMED_METRICS or not re.search(rf"\b{key}\b", source)] == []
