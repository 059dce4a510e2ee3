"""Publish a distilled student on the Hub, with a card that fills itself in.

    python examples/push.py --model runs/my-student --repo you/my-student

commits the weights, the processor, the generation config, what the run was (training.json), a model card and the
picture of the run; nothing else that the directory holds. The results of an evaluation, the run's own
(runs/my-student/evaluation/results.json) or those given with --results, become the card's evaluation and its
metadata. README.md in the directory is written anew.

Log in with `hf auth login` first, or set HF_TOKEN. A push that failed goes on with the same command.
"""

from dataclasses import dataclass, field
from pathlib import Path

from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error
from askd_hf.hub.upload import publish


@dataclass
class PushArguments:
    """What goes where."""

    _argument_group_name = "push"

    model: str = field(metadata={"help": "Directory of a run of examples/distill.py, or of one of its checkpoints."})
    repo: str = field(metadata={"help": "Hub id to publish as, such as you/my-student. It is made if it isn't there."})
    results: str | None = field(
        default=None,
        metadata={
            "help": "results.json of an evaluation of this model. Default: evaluation/results.json in its directory, "
            "if that is there; without any, the card has no results."
        },
    )
    private: bool = field(
        default=False,
        metadata={"help": "Make a new repository private; one that is public already is refused."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to, which must be there. Default: the main one."}
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "License of the student, as the Hub calls it, such as mit. Default: that of the model that "
            "training started from, if its card states one."
        },
    )


def main() -> None:
    (options,) = parse_args((PushArguments,))
    address = publish(
        Path(options.model),
        options.repo,
        results=Path(options.results) if options.results else None,
        private=options.private or None,
        revision=options.revision,
        license=options.license,
    )
    print(f"published: {address}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
