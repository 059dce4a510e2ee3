"""The forms of .github: GitHub shows no form that breaks its rules, and doesn't say why."""

import re

import pytest
import yaml
from scripts import ROOT

from askd_hf.commands.main import COMMANDS

GITHUB = ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*_*.yml"))
REPOSITORY = "https://github.com/askd-hf/askd-hf/blob/main/"


def form(name: str) -> dict:
    return yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))


def fields(name: str) -> dict[str, dict]:
    """The fields that a user fills in, by id."""
    return {field["id"]: field for field in form(name)["body"] if field["type"] != "markdown"}


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_a_form_follows_the_rules_of_github(file):
    read = form(file.name)
    assert read.keys() <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    assert all(isinstance(read[key], str) and read[key] for key in ("name", "description"))
    for field in read["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        if field["type"] == "markdown":
            assert field["attributes"].keys() == {"value"}
            continue
        assert field["type"] == "textarea" and re.fullmatch(r"[\w-]+", field["id"])
        assert field["attributes"].keys() <= {"label", "description", "placeholder", "value", "render"}
        assert field["attributes"]["label"]
        assert field["validations"].keys() == {"required"} and type(field["validations"]["required"]) is bool
    asked = [field for field in read["body"] if field["type"] != "markdown"]
    assert asked, "GitHub shows no form that asks for nothing"
    assert (
        len({field["id"] for field in asked}) == len({field["attributes"]["label"] for field in asked}) == len(asked)
    )


def test_a_bug_report_requires_the_versions_the_command_and_the_error():
    asked = fields("bug_report.yml")
    assert {name for name, field in asked.items() if field["validations"]["required"]} == {"env", "command", "error"}
    versions = asked["env"]["attributes"]
    assert "`askd-hf env`" in versions["description"]
    assert "render" not in versions  # the output has its own fence


def test_a_feature_request_requires_the_task():
    assert fields("feature_request.yml")["task"]["validations"]["required"]


def test_the_chooser_has_links_and_no_blank_issue():
    chooser = form("config.yml")
    assert chooser.keys() == {"blank_issues_enabled", "contact_links"} and chooser["blank_issues_enabled"] is False
    for link in chooser["contact_links"]:
        assert link.keys() == {"name", "url", "about"} and all(link.values())


def test_what_the_forms_name_exists():
    texts = [file.read_text(encoding="utf-8") for file in GITHUB.rglob("*.*") if file.is_file()]
    assert len(texts) == 4
    for text in texts:
        for path in re.findall(rf"{REPOSITORY}([\w./-]+)", text):
            assert (ROOT / path).is_file(), path
        assert set(re.findall(r"askd-hf ([a-z][\w-]*)", text)) <= COMMANDS.keys()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make ([\w-]+)`", "\n".join(texts))
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_template_of_a_pull_request_asks_for_the_environment():
    text = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    assert "`askd-hf env`" in text and text.count("- [ ] ") >= 3
