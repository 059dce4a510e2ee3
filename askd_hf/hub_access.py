"""Tell local paths from Hub ids, and turn failures of the Hub into `UserError`s."""

import contextlib
import difflib
import json
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from .errors import UserError

UNREACHABLE = (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError, ConnectionError, TimeoutError)
PROBE_SECONDS = 10
REJECTED_CARD = "Invalid metadata in README.md"  # the start of huggingface_hub's ValueError


def expanded(name: str) -> str:
    """Return a path with `~` expanded, and other names as they are. The libraries would take `~` for a Hub id."""
    return os.path.expanduser(name)


def local_or_hub(name: str) -> bool:
    """Return True if `name` is a local file or directory, False if it can only be a Hub id.

    Raises `UserError` if it is written as a path (`./x`, `~/x`, `/x`, `a/b/c`) that doesn't exist.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return True
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UserError(f"no such file or directory: {name!r}{_did_you_mean(path)}")
    return False


def _did_you_mean(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" ({parent} does not exist either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f"; did you mean {str(parent / close[0])!r}?" if close else ""


@contextlib.contextmanager
def hub_access(what: str, name: str, repo_type: str = "model") -> Iterator[None]:
    """Turn failures of the Hub into `UserError`s, in code that may call it.

    Args:
        what: the thing that is loaded, for the message, such as "the model".
        name: local path or Hub id. For a local path the context does nothing.
        repo_type: "model" or "dataset".

    Raises:
        UserError: the Hub can't be reached, the repository or revision doesn't exist, or access is denied. Other
            errors pass unchanged.
    """
    if local_or_hub(name):
        yield
        return
    if not constants.HF_HUB_OFFLINE:
        # One request first: without a network, huggingface_hub 2 retries every file for half a minute, and
        # WhisperTokenizer.from_pretrained then returns an empty tokenizer rather than an error.
        _probe(what, name, repo_type)
    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        if isinstance(error, UserError):
            raise
        _raise_hub_error(error, what, name, repo_type)
        if constants.HF_HUB_OFFLINE and isinstance(error, OSError) and error.errno is None:
            # a library's own OSError without the cause, such as "Can't load feature extractor"
            _probe(what, name, repo_type)
        raise


@contextlib.contextmanager
def hub_upload(advice: str) -> Iterator[None]:
    """Turn any failure of an upload into a `UserError` that names the cause and ends with `advice`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, httpx.HTTPError, RuntimeError, ValueError) as error:
        # a failed upload of a large file raises RuntimeError, an answer of another server JSONDecodeError
        raise UserError(f"{_upload_failure(error)}; {advice}") from error


def _upload_failure(error: Exception) -> str:
    causes = list(_chain(error))
    if str(error).startswith(REJECTED_CARD):
        fields = [line.strip("- ") for line in str(error).splitlines()[1:]]
        help_ = "; give a license of its list with --license" if any('"license"' in field for field in fields) else ""
        return f"the Hub rejects the metadata of the card: {textwrap.shorten('; '.join(fields), 300)}{help_}"
    if not any(isinstance(cause, (httpx.HTTPError, json.JSONDecodeError, *UNREACHABLE)) for cause in causes):
        return f"nothing was published: {_first_lines(error)}"
    rejection = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    reason = _first_lines(rejection or error)
    if rejection is not None and rejection.response.status_code in (401, 403):
        reason += "; log in with `hf auth login` or set HF_TOKEN, with a token that has write access to the repository"
        return f"the Hub rejected the upload ({reason})"
    return f"the Hub rejected the upload or can't be reached ({reason})"


def _first_lines(error: Exception) -> str:
    """Return the first two lines of the message as one, without URLs: the URL of an upload is a secret."""
    lines = [line.strip() for line in re.sub(r"\s*for url:? \S+", "", str(error)).splitlines()]
    lines = [line for line in lines if line and not line.startswith("For more information check")]
    return " ".join(lines[:2]) or type(error).__name__


def _probe(what: str, name: str, repo_type: str) -> None:
    """Make one request without retries. Raises `UserError` if the Hub or the repository can't be reached."""
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=PROBE_SECONDS)
    except (OSError, ValueError, httpx.HTTPError) as error:
        _raise_hub_error(error, what, name, repo_type)
        raise


def _raise_hub_error(error: BaseException, what: str, name: str, repo_type: str) -> None:
    """Raise a `UserError` if `error` or one of its causes is a failure of the Hub."""
    for cause in _chain(error):
        if message := _explain(cause, name, repo_type):
            raise UserError(f"cannot load {what} {name!r}: {message}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _explain(error: BaseException, name: str, repo_type: str) -> str | None:
    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{name}"
    if isinstance(error, GatedRepoError):
        return f"access is restricted; request access at {page}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such {repo_type} on the Hub, and no such local directory{_did_you_mean(Path(name))}; "
            "if it is private, log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"no such revision; see {page}/tree/main"
    if isinstance(error, HFValidationError):
        return "neither a local directory nor a Hub id (NAME or OWNER/NAME)"
    if constants.HF_HUB_OFFLINE and isinstance(error, UNREACHABLE):
        return (
            "not in the local cache, and HF_HUB_OFFLINE is set. Give a local directory, or unset HF_HUB_OFFLINE; "
            "`make demo` runs without the Hub"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the Hub rejects the token, which may have expired: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, UNREACHABLE) or (isinstance(error, HfHubHTTPError) and error.response.status_code >= 429):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            f"the Hub at {constants.ENDPOINT} can't be reached ({reason}). Give a local directory, or set "
            f"HF_HUB_OFFLINE=1 if the {repo_type} is in the cache; `make demo` runs without the Hub"
        )
    return None
