"""Word and character error rate, in percent, of texts normalised as Whisper's authors do."""

from collections.abc import Callable
from typing import Literal

import datasets
import jiwer
import numpy as np
from transformers import EvalPrediction, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from .data.languages import UNSPACED, language_code
from .evaluate_library import Metric, MetricInfo

# where words aren't between spaces they are scored by letter, as OpenAI does
BY_LETTER = "basic, by letter"
Normalizer = Literal["auto", "english", "basic", "none"]


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


def normalizer_for(
    name: Normalizer, language: str | None, spelling: dict[str, str]
) -> tuple[str, Callable[[str], str]]:
    """A text normaliser and its name.

    Args:
        name: `english`: Whisper's for English, which expands contractions, drops fillers, writes numbers in digits and
            British words as American ones; `basic`: Whisper's for all other languages: lower case, no punctuation, and
            in those of `UNSPACED` every letter is a word (`BY_LETTER`); `none`: only white space is squeezed; `auto`:
            english for English, basic for the rest.
        language: of the texts, a code or a name; None, where a model knows English only, counts as English.
        spelling: British to American words, from a model's `normalizer.json`.
    """
    code = language_code(language) or "en"
    if name == "auto":
        name = "english" if code == "en" else "basic"
    if name == "english":
        normalize = EnglishTextNormalizer(spelling)
    elif name == "basic":
        name = BY_LETTER if code in UNSPACED else name
        normalize = BasicTextNormalizer(split_letters=name == BY_LETTER)
    else:
        normalize = str
    return name, lambda text: " ".join(normalize(text).split())


def text_normalizer(
    processor: WhisperProcessor, language: str | None, name: Normalizer = "auto"
) -> Callable[[str], str]:
    """`normalizer_for` with the spelling list that came with a model; one without it leaves spelling alone."""
    return normalizer_for(name, language, processor.tokenizer.english_spelling_normalizer or {})[1]


def error_rates(predictions: list[str], references: list[str], normalize: Callable[[str], str]) -> dict[str, float]:
    """WER and CER in percent of the normalised texts."""
    metric = ErrorRate(keep_in_memory=True)
    return metric.compute(
        predictions=[normalize(text) for text in predictions], references=[normalize(text) for text in references]
    )


def compute_metrics_for(
    processor: WhisperProcessor, name: Normalizer, language: str | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's `compute_metrics` on generated tokens and labels, both `(clips, tokens)`, padded with -100 or not.

    Args:
        name: of the normaliser, see `normalizer_for`.
        language: of labels that don't name their language, as those of an English-only model don't.
    """
    tokenizer = processor.tokenizer
    spelling = tokenizer.english_spelling_normalizer or {}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = (
            np.where(ids == -100, tokenizer.pad_token_id, ids)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        normalizers = {}
        for pair in {tuple(pair) for pair in labels[:, :2].tolist()}:
            said, task = (token.strip("<|>") for token in tokenizer.convert_ids_to_tokens(list(pair)))
            said = said if said in LANGUAGES else language
            # translations are English
            normalizers[pair] = normalizer_for(name, "en" if task == "translate" else said, spelling)[1]
        of_clip = [normalizers[tuple(pair)] for pair in labels[:, :2].tolist()]
        texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (predictions, labels))
        return error_rates(*([n(text) for n, text in zip(of_clip, side, strict=True)] for side in texts), str)

    return compute_metrics
