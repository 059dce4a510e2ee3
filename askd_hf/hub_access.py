"""Telling local directories from Hub ids, and Hub failures from all others."""

import contextlib
import difflib
import json
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
REFUSED_CARD = "Invalid metadata in README.md"  # how huggingface_hub's ValueError begins


def local_or_hub(name: str) -> bool:
    """True if `name` is a file or directory here, False if it can only be a Hub id.

    Raises `UserError` if it is written as a path (`./x`, `~/x`, `/x`, `a/b/c`) and nothing is there.
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
    """Around a call that may reach the Hub: its failures there become one `UserError` each.

    Args:
        what: what is loaded, for the message, as in "the model".
        name: local path or Hub id. For a local path the context does nothing.
        repo_type: "model" or "dataset".

    Raises:
        UserError: the Hub can't be reached, or there is no such repository or revision, or no access to it. Other
            errors pass unchanged.
    """
    if local_or_hub(name):
        yield
        return
    if not constants.HF_HUB_OFFLINE:
        # huggingface_hub 2 retries every file for half a minute: without this probe it takes minutes to learn that
        # there is no network, and WhisperTokenizer.from_pretrained then returns an empty tokenizer, not an error.
        _probe(what, name, repo_type)
    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        if isinstance(error, UserError):
            raise
        _raise_hub_error(error, what, name, repo_type)
        if constants.HF_HUB_OFFLINE and isinstance(error, OSError) and error.errno is None:
            # An OSError that a library made up, such as "Can't load feature extractor", with the cause left out.
            _probe(what, name, repo_type)
        raise


@contextlib.contextmanager
def hub_upload(advice: str) -> Iterator[None]:
    """Around an upload: any failure becomes one `UserError` that says whose it is and ends with `advice`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, httpx.HTTPError, RuntimeError, ValueError) as error:
        # a failed upload of one large file comes as RuntimeError, an answer that isn't the Hub's as JSONDecodeError
        raise UserError(f"{_upload_failure(error)}; {advice}") from error


def _upload_failure(error: Exception) -> str:
    causes = list(_chain(error))
    if str(error).startswith(REFUSED_CARD):
        fields = [line.strip("- ") for line in str(error).splitlines()[1:]]
        help_ = "; give one that it knows with --license" if any('"license"' in field for field in fields) else ""
        return f"the Hub refuses the metadata of the card: {textwrap.shorten('; '.join(fields), 300)}{help_}"
    if not any(isinstance(cause, (httpx.HTTPError, json.JSONDecodeError, *UNREACHABLE)) for cause in causes):
        return f"nothing was published: {_first_lines(error)}"
    refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    reason = _first_lines(refusal or error)
    if refusal is not None and refusal.response.status_code in (401, 403):
        reason += "; log in with `hf auth login`, or set HF_TOKEN, with a token that may write there"
    return f"the Hub refused or can't be reached ({reason})"


def _first_lines(error: Exception) -> str:
    """Two lines of its message as one, without addresses: that of an upload is as good as a password."""
    lines = [line.strip() for line in re.sub(r"\s*for url:? \S+", "", str(error)).splitlines()]
    lines = [line for line in lines if line and not line.startswith("For more information check")]
    return " ".join(lines[:2]) or type(error).__name__


def _probe(what: str, name: str, repo_type: str) -> None:
    """One request without retries. Raises `UserError` if the Hub or the repository isn't there for us."""
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=PROBE_SECONDS)
    except (OSError, ValueError, httpx.HTTPError) as error:
        _raise_hub_error(error, what, name, repo_type)
        raise


def _raise_hub_error(error: BaseException, what: str, name: str, repo_type: str) -> None:
    """Raise the `UserError` for a Hub failure found along the chain of causes of `error`; return if there is none."""
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
        return f"access to it is restricted; ask for access at {page}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such {repo_type} on the Hub, and no such directory here{_did_you_mean(Path(name))}; "
            "if it is private, log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision; see {page}/tree/main"
    if isinstance(error, HFValidationError):
        return "that is neither a directory here nor a Hub id (NAME or OWNER/NAME)"
    if constants.HF_HUB_OFFLINE and isinstance(error, UNREACHABLE):
        return (
            "it isn't in the local cache, and the Hub can't be reached because HF_HUB_OFFLINE is set. Give a local "
            "directory, or unset it; `make demo` runs without the Hub"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the Hub refuses your token, which may have expired: log in with `hf auth login`, or set HF_TOKEN anew"
    if isinstance(error, UNREACHABLE) or (isinstance(error, HfHubHTTPError) and error.response.status_code >= 429):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            f"the Hub at {constants.ENDPOINT} can't be reached ({reason}). Give a local directory, or set "
            "HF_HUB_OFFLINE=1 if it was downloaded before; `make demo` runs without the Hub"
        )
    return None
