"""Render the cards that tests/test_card.py compares, from the inputs in tests/cards: `make cards`."""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from askd_hf.evaluation.results import Results
from askd_hf.hub.card import render_card
from askd_hf.hub.training_summary import TrainingSummary

ROOT = Path(__file__).parents[2]
INPUTS = ROOT / "tests" / "cards"
GOLDEN = ROOT / "model_cards"
# card -> summary, results, repository, whether it has the figure
CARDS = {
    GOLDEN / "demo-student.md": ("demo-summary", "demo-results", "you/demo-student", True),
    GOLDEN / "demo-student-not-evaluated.md": ("demo-summary", None, "you/demo-student", False),
    # the student of the README: examples/studies/recipe.yaml, seed 1
    GOLDEN / "accented-student.md": ("accented-summary", "accented-results", "you/accented-student", True),
    # invented values that fill every part of the template, in the format of earlier versions
    INPUTS / "made-up.md": ("made-up-summary", "made-up-results", "you/made-up", True),
}


def read_summary(name: str) -> TrainingSummary:
    return TrainingSummary.from_dict(json.loads((INPUTS / f"{name}.json").read_text(encoding="utf-8")))


def read_results(name: str | None) -> Results | None:
    return None if name is None else Results.load(INPUTS / f"{name}.json")


def render(summary: str, results: str | None, repo_id: str, figure: bool) -> ModelCard:
    return render_card(read_summary(summary), read_results(results), repo_id, figure)


if __name__ == "__main__":
    for path, inputs in CARDS.items():
        render(*inputs).save(path)
        print(path)
