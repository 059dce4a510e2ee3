"""Named evaluation sets, and the datasets they are loaded from.

The Hub ids are those of Parquet datasets, because `datasets` no longer runs loading scripts. AMI, Earnings-22 and
TED-LIUM are the test sets of the End-to-end Speech Benchmark (Gandhi et al. 2022), which the Open ASR Leaderboard used
first; its recent results on AMI and Earnings-22 are on re-transcribed versions.
"""

import difflib
import logging
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ESB = "hf-audio/esb-datasets-test-only-sorted"
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
# TED-LIUM's transcript of segments without transcription; the Open ASR Leaderboard excludes them as well
UNTRANSCRIBED = "ignore time segment in scoring"

# configurations of google/fleurs in languages of Whisper, and the four whose language code differs from Whisper's
FLEURS_CONFIGS = """
af_za am_et ar_eg as_in az_az be_by bg_bg bn_in bs_ba ca_es cs_cz cy_gb da_dk de_de el_gr en_us es_419 et_ee fa_ir
fi_fi fr_fr gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id is_is it_it ja_jp ka_ge kk_kz km_kh kn_in ko_kr
lb_lu ln_cd lo_la lt_lt lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm ne_np nl_nl oc_fr pa_in pl_pl ps_af
pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua ur_pk uz_uz
vi_vn yo_ng yue_hant_hk
"""
FLEURS = {config.partition("_")[0]: config for config in FLEURS_CONFIGS.split()}
FLEURS |= {"zh": "cmn_hans_cn", "no": "nb_no", "tl": "fil_ph", "jw": "jv_id"}
# languages whose Common Voice code differs from Whisper's
COMMON_VOICE = {"zh": "zh-CN", "sv": "sv-SE", "pa": "pa-IN", "ne": "ne-NP", "hy": "hy-AM", "nn": "nn-NO"}


@dataclass(frozen=True)
class DatasetSpec:
    """One split of one dataset, and how to read it."""

    name: str  # name of the set in reports and of its manifest files
    dataset: str
    config: str | None
    split: str
    # text_column_name, audio_column_name: None to find the column by name
    text_column_name: str | None = None
    audio_column_name: str | None = None
    speaker_column: str | None = None  # None for the first of `SPEAKER_COLUMNS` that exists
    language: str | None = None  # language of the speech, as a code such as `en`; None if unspecified
    task: str = "transcribe"  # `transcribe`, or `translate` with English references
    no_speech: bool = False  # whether no clip has speech: transcripts are empty or missing


LIBRISPEECH_CLEAN = DatasetSpec(
    "librispeech-test-clean", "openslr/librispeech_asr", "clean", "test", "text", "audio", "speaker_id", "en"
)
LIBRISPEECH_OTHER = replace(LIBRISPEECH_CLEAN, name="librispeech-test-other", config="other")
AMI = DatasetSpec("ami", ESB, "ami", "test", "text", "audio", None, "en")
EARNINGS = DatasetSpec("earnings22", ESB, "earnings22", "test", "text", "audio", None, "en")
TEDLIUM = DatasetSpec("tedlium", ESB, "tedlium", "test", "text", "audio", None, "en")

SUITES = {
    "librispeech": [LIBRISPEECH_CLEAN, LIBRISPEECH_OTHER],
    "librispeech-test-clean": [LIBRISPEECH_CLEAN],
    "librispeech-test-other": [LIBRISPEECH_OTHER],
    "ami": [AMI],
    "earnings22": [EARNINGS],
    "tedlium": [TEDLIUM],
    "open-asr": [LIBRISPEECH_CLEAN, LIBRISPEECH_OTHER, AMI, EARNINGS, TEDLIUM],
}
BY_LANGUAGE = ("common-voice", "fleurs")
SUITE_NAMES = (*SUITES, *BY_LANGUAGE)


def suite_sets(name: str, language: str | None = None) -> list[DatasetSpec]:
    """Return the sets of a suite.

    Args:
        language: for `common-voice` and `fleurs`, such as `fr` or `french`. The others are English.

    Raises `UserError` if the suite is unknown, or requires a language, or lacks this one.
    """
    from ..data.languages import language_code

    if name not in SUITE_NAMES:
        close = difflib.get_close_matches(name, SUITE_NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UserError(
            f"--suite must be one of {', '.join(SUITE_NAMES)}, got {name!r}{hint} Use --dataset for your own speech"
        )
    code = language_code(language)
    if name in SUITES:
        if code not in (None, "en"):
            raise UserError(
                f"--suite {name} is English: remove --language {language}, or evaluate it in a separate run"
            )
        return SUITES[name]
    if code is None:
        raise UserError(f"--suite {name} requires --language, such as --language fr")
    source: tuple[str, str, str, str, str, str | None]
    if name == "fleurs":
        if code not in FLEURS:
            raise UserError(f"--suite fleurs: --language must be one of {', '.join(sorted(FLEURS))}, got {language!r}")
        source = ("google/fleurs", FLEURS[code], "test", "transcription", "audio", None)
    else:
        # Mozilla has removed its own repositories from the Hub; this copy of version 17 has all columns
        config = COMMON_VOICE.get(code, code)
        source = ("fixie-ai/common_voice_17_0", config, "test", "sentence", "audio", "client_id")
    return [DatasetSpec(f"{name}-{code}", *source, code)]


def load_set(
    spec: DatasetSpec, limit: int | None = None, num_proc: int | None = None, text_required: bool = True
) -> "Dataset":
    """Return the first `limit` rows with the columns `audio`, `text`, `clip` and, if speakers are known, `speaker`.

    Raises `UserError` as `load_speech_dataset` does, and if the column `spec.speaker_column` doesn't exist.
    """
    from ..data import load_speech_dataset
    from ..data.text import without_times

    speech = load_speech_dataset(
        spec.dataset,
        spec.config,
        spec.split,
        audio_column_name=spec.audio_column_name,
        text_column_name=spec.text_column_name,
        text_required=text_required,
        num_proc=num_proc,
    )
    if limit is not None:
        speech = speech.select(range(min(limit, len(speech))))
    _warn_of_languages(spec, speech)
    columns = speech.column_names
    if spec.speaker_column and spec.speaker_column not in columns:
        raise UserError(
            f"{spec.dataset} has no column {spec.speaker_column!r}: --speaker_column must be one of "
            f"{', '.join(columns)}"
        )
    speech = with_speakers(without_times(speech, spec.language, spec.task), spec.speaker_column)
    kept = ("audio", "text", "clip", "speaker")
    return speech.select_columns([name for name in kept if name in speech.column_names])


def _warn_of_languages(spec: DatasetSpec, speech: "Dataset") -> None:
    """Warn if a column `language` has other languages than the one that all clips are transcribed in."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    from ..data.languages import language_code

    if "language" not in speech.column_names:
        return
    language = spec.language or "en"
    names = {re.split("[-_]", str(name).strip())[0] for name in set(speech["language"][:]) if name is not None}
    # others than Whisper's languages: the column may have another meaning
    others = sorted({code for name in names if (code := language_code(name)) in LANGUAGES and code != language})
    if others:
        logger.warning(
            "%s: its column `language` has %s, but all clips are taken for %s: leave them out, or change --language",
            spec.dataset,
            ", ".join(others),
            language,
        )


def with_speakers(speech: "Dataset", column: str | None = None) -> "Dataset":
    """Return `speech` with a column `speaker` of strings, None if unknown; without the column if all are unknown."""
    from ..data.columns import replace_column

    column = column or next((name for name in SPEAKER_COLUMNS if name in speech.column_names), None)
    if column is None:
        return speech
    # a missing speaker is None or "", or NaN in a column of numbers, which isn't equal to itself
    names = [None if name in (None, "") or name != name else str(name) for name in speech[column][:]]
    if any(names):
        return replace_column(speech, "speaker", names)
    return speech.remove_columns("speaker") if "speaker" in speech.column_names else speech


def is_untranscribed(text: str) -> bool:
    """Return whether a transcript is TED-LIUM's marker of an untranscribed segment."""
    return UNTRANSCRIBED in text.lower().replace("_", " ")
