"""Named sets of speech to evaluate on, and the datasets they are loaded from.

The Hub ids are those of datasets in parquet: `datasets` 4 runs no loading scripts. AMI, Earnings-22 and TED-LIUM are
the test sets of the Open ASR Leaderboard as it has had them from the start, of the End-to-end Speech Benchmark (Gandhi
et al. 2022); its recent figures on AMI and Earnings-22 are on re-transcribed ones.
"""

import difflib
from dataclasses import dataclass, replace

from datasets import Dataset

from ..data import load_speech_dataset
from ..data.columns import replace_column
from ..data.text import without_times
from ..errors import UserError
from .metrics import language_code

ESB = "hf-audio/esb-datasets-test-only-sorted"
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
# TED-LIUM's transcript of stretches that nobody transcribed; the Open ASR Leaderboard drops it as well
UNTRANSCRIBED = "ignore time segment in scoring"

# configurations of google/fleurs that Whisper has the language of, and the four whose code isn't Whisper's
FLEURS_CONFIGS = """
af_za am_et ar_eg as_in az_az be_by bg_bg bn_in bs_ba ca_es cs_cz cy_gb da_dk de_de el_gr en_us es_419 et_ee fa_ir
fi_fi fr_fr gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id is_is it_it ja_jp ka_ge kk_kz km_kh kn_in ko_kr
lb_lu ln_cd lo_la lt_lt lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm ne_np nl_nl oc_fr pa_in pl_pl ps_af
pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua ur_pk uz_uz
vi_vn yo_ng yue_hant_hk
"""
FLEURS = {config.partition("_")[0]: config for config in FLEURS_CONFIGS.split()}
FLEURS |= {"zh": "cmn_hans_cn", "no": "nb_no", "tl": "fil_ph", "jw": "jv_id"}
# Common Voice calls most languages as Whisper does
COMMON_VOICE = {"zh": "zh-CN", "sv": "sv-SE", "pa": "pa-IN", "ne": "ne-NP", "hy": "hy-AM", "nn": "nn-NO"}


@dataclass(frozen=True)
class EvalSet:
    """One split of one dataset.

    Attributes:
        name: as reports and the files of its manifests call it.
        dataset, config, split: as `load_speech_dataset` takes them.
        text_column, audio_column: None: found by name.
        speaker_column: None: the first of `SPEAKER_COLUMNS` that is there.
        language: what is spoken, as a code such as `en`; None if it wasn't said.
        task: transcribe, or translate, with English references.
        no_speech: nobody speaks in any clip: the transcripts are empty, or there are none.
    """

    name: str
    dataset: str
    config: str | None
    split: str
    text_column_name: str | None = None
    audio_column_name: str | None = None
    speaker_column: str | None = None
    language: str | None = None
    task: str = "transcribe"
    no_speech: bool = False


LIBRISPEECH_CLEAN = EvalSet(
    "librispeech-test-clean", "openslr/librispeech_asr", "clean", "test", "text", "audio", "speaker_id", "en"
)
LIBRISPEECH_OTHER = replace(LIBRISPEECH_CLEAN, name="librispeech-test-other", config="other")
AMI = EvalSet("ami", ESB, "ami", "test", "text", "audio", None, "en")
EARNINGS = EvalSet("earnings22", ESB, "earnings22", "test", "text", "audio", None, "en")
TEDLIUM = EvalSet("tedlium", ESB, "tedlium", "test", "text", "audio", None, "en")

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


def suite_sets(name: str, language: str | None = None) -> list[EvalSet]:
    """The sets of a suite.

    Args:
        name: one of `SUITE_NAMES`.
        language: for `common-voice` and `fleurs`, as in `fr` or `french`. The others are English.

    Raises:
        UserError: no such suite; no language, or one that the suite doesn't have.
    """
    if name not in SUITE_NAMES:
        close = difflib.get_close_matches(name, SUITE_NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UserError(f"--suite {name}: there are {', '.join(SUITE_NAMES)}{hint} Your own speech: --dataset")
    code = language_code(language)
    if name in SUITES:
        if code not in (None, "en"):
            raise UserError(f"--suite {name} is English: leave out --language {language}, or run it apart")
        return SUITES[name]
    if code is None:
        raise UserError(f"--suite {name} has many languages: choose one, as in --language fr")
    source: tuple[str, str, str, str, str, str | None]
    if name == "fleurs":
        if code not in FLEURS:
            raise UserError(f"--suite fleurs hasn't --language {language}; it has {', '.join(sorted(FLEURS))}")
        source = ("google/fleurs", FLEURS[code], "test", "transcription", "audio", None)
    else:
        # Mozilla has taken its own repositories from the Hub; this copy of version 17 has all columns
        config = COMMON_VOICE.get(code, code)
        source = ("fixie-ai/common_voice_17_0", config, "test", "sentence", "audio", "client_id")
    return [EvalSet(f"{name}-{code}", *source, code)]


def load_set(
    source: EvalSet, limit: int | None = None, num_proc: int | None = None, text_required: bool = True
) -> Dataset:
    """A set's first `limit` rows with the columns `audio`, `text`, `clip` and, where speakers are known, `speaker`.

    Raises `UserError` as `load_speech_dataset` does, and if there is no `source.speaker_column`.
    """
    speech = load_speech_dataset(
        source.dataset,
        source.config,
        source.split,
        audio_column_name=source.audio_column_name,
        text_column_name=source.text_column_name,
        text_required=text_required,
        num_proc=num_proc,
    )
    if limit is not None:
        speech = speech.select(range(min(limit, len(speech))))
    columns = speech.column_names
    if source.speaker_column and source.speaker_column not in columns:
        raise UserError(
            f"{source.dataset}: no column {source.speaker_column!r} for the speaker; the columns are "
            f"{', '.join(columns)} (--speaker_column)"
        )
    speech = with_speakers(without_times(speech, source.language, source.task), source.speaker_column)
    kept = ("audio", "text", "clip", "speaker")
    return speech.select_columns([name for name in kept if name in speech.column_names])


def with_speakers(speech: Dataset, column: str | None = None) -> Dataset:
    """`speech` with a column `speaker` of strings, None where it isn't known; without one where none is.

    Args:
        column: where they are. Default: the first of `SPEAKER_COLUMNS` that is there.
    """
    column = column or next((name for name in SPEAKER_COLUMNS if name in speech.column_names), None)
    if column is None:
        return speech
    # a missing one is None or "", or in a column of numbers NaN, which isn't equal to itself
    names = [None if name in (None, "") or name != name else str(name) for name in speech[column][:]]
    if any(names):
        return replace_column(speech, "speaker", names)
    return speech.remove_columns("speaker") if "speaker" in speech.column_names else speech


def is_untranscribed(text: str) -> bool:
    """Whether a transcript says that there is none."""
    return UNTRANSCRIBED in text.lower().replace("_", " ")
