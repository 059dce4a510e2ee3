"""Load an evaluation set, validate its clips, and group them by the method that decodes them."""

import dataclasses
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ..data import Limits, filter_invalid_clips
from ..data.columns import longest_first, replace_column
from ..errors import UserError
from .long_form import Method, concatenate_clips
from .results import LongClips
from .suites import UNTRANSCRIBED, DatasetSpec, is_untranscribed, load_set

logger = logging.getLogger(__name__)


@dataclass
class PreparedSet:
    """The clips of a set that one method decodes, longest first, so that a shortage of memory shows immediately."""

    spec: DatasetSpec  # what was loaded; its name is used in the results and for the manifest files
    method: Method
    clips: Dataset  # columns `audio`, `text` (never None), `clip`, `duration`, `audio_key` and, if known, `speaker`
    excluded: dict[str, int]  # number of clips that aren't decoded, by reason
    long_clips: LongClips | None = None  # see `SetResult`

    def digest(self) -> str:
        """Return a digest of audio, transcripts and speakers in order: 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.clips.remove_columns(["audio", "clip"]):
            digest.update(json.dumps([row["audio_key"], row["text"], row.get("speaker")]).encode())
        return digest.hexdigest()


def prepare_set(
    spec: DatasetSpec,
    *,
    window: float,
    long_form: list[Method] | None = None,
    concatenate_seconds: float | None = None,
    limit: int | None = None,
    on_bad_audio: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
    recheck: bool = False,
    report_file: Path | None = None,
) -> list[PreparedSet]:
    """Load a set and validate every clip.

    An empty transcript means that the clip has no speech; a set of such clips only requires `spec.no_speech`. A clip
    without a transcript (None) is excluded.

    Args:
        window: seconds of audio that the model takes at a time, or fewer. Longer clips are excluded and counted.
        long_form: methods for the longer clips, each a set of its own: `NAME-sequential`, `NAME-chunked`.
        concatenate_seconds: evaluate these methods on recordings of up to this many seconds, made of consecutive
            transcribed clips.
        limit, num_proc: see `load_set`.
        on_bad_audio, recheck, report_file: see `filter_invalid_clips`; for audio that can't be decoded.

    Raises:
        UserError: as `load_set` and `filter_invalid_clips`; `concatenate_seconds` isn't greater than `window`; the
            transcripts contradict `spec.no_speech`; or no clip is left to decode.
    """
    if concatenate_seconds is not None and concatenate_seconds <= window:
        raise UserError(
            f"--concatenate_seconds must be greater than the model's window ({window:g} s), got "
            f"{concatenate_seconds:g}"
        )
    speech = load_set(spec, limit, num_proc, text_required=not spec.no_speech)
    _check_transcripts(spec, speech)
    options: dict[str, Any] = dict(
        limits=Limits(math.inf),
        on_bad_audio=on_bad_audio,
        num_proc=num_proc,
        recheck=recheck,
        share_work=True,
        split=spec.name,
    )
    valid = filter_invalid_clips(speech, None, report_file=report_file, **options)
    invalid = len(speech) - len(valid)
    excluded = {"audio that can't be decoded": invalid} if invalid else {}
    texts = valid["text"][:]
    empty = [row for row, text in enumerate(texts) if text is not None and not text.strip()]
    if empty and not spec.no_speech:
        logger.warning(
            "%s: %d of %d clips have an empty transcript and count as clips without speech, such as %s",
            spec.name,
            len(empty),
            len(texts),
            valid["clip"][empty[0]],
        )
    valid = replace_column(valid, "text", [text or "" for text in texts])
    if None in texts and not spec.no_speech:
        valid = valid.select([row for row, text in enumerate(texts) if text is not None])
        excluded["no transcript (null)"] = texts.count(None)

    short = longest_first(valid, 0.0, window)
    long = longest_first(valid, window, math.inf)
    prepared = []
    if len(short):
        too_long = {f"longer than {window:g} s": len(long)} if len(long) else {}
        prepared.append(PreparedSet(spec, "short_form", short, excluded | too_long, _long_clips(short, long, window)))
    name = spec.name
    if long_form and concatenate_seconds is not None:
        name += "-joined"
        transcribed = valid.select([row for row, text in enumerate(valid["text"]) if not is_untranscribed(text)])
        if len(transcribed) < len(valid):
            excluded = excluded | {UNTRANSCRIBED: len(valid) - len(transcribed)}
        joined = concatenate_clips(transcribed, concatenate_seconds) if len(transcribed) else transcribed
        long = longest_first(filter_invalid_clips(joined, None, **options)) if len(joined) else joined
    if long_form and not len(long):
        logger.warning(
            "%s: no clips for --long_form: none is longer than %g s. Use --concatenate_seconds", spec.name, window
        )
    for method in long_form or []:
        if len(long):
            prepared.append(PreparedSet(dataclasses.replace(spec, name=f"{name}-{method}"), method, long, excluded))
    if not prepared:
        raise UserError(
            f"{spec.name}: all clips are longer than {window:g} s, the model's window or --max_duration_in_seconds. "
            "For longer clips use --long_form sequential or chunked"
        )
    return prepared


def _long_clips(short: Dataset, long: Dataset, window: float) -> LongClips | None:
    """Return what the clips are that are longer than the window; None if there are none."""
    if not len(long):
        return None
    kept, left_out = (sum(map(len, clips["text"])) for clips in (short, long))
    speakers: set[str] = set()
    if "speaker" in long.column_names:
        speakers = {speaker for speaker in long["speaker"] if speaker} - set(short["speaker"])
    share = 100 * left_out / max(kept + left_out, 1)
    return LongClips(window, len(long), len(short) + len(long), share, sorted(speakers))


def _check_transcripts(spec: DatasetSpec, speech: Dataset) -> None:
    """Raise `UserError` if a set without speech has transcripts, or one with speech has none."""
    spoken = [row for row, text in enumerate(speech["text"]) if text and text.strip() and not is_untranscribed(text)]
    if spec.no_speech and spoken:
        row = speech.select_columns(["clip", "text"])[spoken[0]]
        raise UserError(
            f"{spec.name}: --no_speech requires clips without transcripts, but {len(spoken)} of {len(speech)} have "
            f"one, such as {row['clip']}: {row['text'][:40]!r}. Remove --no_speech, or evaluate those clips separately"
        )
    if not spec.no_speech and not spoken:
        raise UserError(
            f"{spec.name}: none of {len(speech)} clips has a transcript. If they have no speech, use --no_speech "
            "True: any text then counts as a hallucination. Otherwise set --text_column_name, or transcribe them first"
        )


def spread_clips(sets: list[PreparedSet], count: int) -> tuple[DatasetSpec, Dataset]:
    """Return up to `count` clips at equal distances in the first short-form set, and the spec of that set.

    Raises `UserError` if there is no short-form set.
    """
    prepared = next((prepared for prepared in sets if prepared.method == "short_form"), None)
    if prepared is None:
        raise UserError(
            "--speed and --speculative require a set with clips of at most one window. Remove these options"
        )
    return prepared.spec, spread(prepared.clips, count)


def spread(clips: Dataset, count: int) -> Dataset:
    """Return up to `count` clips at equal distances."""
    total = len(clips)
    count = min(count, total)
    return clips.select([i * total // count for i in range(count)])
