"""Publish a run on the Hub in one commit: the student, the files required to use it, and its card."""

import json
import logging
import shlex
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from ..data.encoder_cache import weights_digest
from ..errors import UserError, disk_errors
from ..evaluation.results import Results
from ..hub_access import hub_upload
from ..models.checkpoint_files import PROCESSOR_FILES
from ..models.loading import load_whisper
from ..models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base
from .card import STUDENT, TEACHER, render_card
from .figure import write_run_figure
from .provenance import public_name
from .training_summary import SUMMARY_FILE, TrainingSummary

logger = logging.getLogger(__name__)

CARD, FIGURE = "README.md", "run.png"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", ADAPTER_WEIGHTS)
CONFIGS = ("config.json", ADAPTER_CONFIG)  # of a whole model; of an adapter
# Allowlist: no other file is uploaded.
PUBLISHED = (*WEIGHTS, *CONFIGS, *PROCESSOR_FILES, SUMMARY_FILE, CARD, FIGURE)
REPLACED = (*WEIGHTS, *CONFIGS, *PROCESSOR_FILES)  # all of them are of one model
RESULTS = Path("evaluation") / "results.json"  # in the output directory of a run
MANY_ERRORS = 2.0  # times the teacher's WER; a push warns of a student with more
RETRY_DELAYS = (1.0, 4.0)  # seconds before the second and the third attempt

Response = TypeVar("Response")


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
    """Publish a run with a new card, and return the URL of the commit.

    Logs a warning if the card has no license, and if the student's WER is more than `MANY_ERRORS` times the teacher's.

    Args:
        directory: output directory of a run, or one of its checkpoints.
        repo_id: `you/name`, or `name` in your own namespace; created if it doesn't exist.
        results: `results.json` of an evaluation of these weights. Default: that of the run (`RESULTS`), if it exists.
        private: whether a new repository is private. True raises for an existing public one.
        token: Default: that of `hf auth login` or HF_TOKEN.
        revision: an existing branch. Default: the main branch.
        license: license id of the Hub. Default: that of the model that training started from, if its card states one.

    Raises:
        UserError: the directory is incomplete, or has an adapter whose base model isn't on the Hub; the results are of
            another model; the Hub rejected the request, or failed after several attempts. The files are kept, and the
            message includes the command to resume.
    """
    check_complete(directory)
    check_base(directory)
    found = find_results(directory, results)
    advice = resume_advice(directory, repo_id, results=results, private=private, revision=revision, license=license)
    with hub_upload(advice):
        repo_id = create_repository(repo_id, private, token, revision)
    card = write_card(directory, repo_id, found, license)
    for warning in (_license_warning(card), _error_warning(found)):
        if warning:
            logger.warning(warning)
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
    """Return a sentence with the command that resumes publishing. See `publish` for the arguments."""
    command = ["askd-hf", "push", "--model_dir", str(directory), "--repo_id", repo_id]
    for name, value in dict(results=results, revision=revision, license=license).items():
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--private"] if private else []
    return f"the model is saved in {directory}; resume with: {shlex.join(command)}"


def check_complete(directory: Path) -> None:
    """Raise `UserError` unless the directory has all files that `from_pretrained` and the card require."""
    if not directory.is_dir():
        raise UserError(f"the directory {str(directory)!r} doesn't exist")
    adapter = (directory / ADAPTER_CONFIG).is_file()
    needed = ["generation_config.json", "tokenizer_config.json", SUMMARY_FILE]
    needed += [ADAPTER_WEIGHTS] if adapter else ["config.json"]
    missing = [name for name in needed if not (directory / name).is_file()]
    if not adapter and not any(directory.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise UserError(
            f"{directory} has no {', '.join(missing)}. Use the output directory of a finished askd-hf distill"
        )


def check_base(directory: Path) -> None:
    """Raise `UserError` if the directory has an adapter whose base model isn't on the Hub."""
    base = adapter_base(str(directory)) if (directory / ADAPTER_CONFIG).is_file() else None
    if base is not None and not public_name(base)[1]:
        raise UserError(
            f"{directory} has an adapter whose base model is a local directory ({base}). Publish the base model first "
            f"and set base_model_name_or_path in {directory / ADAPTER_CONFIG} to its Hub id, or train without "
            "--keep_adapter, which merges both"
        )


def write_card(directory: Path, repo_id: str, results: Results | None, license: str | None = None) -> ModelCard:
    """Write the card, and the figure of `trainer_state.json`, to a run's directory. See `publish` for `license`."""
    summary = TrainingSummary.load(directory)
    state = directory / "trainer_state.json"
    with disk_errors(f"the model card in {directory}"):
        if state.is_file():
            write_run_figure(json.loads(state.read_text())["log_history"], directory / FIGURE)
        card = render_card(summary, results, repo_id, (directory / FIGURE).is_file(), license)
        card.save(directory / CARD)
    return card


def _license_warning(card: ModelCard) -> str | None:
    if card.data.get("license") is not None:
        return None
    base = card.data.get("base_model") or "the model that training started from"
    return f"the card has no license, because none was found for {base}: give one with askd-hf push --license"


def _error_warning(results: Results | None) -> str | None:
    found = []
    for entry in results.sets if results else []:
        student, teacher = (entry.scores[role].wer if role in entry.scores else None for role in (STUDENT, TEACHER))
        if student is not None and teacher is not None and student > MANY_ERRORS * teacher:
            found.append(f"{student:.1f} % and {teacher:.1f} % on {entry.name}")
    return f"the student makes far more errors than its teacher: WER {', '.join(found)}" if found else None


def find_results(directory: Path, given: Path | None = None) -> Results | None:
    """Return the evaluation of the weights in a directory: the given one, or that of the run.

    Raises `UserError` as `load_results` does if one is given; logs a warning if the one of the run is invalid.
    """
    if given is not None:
        return load_results(given, directory)
    if not (directory / RESULTS).is_file():
        return None
    try:
        return load_results(directory / RESULTS, directory)
    except UserError as error:
        logger.warning("the card is written without results: %s", error)
        return None


def load_results(path: Path, directory: Path) -> Results:
    """Read results. Raises `UserError` if they can't be read, or aren't of the weights in the directory."""
    try:
        results = Results.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} isn't a results.json of askd-hf evaluate: {error}") from error
    student = results.models.get(STUDENT)
    # the digest is of the weights in float32, as an evaluation loads them
    if student is None or student.weights != weights_digest(load_whisper(str(directory))):
        raise UserError(
            f"{path} is of another model than {directory}. Evaluate it with: askd-hf evaluate --model "
            f"{shlex.quote(str(directory))}"
        )
    return results


# ---- the Hub ----


def create_repository(repo_id: str, private: bool | None, token: str | None, revision: str | None = None) -> str:
    """Create a repository unless it exists, and return its full id.

    Raises `UserError` if `private` is True and it is public, or if the branch `revision` doesn't exist.
    """
    check_token(token)
    api = HfApi()
    repo_id = retried(lambda: api.create_repo(repo_id, private=private, token=token, exist_ok=True)).repo_id
    if private or revision is not None:
        _repository_info(repo_id, private, token, revision)
    return repo_id


class Repository(NamedTuple):
    """A repository that a run publishes to.

    Attributes:
        repo_id: full id.
        exists: whether it exists already.
        private: whether it is private, or will be; None for the default of its owner.
    """

    repo_id: str
    exists: bool
    private: bool | None


def check_can_push_dataset(repo_id: str) -> None:
    """Raise `UserError` unless a dataset can be pushed there. Only reads."""
    with hub_upload("log in with `hf auth login`, or remove --hub_dataset_id"):
        find_repository(repo_id, None, None, None, repo_type="dataset")


def find_repository(
    repo_id: str, private: bool | None, token: str | None, revision: str | None, repo_type: str = "model"
) -> Repository:
    """Look up what `create_repository` would create or find. Only reads.

    Raises `UserError` as `create_repository`, and for a token without write access.
    """
    check_token(token)
    user = retried(lambda: HfApi().whoami(token))
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("the Hub token has only read access; log in with `hf auth login` with one that may write")
    full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    try:
        return Repository(full_id, True, _repository_info(full_id, private, token, revision, repo_type).private)
    except RepositoryNotFoundError:
        pass
    owner = full_id.partition("/")[0]
    if owner not in (user["name"], *(organization["name"] for organization in user.get("orgs", []))):
        raise UserError(f"{full_id} doesn't exist, and {user['name']} can't create a repository of {owner}")
    if revision is not None:
        raise _no_branch(full_id, revision)
    return Repository(full_id, False, private)


def _no_branch(repo_id: str, revision: str | None) -> UserError:
    return UserError(
        f"nothing was published: {repo_id} has no branch {revision!r}. Create it with `hf repos branch create "
        f"{repo_id} {revision}`"
    )


def _repository_info(
    repo_id: str, private: bool | None, token: str | None, revision: str | None, repo_type: str = "model"
) -> Any:
    """Return the Hub's info on a repository. Raises `UserError` as `create_repository`."""
    try:
        info = retried(lambda: HfApi().repo_info(repo_id, revision=revision, token=token, repo_type=repo_type))
    except RevisionNotFoundError as error:
        raise _no_branch(repo_id, revision) from error
    if private and not info.private:
        raise UserError(
            f"nothing was published: {repo_id} is public. Make it private in its settings, use another repository, or "
            "remove --private"
        )
    return info


def upload(directory: Path, repo_id: str, token: str | None, revision: str | None, commit_message: str) -> str:
    """Commit the files of `PUBLISHED`, and return the URL of the commit.

    Deletes other files of `REPLACED` in the repository: transformers would prefer a single file to the new shards,
    would load an adapter on top of a whole model, and would add tokens of another tokenizer.
    """
    names = sorted(file.name for file in directory.iterdir() if file.is_file() and published(file.name))

    def commit() -> str:
        # New operations for each attempt, because they store the state of the Hub. Large files that were uploaded
        # aren't sent again, and a commit whose response was lost isn't repeated.
        changes: list[CommitOperationAdd | CommitOperationDelete]
        changes = [CommitOperationAdd(name, directory / name) for name in names]
        remote = HfApi().list_repo_files(repo_id, revision=revision, token=token)
        stale = [name for name in remote if matches(name, REPLACED) and name not in names]
        changes += [CommitOperationDelete(name) for name in stale]
        done = HfApi().create_commit(repo_id, changes, commit_message=commit_message, token=token, revision=revision)
        return done.commit_url

    return retried(commit)


def published_lines(commit_url: str) -> str:
    """Return two lines for the user: the page of a published model, and its commit."""
    page, _, _ = commit_url.rpartition("/commit/")
    return f"published: {page}\ncommit: {commit_url}"


def published(name: str) -> bool:
    return matches(name, PUBLISHED)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name matches one of the glob patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_token(token: str | None) -> None:
    """Raise `UserError` if the token can't be sent in an HTTP header; the error of the HTTP client would show it."""
    token = token or get_token() or ""
    if not all("!" <= character <= "~" for character in token):
        raise UserError("the Hub token contains invalid characters. Log in again with `hf auth login`")


def retried(call: Callable[[], Response]) -> Response:
    """Call, and retry after a delay if the Hub fails or the connection is lost.

    huggingface_hub retries uploads of large files itself (then RuntimeError is final), but not the creation of
    repositories and commits.
    """
    for delay in RETRY_DELAYS:
        try:
            return call()
        except (httpx.TransportError, HfHubHTTPError, json.JSONDecodeError) as error:
            # JSONDecodeError: an HTML error page of a gateway
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            logger.warning("the Hub failed (%s): retrying in %g s", type(error).__name__, delay)
            time.sleep(delay)
    return call()
