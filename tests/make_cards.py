"""The cards that tests/test_card.py compares, from the fixed inputs in tests/cards. `make cards` writes them.

python tests/make_cards.py
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from askd_hf.evaluation.results import Results
from askd_hf.hub.card import render_card
from askd_hf.hub.training_summary import TrainingSummary

INPUTS = Path(__file__).parent / "cards"
GOLDEN = Path(__file__).parents[1] / "model_cards"
# the card: facts, results, repository, with the figure
CARDS = {
    GOLDEN / "demo-student.md": ("demo-facts", "demo-results", "you/demo-student", True),
    GOLDEN / "demo-student-not-evaluated.md": ("demo-facts", None, "you/demo-student", False),
    # its facts and figures are made up, to have every part of the template filled: nobody should read them as results
    INPUTS / "made-up.md": ("made-up-facts", "made-up-results", "you/made-up", True),
}


def read_facts(name: str) -> TrainingSummary:
    return TrainingSummary.from_dict(json.loads((INPUTS / f"{name}.json").read_text(encoding="utf-8")))


def read_results(name: str | None) -> Results | None:
    return None if name is None else Results.load(INPUTS / f"{name}.json")


def render(facts: str, results: str | None, repo_id: str, figure: bool) -> ModelCard:
    return render_card(read_facts(facts), read_results(results), repo_id, figure)


if __name__ == "__main__":
    for path, inputs in CARDS.items():
        render(*inputs).save(path)
        print(path)
