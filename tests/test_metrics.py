"""Error rates against edits counted by hand."""

import numpy as np
import pytest
from transformers import EvalPrediction

from askd_hf.metrics import ErrorRate, compute_metrics_for, error_rates, text_normalizer


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


def test_both_sides_are_normalised_by_the_language(processor):
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
    assert compute_metrics(EvalPrediction(predictions=tokens, label_ids=labels)) == {"wer": 0.0, "cer": 0.0}
    tokens[1, 1] = processor.tokenizer.convert_tokens_to_ids("z")
    assert compute_metrics(EvalPrediction(predictions=tokens, label_ids=labels))["wer"] == 50.0
