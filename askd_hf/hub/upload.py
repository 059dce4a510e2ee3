"""A run's directory on the Hub: the student, what it takes to use it, its card. Nothing else, in one commit."""

import json
import logging
import shlex
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from ..data.encoder_cache import weights_digest
from ..errors import UserError, disk_errors
from ..evaluation.results import Results
from ..hub_access import hub_upload
from ..models.checkpoint_files import BESIDE_THE_MODEL
from ..models.loading import load_whisper
from ..models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base
from .card import STUDENT, render_card
from .figure import write_run_figure
from .provenance import public_name
from .training_summary import SUMMARY_FILE, TrainingSummary

logger = logging.getLogger(__name__)

CARD, FIGURE = "README.md", "run.png"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", ADAPTER_WEIGHTS)
CONFIGS = ("config.json", ADAPTER_CONFIG)  # of a whole model, of an adapter
# Only these leave the machine: by their names, so that nothing that some run may put beside them ever does.
PUBLISHED = (
    *WEIGHTS,
    *CONFIGS,
    *BESIDE_THE_MODEL,
    SUMMARY_FILE,
    CARD,
    FIGURE,
)
RESULTS = Path("evaluation") / "results.json"  # where askd-hf distill puts them in a run's directory
PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt

Answer = TypeVar("Answer")


def publish(
    directory: Path,
    repo_id: str,
    *,
    results: Path | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload the student",
) -> str:
    """Publish a run with a card made anew, and return the commit's address.

    Args:
        directory: of a run, or of one of its checkpoints.
        repo_id: `you/name`, or `name` for one of your own; made if it isn't there.
        results: `results.json` of an evaluation of these weights. None: the run's own (`RESULTS`), if it has one.
        private: whether a new repository is private; True also refuses one that is public already.
        token: None: that of `hf auth login` or of HF_TOKEN.
        revision: a branch that exists; None: the main one.
        license: as the Hub calls it; None: that of the model that training started from, if its card states one.

    Raises:
        UserError: the directory isn't complete, or has an adapter whose base isn't on the Hub; the results are another
            model's; or the Hub refused or couldn't be reached, also after several attempts. Then everything is still
            in the directory, and the message has the command that goes on.
    """
    check_complete(directory)
    check_base(directory)
    found = find_results(directory, results)
    advice = resume_advice(directory, repo_id, results=results, private=private, revision=revision, license=license)
    with hub_upload(advice):
        repo_id = create_repository(repo_id, private, token, revision)
    write_card(directory, repo_id, found, license)
    with hub_upload(advice):
        return upload(directory, repo_id, token, revision, commit_message)


def resume_advice(
    directory: Path,
    repo_id: str,
    *,
    results: Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """The command that publishes the same, to be pasted; arguments as in `publish`."""
    command = ["askd-hf", "push", "--model", str(directory), "--repo", repo_id]
    for name, value in dict(results=results, revision=revision, license=license).items():
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--private"] if private else []
    return f"the model is safe in {directory}; go on with: {shlex.join(command)}"


def check_complete(directory: Path) -> None:
    """Raise `UserError` unless `from_pretrained` and the card have what they need."""
    if not directory.is_dir():
        raise UserError(f"no such directory: {str(directory)!r}")
    adapter = (directory / ADAPTER_CONFIG).is_file()
    needed = ["generation_config.json", "tokenizer_config.json", SUMMARY_FILE]
    needed += [ADAPTER_WEIGHTS] if adapter else ["config.json"]
    missing = [name for name in needed if not (directory / name).is_file()]
    if not adapter and not any(directory.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise UserError(
            f"{directory} isn't the directory of a finished run of askd-hf distill: it has no {', '.join(missing)}"
        )


def check_base(directory: Path) -> None:
    """Raise `UserError` if a directory has an adapter of a model that isn't on the Hub: nobody else could load it."""
    base = adapter_base(str(directory)) if (directory / ADAPTER_CONFIG).is_file() else None
    if base is not None and not public_name(base)[1]:
        raise UserError(
            f"{directory} has an adapter of {base}, a directory here, so nobody else could load it. Publish that "
            f"model first, and put its Hub id into {directory / ADAPTER_CONFIG} as base_model_name_or_path; or train "
            "without --keep_adapter, which merges the two"
        )


def write_card(directory: Path, repo_id: str, results: Results | None, license: str | None = None) -> ModelCard:
    """Write the card and, from `trainer_state.json`, the figure into a run's directory; `license` as in `publish`."""
    facts = TrainingSummary.load(directory)
    state = directory / "trainer_state.json"
    with disk_errors(f"the model card in {directory}"):
        if state.is_file():
            write_run_figure(json.loads(state.read_text())["log_history"], directory / FIGURE)
        card = render_card(facts, results, repo_id, (directory / FIGURE).is_file(), license)
        card.save(directory / CARD)
    return card


def find_results(directory: Path, given: Path | None = None) -> Results | None:
    """The evaluation of a directory's weights: the one given, or the run's own, which is passed over if it isn't.

    Raises `UserError` as `load_results` does, if one is given.
    """
    if given is not None:
        return load_results(given, directory)
    if not (directory / RESULTS).is_file():
        return None
    try:
        return load_results(directory / RESULTS, directory)
    except UserError as error:
        logger.warning("the card has no results: %s", error)
        return None


def load_results(path: Path, directory: Path) -> Results:
    """Raises `UserError` if they can't be read, or are of other weights than those in the directory."""
    try:
        results = Results.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} isn't the results.json of askd-hf evaluate: {error}") from error
    student = results.models.get(STUDENT)
    # an evaluation notes them as they were loaded, in float32
    if student is None or student.weights != weights_digest(load_whisper(str(directory))):
        raise UserError(
            f"{path} is of another model than the one in {directory}: evaluate that with askd-hf evaluate --model "
            f"{shlex.quote(str(directory))}"
        )
    return results


# ---- the Hub ----


def create_repository(repo_id: str, private: bool | None, token: str | None, revision: str | None = None) -> str:
    """Make it, unless it is there, and return its whole id.

    Raises `UserError` with `private` for one that is public, and for a `revision`, a branch, that it doesn't have.
    """
    check_token(token)
    api = HfApi()
    repo_id = retried(lambda: api.create_repo(repo_id, private=private, token=token, exist_ok=True)).repo_id
    if not private and revision is None:
        return repo_id
    try:
        info = retried(lambda: api.repo_info(repo_id, revision=revision, token=token))
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id} has no branch {revision!r}, so nothing was published: make it first, with `hf repos branch "
            f"create {repo_id} {revision}`"
        ) from error
    if private and not info.private:
        raise UserError(
            f"{repo_id} is public already, so nothing was published: make it private in its settings, choose another "
            "repository, or leave out --private"
        )
    return repo_id


def upload(directory: Path, repo_id: str, token: str | None, revision: str | None, commit_message: str) -> str:
    """Commit the files that `PUBLISHED` names, and return the commit's address.

    Weights of an earlier commit are deleted: transformers would take a whole file there before the shards of this one,
    and load an adapter on top of a whole model.
    """
    names = sorted(file.name for file in directory.iterdir() if file.is_file() and published(file.name))

    def commit() -> str:
        # Made anew at every attempt, as they remember what the Hub had before it. Large files that have arrived aren't
        # sent again, and a commit of which only the answer was lost isn't made twice.
        changes: list[CommitOperationAdd | CommitOperationDelete]
        changes = [CommitOperationAdd(name, directory / name) for name in names]
        there = HfApi().list_repo_files(repo_id, revision=revision, token=token)
        stale = [name for name in there if matches(name, (*WEIGHTS, *CONFIGS)) and name not in names]
        changes += [CommitOperationDelete(name) for name in stale]
        done = HfApi().create_commit(repo_id, changes, commit_message=commit_message, token=token, revision=revision)
        return done.commit_url

    return retried(commit)


def published(name: str) -> bool:
    return matches(name, PUBLISHED)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_token(token: str | None) -> None:
    """Raise `UserError` for a token that HTTP can't carry, whose error message would show it."""
    token = token or get_token() or ""
    if not all("!" <= character <= "~" for character in token):
        raise UserError("the Hub's token has characters that none has: log in again with `hf auth login`")


def retried(call: Callable[[], Answer]) -> Answer:
    """Call again, after a pause each, where the Hub is out of order or the connection is cut.

    huggingface_hub by itself tries five times again to send a large file, whose failure then comes as RuntimeError and
    is final here too; but it neither makes a repository nor a commit twice.
    """
    for pause in PAUSES:
        try:
            return call()
        except (httpx.TransportError, HfHubHTTPError, json.JSONDecodeError) as error:
            # an answer in HTML instead of JSON is some gateway's error page
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            logger.warning("the Hub is out of order (%s): again in %g s", type(error).__name__, pause)
            time.sleep(pause)
    return call()
