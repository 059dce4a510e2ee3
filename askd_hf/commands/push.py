"""Publish a distilled student on the Hub, with a model card.

    askd-hf push --model_dir runs/my-student --repo_id you/my-student

uploads the weights, the processor, the generation config, the record of the run (training.json), a model card and the
figure of the run. No other file of the directory is uploaded. The results of an evaluation go into the card and its
metadata: those of the run (runs/my-student/evaluation/results.json), or those given by --results. README.md in the
directory is overwritten.

Log in with `hf auth login` first, or set HF_TOKEN. Run the same command again after a failed push.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..arguments.parser import parse_args
from ..hub.upload import publish


@dataclass
class PushArguments:
    """The model, and the repository to publish it in."""

    _argument_group_name = "push"

    model_dir: str = HfArg(help="Directory of a run of `askd-hf distill`, or of one of its checkpoints.")
    repo_id: str = HfArg(help="Hub id to publish as, such as you/my-student. It is created if it doesn't exist.")
    results: str | None = HfArg(
        default=None,
        help="results.json of an evaluation of this model. Default: evaluation/results.json in its directory, if it "
        "exists; without results the card has no evaluation.",
    )
    private: bool = HfArg(
        default=False, help="Create the repository as a private one. A repository that is public is refused."
    )
    revision: str | None = HfArg(default=None, help="Branch to commit to, which must exist. Default: the main branch.")
    license: str | None = HfArg(
        default=None,
        help="License of the student, as the Hub calls it, such as mit. Default: that of the model that training "
        "started from, if its card states one.",
    )


OPTIONS = (PushArguments,)


def main(argv: list[str] | None = None) -> None:
    push(*parse_args(OPTIONS, argv, "askd-hf push", __doc__))


def push(args: PushArguments) -> str:
    """Publish a student, print the address of the commit and return it.

    Raises `UserError` if the directory is incomplete or the push fails.
    """
    address = publish(
        Path(args.model_dir),
        args.repo_id,
        results=Path(args.results) if args.results else None,
        private=args.private or None,
        revision=args.revision,
        license=args.license,
    )
    print(f"published: {address}")
    return address
