"""Publish a distilled student on the Hub, with a model card.

    askd-hf push --model_dir runs/my-student --repo_id you/my-student

uploads the weights, the processor, the generation config, the record of the run (training.json), a model card and the
figure of the run. No other file of the directory is uploaded. The results of an evaluation go into the card and its
metadata: those of the run (runs/my-student/evaluation/results.json), or those given by --results. README.md in the
directory is overwritten.

Log in with `hf auth login` first, or set HF_TOKEN. Run the same command again after a failed push.
"""

from pathlib import Path

from ..arguments.parser import parse_args
from ..arguments.push import PushArguments
from ..hub.upload import publish, published_lines
from .options import options_of

OPTIONS = options_of("push")


def main(argv: list[str] | None = None) -> None:
    push(*parse_args(OPTIONS, argv, "askd-hf push", __doc__))


def push(args: PushArguments) -> str:
    """Publish a student, print the addresses of its page and of the commit, and return that of the commit.

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
    print(published_lines(address))
    return address
