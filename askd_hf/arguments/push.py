"""Options of `askd-hf push`, and of the push of `askd-hf cache-teacher`."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg


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


@dataclass
class PushLabelsArguments:
    """Where the labeled speech is published."""

    _argument_group_name = "hub"

    hub_dataset_id: str | None = HfArg(
        default=None,
        help="Hub id of a dataset to push the labeled speech to. A new dataset is created as a private one; an "
        "existing one stays as public or private as it is.",
    )
