"""Word and character error rate, in percent, of normalized texts."""

import importlib
from collections.abc import Callable, Iterable

import datasets
import jiwer
import numpy as np
from transformers import EvalPrediction, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..arguments import Normalizer
from ..data.languages import UNSPACED, language_code
from ..errors import UserError
from .evaluate_library import Metric, MetricInfo
from .normalizers import MultilingualNormalizer, TextNormalizer, agree_on_optional_marks, unify_punctuation

UNIFIED = "english-unified"
MULTILINGUAL = "multilingual"
LEADERBOARD = "open-asr-leaderboard"
# what their names say in tables and cards
MEANING = {
    UNIFIED: "Whisper's English normalizer, after apostrophes, quotes and dots were brought into one form",
    MULTILINGUAL: "without case, punctuation and variants of spelling, combining marks kept",
    "english": "Whisper's own",
    "basic": "Whisper's own",
    LEADERBOARD: "that of the Open ASR Leaderboard's code as it was then",
    "none": "the texts as they are",
}
# where words aren't between spaces they are scored by letter, as OpenAI does
BY_LETTER = f"{MULTILINGUAL}, by letter"
BASIC_BY_LETTER = "basic, by letter"


class ErrorRate(Metric):
    """Corpus-level WER and CER. `evaluate.load("wer")` would fetch its script from the Hub; this one works offline.

    `compute(predictions=..., references=...)` takes lists of strings and gives `{"wer": ..., "cer": ...}`, in percent:
    all edits of the corpus over all words (characters) of the references.
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Word and character error rate in percent (jiwer)",
            citation="",
            inputs_description="predictions and references: one string a clip",
            features=datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("string")),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            "wer": 100 * jiwer.wer(references, predictions),
            "cer": 100 * jiwer.cer(references, predictions),
        }


def normalizer_for(name: str, language: str | None, spelling: dict[str, str]) -> tuple[str, TextNormalizer]:
    """A text normalizer and its name in tables, cards and results.

    Args:
        name: `english`: Whisper's for English, which expands contractions, drops fillers, writes numbers in digits and
            British words as American ones; `english-unified`: the same after `unify_punctuation`; `basic`: Whisper's
            for all other languages: lower case, no punctuation, no combining marks, and in those of `UNSPACED` every
            letter is a word (`BASIC_BY_LETTER`); `multilingual`: `MultilingualNormalizer` (there `BY_LETTER`);
            `open-asr-leaderboard`: see `leaderboard_normalizer`; `none`: only white space is squeezed; `auto`:
            english-unified for English, multilingual for the rest.
        language: of the texts, a code or a name; None, where a model knows English only, counts as English.
        spelling: British to American words, from a model's `normalizer.json`.

    Raises:
        UserError: `open-asr-leaderboard` of another language, or without its code.
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
    return name, TextNormalizer(english if name == "english" else str)


def text_language(task: str, language: str | None) -> str | None:
    """Of the texts of speech in `language`: translations are English."""
    return "en" if task == "translate" else language


def meaning_of(names: Iterable[str]) -> str:
    """What normalizers of these names, as `normalizer_for` gives them, do: for a note below a table."""
    kinds = {name.partition(",")[0] for name in names}
    told = [f"{name}: {meaning}" for name, meaning in MEANING.items() if name in kinds]
    by_letter = ["by letter: every letter is a word"] if {BY_LETTER, BASIC_BY_LETTER} & set(names) else []
    return "; ".join(told + by_letter)


def leaderboard_normalizer(language: str) -> Callable[[str], str]:
    """The English normalizer of the Open ASR Leaderboard, as it is in the checkout on the PYTHONPATH.

    It was Whisper's (`english`) until it was forked; now it changes from month to month, and no package has it.

    Raises `UserError` for other languages, and if there is no such checkout.
    """
    if language != "en":
        raise UserError(f"--normalizer {LEADERBOARD} is for English, not {language}: choose multilingual or basic")
    try:
        module = importlib.import_module("normalizer.normalizer")
        return module.EnglishTextNormalizer()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"--normalizer {LEADERBOARD} needs the leaderboard's own code ({error}): "
            "git clone https://github.com/huggingface/open_asr_leaderboard, and set PYTHONPATH to that directory"
        ) from None


def text_normalizer(processor: WhisperProcessor, language: str | None, name: Normalizer = "auto") -> TextNormalizer:
    """`normalizer_for` with the spelling list that came with a model; one without it leaves spelling alone."""
    return normalizer_for(name, language, processor.tokenizer.english_spelling_normalizer or {})[1]


def normalize_pairs(
    references: list[str], predictions: list[str], normalize: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """References and predictions normalized, clip by clip.

    After `MultilingualNormalizer` vowel signs that are optional in writing count only where a prediction contradicts
    its reference (`agree_on_optional_marks`). The references depend on no prediction.
    """
    references, predictions = ([normalize(text) for text in texts] for texts in (references, predictions))
    if isinstance(normalize, MultilingualNormalizer):
        return agree_on_optional_marks(references, predictions)
    return references, predictions


def error_rates(predictions: list[str], references: list[str], normalize: Callable[[str], str]) -> dict[str, float]:
    """WER and CER in percent of the normalized texts.

    After a normalizer by letter the spaces between the letters are no characters.
    """
    by_letter = isinstance(normalize, TextNormalizer) and normalize.by_letter
    return _rates(*normalize_pairs(references, predictions, normalize), [by_letter] * len(references))


def characters(text: str, by_letter: bool) -> str:
    """What the CER is of: the normalized text, without spaces where these only part letters."""
    return text.replace(" ", "") if by_letter else text


def _rates(references: list[str], predictions: list[str], by_letter: list[bool]) -> dict[str, float]:
    """Of normalized texts; `by_letter` clip by clip."""
    rates = ErrorRate(keep_in_memory=True).compute(references=references, predictions=predictions)
    if any(by_letter):
        said, heard = (list(map(characters, side, by_letter)) for side in (references, predictions))
        rates["cer"] = 100 * jiwer.cer(said, heard)
    return rates


def compute_metrics_for(
    processor: WhisperProcessor, name: Normalizer, language: str | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's `compute_metrics` on generated tokens and labels, both `(clips, tokens)`, padded with -100 or not.

    Args:
        name: of the normalizer, see `normalizer_for`.
        language: of labels that don't name their language, as those of an English-only model don't.
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
            said, task = (token.strip("<|>") for token in tokenizer.convert_ids_to_tokens(list(pair)))
            said = text_language(task, said if said in LANGUAGES else language)
            normalizers[pair] = normalizer_for(name, said, spelling)[1]
        of_clip = [normalizers[tuple(pair)] for pair in labels[:, :2].tolist()]
        heard, known = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (predictions, labels))
        normalized = [
            normalize_pairs([reference], [prediction], normalize)
            for reference, prediction, normalize in zip(known, heard, of_clip, strict=True)
        ]
        references = [reference for (reference,), _ in normalized]
        return _rates(references, [prediction for _, (prediction,) in normalized], [n.by_letter for n in of_clip])

    return compute_metrics
