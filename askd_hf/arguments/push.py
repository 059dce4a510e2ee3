"""Options of `askd-hf push`, and of the push of `askd-hf cache-teacher`."""

from dataclasses import dataclass

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.hf_argparser import HfArg

from ..errors import UserError


def check_hub_id(option: str, name: str | None) -> None:
    """Raise `UserError` if a name can't be that of a repository on the Hub, before anything is computed for it."""
    try:
        if name is not None:
            validate_repo_id(name)
        if name is not None and name.lower() in ("true", "false", "yes", "no"):
            raise UserError(f"--{option} requires the Hub id to push to, such as you/my-speech, got {name}")
    except HFValidationError as error:
        reason = str(error).partition("Use `repo_type`")[0].strip()
        raise UserError(f"--{option} {name!r} is no Hub id, such as you/my-student. {reason}") from None


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

    def __post_init__(self):
        check_hub_id("repo_id", self.repo_id)


@dataclass
class PushLabelsArguments:
    """Where the labeled speech is published."""

    _argument_group_name = "hub"

    hub_dataset_id: str | None = HfArg(
        default=None,
        help="Hub id of a dataset to push the labeled speech to. A new dataset is created as a private one; an "
        "existing one stays as public or private as it is.",
    )

    def __post_init__(self):
        check_hub_id("hub_dataset_id", self.hub_dataset_id)
