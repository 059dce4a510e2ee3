"""Word and character error rates of normalized texts, in percent."""

import importlib
from collections.abc import Callable, Iterable

import datasets
import jiwer
import numpy as np
from transformers import EvalPrediction, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..arguments import NORMALIZERS, Normalizer
from ..data.languages import UNSPACED, language_code
from ..errors import UserError
from .evaluate_library import Metric, MetricInfo
from .normalizers import MultilingualNormalizer, TextNormalizer, agree_on_optional_marks, unify_punctuation
from .word_errors import capped_errors, count_errors, is_loop

UNIFIED = "english-unified"
MULTILINGUAL = "multilingual"
LEADERBOARD = "open-asr-leaderboard"
# languages without spaces between words are scored by letter, as by OpenAI
BY_LETTER = f"{MULTILINGUAL}, by letter"
BASIC_BY_LETTER = "basic, by letter"


class ErrorRate(Metric):
    """Corpus-level WER and CER. Works offline, unlike `evaluate.load("wer")`, which downloads its script from the Hub.

    `compute(predictions=..., references=...)` takes lists of strings and returns `{"wer": ..., "cer": ...}`: all edits
    of the corpus divided by all words (characters) of the references, in percent.
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Word and character error rate in percent (jiwer)",
            citation="",
            inputs_description="predictions and references: one string per clip",
            features=datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("string")),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            "wer": 100 * jiwer.wer(references, predictions),
            "cer": 100 * jiwer.cer(references, predictions),
        }


def normalizer_for(name: str, language: str | None, spelling: dict[str, str]) -> tuple[str, TextNormalizer]:
    """Return a text normalizer and its name in tables, cards and results.

    Args:
        name: one of `NORMALIZERS`, or `auto`: `english-unified` for English, `multilingual` for other languages.
            `basic` and `multilingual` make each letter a word in the languages of `UNSPACED`, and are then called
            `BASIC_BY_LETTER` and `BY_LETTER`. `none` only collapses white space.
        language: language of the texts, a code or a name; None (an English-only model) counts as English.
        spelling: British to American words, from a model's `normalizer.json`.

    Raises `UserError` if `open-asr-leaderboard` is requested for another language, or isn't installed.
    """
    code = language_code(language) or "en"
    if name == "auto":
        name = UNIFIED if code == "en" else MULTILINGUAL
    by_letter = code in UNSPACED
    if name == MULTILINGUAL:
        return BY_LETTER if by_letter else name, MultilingualNormalizer(code)
    if name == "basic":
        normalize = BasicTextNormalizer(split_letters=by_letter)
        return BASIC_BY_LETTER if by_letter else name, TextNormalizer(normalize, by_letter)
    english = EnglishTextNormalizer(spelling)
    if name == UNIFIED:
        return name, TextNormalizer(lambda text: english(unify_punctuation(text)))
    if name == LEADERBOARD:
        return name, TextNormalizer(leaderboard_normalizer(code))
    if name not in ("english", "none"):
        raise UserError(f"no normalizer is named {name!r}: choose auto, {', '.join(NORMALIZERS)} or none")
    return name, TextNormalizer(english if name == "english" else str)


def text_language(task: str, language: str | None) -> str | None:
    """Return the language of the texts: English for translations, else the language of the speech."""
    return "en" if task == "translate" else language


def describe_normalizers(names: Iterable[str]) -> str:
    """Describe normalizers, by the names that `normalizer_for` returns, in a note below a table."""
    kinds = {name.partition(",")[0] for name in names}
    described = [f"{name}: {description}" for name, description in NORMALIZERS.items() if name in kinds]
    by_letter = ["by letter: each letter is a word"] if {BY_LETTER, BASIC_BY_LETTER} & set(names) else []
    return "; ".join(described + by_letter)


def leaderboard_normalizer(language: str) -> Callable[[str], str]:
    """Return the English normalizer of the Open ASR Leaderboard, from its checkout on the PYTHONPATH.

    It is a fork of Whisper's (`english`) that changes frequently and isn't released as a package.

    Raises `UserError` for other languages, and if there is no checkout.
    """
    if language != "en":
        raise UserError(f"--normalizer {LEADERBOARD} supports English only, got {language}. Use multilingual or basic")
    try:
        module = importlib.import_module("normalizer.normalizer")
        return module.EnglishTextNormalizer()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"--normalizer {LEADERBOARD} requires the leaderboard's code ({error}). Run "
            "git clone https://github.com/huggingface/open_asr_leaderboard, and set PYTHONPATH to that directory"
        ) from None


def text_normalizer(processor: WhisperProcessor, language: str | None, name: Normalizer = "auto") -> TextNormalizer:
    """Return the normalizer of `normalizer_for` with the model's spelling list; without one, spelling is unchanged."""
    return normalizer_for(name, language, processor.tokenizer.english_spelling_normalizer or {})[1]


def normalize_pairs(
    references: list[str], predictions: list[str], normalize: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """Return normalized references and predictions.

    For `MultilingualNormalizer`, optional vowel signs count only if a prediction contradicts its reference
    (`agree_on_optional_marks`). The normalized references don't depend on the predictions.
    """
    references, predictions = ([normalize(text) for text in texts] for texts in (references, predictions))
    if isinstance(normalize, MultilingualNormalizer):
        return agree_on_optional_marks(references, predictions)
    return references, predictions


def error_rates(predictions: list[str], references: list[str], normalize: Callable[[str], str]) -> dict[str, float]:
    """Return WER and CER of the normalized texts in percent.

    If the normalizer makes each letter a word, the spaces between letters aren't counted as characters.
    """
    by_letter = isinstance(normalize, TextNormalizer) and normalize.by_letter
    return _rates(*normalize_pairs(references, predictions, normalize), [by_letter] * len(references))


def characters(text: str, by_letter: bool) -> str:
    """Return the text that the CER is computed on: without spaces if they only separate letters."""
    return text.replace(" ", "") if by_letter else text


def _rates(references: list[str], predictions: list[str], by_letter: list[bool]) -> dict[str, float]:
    """Return the error rates of normalized texts; `by_letter` is per clip."""
    rates = ErrorRate(keep_in_memory=True).compute(references=references, predictions=predictions)
    if any(by_letter):
        reference_texts, texts = (list(map(characters, side, by_letter)) for side in (references, predictions))
        rates["cer"] = 100 * jiwer.cer(reference_texts, texts)
    return rates


def _robust_rates(references: list[str], predictions: list[str]) -> dict[str, float]:
    """Return the WER with at most as many errors as words per clip, in percent, and the number of loops."""
    lengths = np.array([len(reference.split()) for reference in references])
    errors = capped_errors(count_errors(jiwer.process_words(references, predictions)).total, lengths)
    loops = sum(map(is_loop, references, predictions))
    return {"capped_wer": 100 * float(errors.sum()) / max(int(lengths.sum()), 1), "loops": float(loops)}


def compute_metrics_for(
    processor: WhisperProcessor, name: Normalizer, language: str | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function for Trainer: WER, CER, capped WER (all in percent) and the number of loops.

    Its inputs are generated tokens and labels, `(clips, tokens)` each, padded with -100 or the padding token. As in
    `askd-hf evaluate`, clips whose reference is empty after normalization don't count, unless all are.

    Args:
        name: name of the normalizer, see `normalizer_for`.
        language: language of labels without a language token, as those of an English-only model.
    """
    tokenizer = processor.tokenizer
    spelling = tokenizer.english_spelling_normalizer or {}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = (
            np.where(ids == -100, tokenizer.pad_token_id, ids)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        normalizers: dict[tuple[int, ...], TextNormalizer] = {}
        for pair in {tuple(pair) for pair in labels[:, :2].tolist()}:
            spoken, task = (token.strip("<|>") for token in tokenizer.convert_ids_to_tokens(list(pair)))
            written = text_language(task, spoken if spoken in LANGUAGES else language)
            normalizers[pair] = normalizer_for(name, written, spelling)[1]
        of_clip = [normalizers[tuple(pair)] for pair in labels[:, :2].tolist()]
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (labels, predictions)]
        normalized = [
            normalize_pairs([reference], [prediction], normalize)
            for reference, prediction, normalize in zip(*texts, of_clip, strict=True)
        ]
        scored = [row for row, (reference, _) in enumerate(normalized) if reference[0]] or range(len(normalized))
        references, predictions = ([normalized[row][side][0] for row in scored] for side in (0, 1))
        rates = _rates(references, predictions, [of_clip[row].by_letter for row in scored])
        return rates | _robust_rates(references, predictions)

    return compute_metrics
