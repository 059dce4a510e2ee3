"""Word errors of each clip, and what shows hallucinations: capped errors, loops, repeated n-grams."""

import unicodedata
from dataclasses import dataclass

import jiwer
import numpy as np

from ..data.languages import UNSPACED
from .suites import UNTRANSCRIBED, is_untranscribed

NO_REFERENCE = "no transcript"
EMPTY_AFTER_NORMALIZATION = "reference empty after normalization"
NGRAM_SIZE = 5
LOOP_FACTOR, LOOP_MARGIN = 2, 10  # a loop has more than twice the words of the reference and 10


@dataclass
class Errors:
    """Error counts of one system on each clip, int `(clips,)` each."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions


def count_errors(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Errors:
    """Return the errors of each clip. jiwer 4 itself counts them for the whole corpus only."""
    counts = np.zeros((3, len(output.alignments)), dtype=np.int64)
    kinds = {"substitute": 0, "delete": 1, "insert": 2}
    for clip, chunks in enumerate(output.alignments):
        for chunk in chunks:
            if chunk.type in kinds:
                length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[kinds[chunk.type], clip] += length
    return Errors(*counts)


def capped_errors(errors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the word errors of each clip, at most all of its reference words, so that no loop decides a WER.

    Args:
        errors, lengths: word errors and reference words of each clip, int `(clips,)`.
    """
    return np.minimum(errors, lengths)


def is_loop(reference: str, prediction: str) -> bool:
    """Return whether a text is so much longer than its reference that the model must have repeated itself."""
    return len(prediction.split()) > LOOP_FACTOR * len(reference.split()) + LOOP_MARGIN


def repeated_ngrams(texts: list[str], n: int = NGRAM_SIZE) -> float:
    """Return the share of word n-grams that occur earlier in the same text, in percent; 0 if there are no n-grams.

    Measures repetition loops; the 5-gram count is that of Distil-Whisper (Gandhi et al. 2023).
    """
    repeated, total = 0, 0
    for text in texts:
        words = text.split()
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return 100 * repeated / total if total else 0.0


def plain_words(text: str, language: str | None) -> str:
    """Return a text in lower case without punctuation; unlike a normalizer, keeps all words (fillers too).

    In languages without spaces, each letter counts as a word.
    """
    kept = "".join(" " if unicodedata.category(letter)[0] in "PS" else letter for letter in text.lower())
    return " ".join("".join(kept.split()) if language in UNSPACED else kept.split())


def exclusion_reason(raw: str, reference: str) -> str | None:
    """Return why a clip of a set with speech can't be scored; None if it can.

    Args:
        raw: the reference as it is in the dataset.
        reference: the normalized reference.
    """
    if is_untranscribed(raw):
        return UNTRANSCRIBED
    if not raw.strip():
        return NO_REFERENCE
    return None if reference else EMPTY_AFTER_NORMALIZATION
