"""Error rates against manually counted edits."""

import sys

import numpy as np
import pytest
from models import make_tokenizer
from transformers import EvalPrediction, WhisperFeatureExtractor, WhisperProcessor

from askd_hf.arguments import DataArguments
from askd_hf.errors import UserError
from askd_hf.evaluation import EvaluationArguments
from askd_hf.evaluation.metrics import ErrorRate, compute_metrics_for, error_rates, normalizer_for, text_normalizer
from askd_hf.training.dataset_checks import check_normalizer


def test_error_rates_are_of_the_corpus_and_in_percent():
    # 1 substitution, 1 deletion and 2 insertions on 4 + 1 words
    references = ["the cat sat down", "yes"]
    predictions = ["the bat sat", "oh yes yes"]
    metric = ErrorRate(keep_in_memory=True)
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    rates = metric.compute()
    assert rates["wer"] == pytest.approx(100 * 4 / 5)
    # letters: c->b, " down" deleted, "oh " and " yes" inserted, of 16 + 3
    assert rates["cer"] == pytest.approx(100 * (1 + 5 + 3 + 4) / 19)


def test_both_sides_are_normalized_by_the_language(processor):
    english = text_normalizer(processor, "en")
    assert error_rates(["Mr. Smith's 20 dogs!"], ["mister smith's twenty dogs"], english)["wer"] == 0.0
    basic = text_normalizer(processor, "german")
    assert error_rates(["Grüße, Welt."], ["grüße welt"], basic)["wer"] == 0.0
    assert error_rates(["five six"], ["5 6"], basic)["wer"] == 100.0
    assert text_normalizer(processor, "en", "basic")("Five, six.") == basic("Five, six.")


def test_spelling_follows_the_models_list(processor):
    processor.tokenizer.english_spelling_normalizer = {"colour": "color"}
    try:
        assert text_normalizer(processor, None)("Colour") == "color"
    finally:
        processor.tokenizer.english_spelling_normalizer = None


def test_compute_metrics_decodes_padded_tokens(processor):
    ids = [processor.tokenizer(text).input_ids for text in ("ab", "abc")]
    width = max(map(len, ids)) + 2
    labels = np.array([row[1:] + [-100] * (width - len(row)) for row in ids])
    tokens = np.array([row[1:] + [processor.tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    compute_metrics = compute_metrics_for(processor, "none")
    assert compute_metrics(EvalPrediction(predictions=tokens, label_ids=labels)) == {
        "wer": 0.0,
        "cer": 0.0,
        "capped_wer": 0.0,
        "loops": 0.0,
    }
    tokens[1, 1] = processor.tokenizer.convert_tokens_to_ids("z")
    assert compute_metrics(EvalPrediction(predictions=tokens, label_ids=labels))["wer"] == 50.0


def test_a_loop_is_counted_and_capped(processor):
    predictions, labels = (
        np.array([row + [-100] * (60 - len(row)) for row in processor.tokenizer(texts).input_ids])
        for texts in (["ab " * 15, "abc"], ["ab", "abc"])
    )
    rates = compute_metrics_for(processor, "none")(EvalPrediction(predictions=predictions, label_ids=labels[:, 1:]))
    assert rates["wer"] == 100 * 14 / 2
    assert (rates["capped_wer"], rates["loops"]) == (50.0, 1.0)


def test_compute_metrics_counts_marks_and_letters():
    """The normalizer of each clip depends on the language token of its labels; translations are English."""
    texts = {  # (language, task) -> (label, prediction)
        ("<|hi|>", "<|transcribe|>"): ("कि की", "की की"),
        ("<|th|>", "<|transcribe|>"): ("กาก่า", "กากา"),
        ("<|tr|>", "<|transcribe|>"): ("ISI", "ısı"),
        ("<|hi|>", "<|translate|>"): ("I'm", "i’m"),
    }
    letters = sorted(set("".join(map("".join, texts.values()))))
    # a byte-level tokenizer represents each byte by a letter
    pieces = sorted({piece for text in letters for piece in bytes_of(text)})
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|hi|>", "<|th|>", "<|tr|>"]
    tokenizer = make_tokenizer(pieces, [*special, "<|translate|>", "<|transcribe|>", "<|notimestamps|>"])
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)

    def rows(side: int) -> np.ndarray:
        ids = [
            [*tokenizer.convert_tokens_to_ids(pair), *tokenizer(both[side], add_special_tokens=False).input_ids]
            for pair, both in texts.items()
        ]
        width = max(map(len, ids))
        return np.array([row + [-100] * (width - len(row)) for row in ids])

    rates = compute_metrics_for(processor, "auto")(EvalPrediction(predictions=rows(1), label_ids=rows(0)))
    # words: 1 of 2, 1 of 4 letters, 0 of 1, 0 of 2 (i am); characters: 1 of 5, 1 of 5, 0 of 3, 0 of 4
    assert rates == pytest.approx({"wer": 100 * 2 / 9, "cer": 100 * 2 / 17, "capped_wer": 100 * 2 / 9, "loops": 0.0})
    # as in `askd-hf evaluate`, a reference of which the normalizer leaves nothing doesn't count
    texts[("<|hi|>", "<|translate|>")] = ("", "I'm")
    rates = compute_metrics_for(processor, "auto")(EvalPrediction(predictions=rows(1), label_ids=rows(0)))
    assert rates["wer"] == pytest.approx(100 * 2 / 7)
    texts[("<|hi|>", "<|translate|>")] = ("I'm", "i’m")
    whispers = compute_metrics_for(processor, "basic")(EvalPrediction(predictions=rows(1), label_ids=rows(0)))
    assert whispers["wer"] != pytest.approx(rates["wer"])


def bytes_of(text: str) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return "".join(bytes_to_unicode()[byte] for byte in text.encode())


# ---- the Open ASR Leaderboard's ----


def test_the_leaderboards_is_that_of_its_own_code(tmp_path, monkeypatch):
    package = tmp_path / "normalizer"
    package.mkdir()
    (package / "__init__.py").write_text("from .normalizer import EnglishTextNormalizer\n")
    (package / "normalizer.py").write_text(
        "class EnglishTextNormalizer:\n    def __call__(self, text):\n        return text.replace('wi fi', ' wifi ')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        name, normalize = normalizer_for("open-asr-leaderboard", "en", {})
        assert (name, normalize("the wi fi")) == ("open-asr-leaderboard", "the wifi")
    finally:
        for module in ("normalizer", "normalizer.normalizer"):
            sys.modules.pop(module, None)


def test_without_it_or_for_another_language_it_is_refused_before_anything_is_done():
    chosen = dict(normalizer="open-asr-leaderboard")
    for start in (
        lambda: normalizer_for("open-asr-leaderboard", "en", {}),
        lambda: EvaluationArguments(model="x", dataset="y", **chosen),
        lambda: check_normalizer(DataArguments(dataset=["y"], **chosen)),
    ):
        with pytest.raises(UserError, match=r"requires the leaderboard's code .*git clone .*PYTHONPATH"):
            start()
    for start in (
        lambda: EvaluationArguments(model="x", dataset="y", language="french", **chosen),
        lambda: check_normalizer(DataArguments(dataset=["y"], language=["fr"], **chosen)),
    ):
        with pytest.raises(UserError, match=r"supports English only, got fr. Use multilingual or basic"):
            start()


def test_a_normalizer_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"no normalizer is named 'null': choose auto, .*english-unified.* none"):
        normalizer_for("null", "fr", {})
