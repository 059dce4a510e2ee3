"""A Whisper's generation config, completed from its tokenizer where a checkpoint of 2022 or 2023 lacks something.

Since then `generate(language=)` and `pipeline` need `lang_to_id`, `task_to_id` and `is_multilingual` in it, which
fine-tunes of that time don't have; many have no generation_config.json at all.
"""

import logging

from transformers import WhisperForConditionalGeneration, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

logger = logging.getLogger(__name__)

MULTILINGUAL_VOCABULARY = 51865
# the id of the end of text in the vocabulary of GPT-2, which the English-only models have
ENGLISH_ONLY_END = 50256
FIRST_TIMESTAMP = 50  # of 0.02 s: OpenAI's limit
TASKS = ("transcribe", "translate")
NEEDED = ("is_multilingual", "no_timestamps_token_id")
NEEDED_FOR_LANGUAGES = ("lang_to_id", "task_to_id")


def is_multilingual(model: WhisperForConditionalGeneration) -> bool:
    # a generation config holds what its file held; older ones don't say, but their vocabulary does
    return getattr(model.generation_config, "is_multilingual", model.config.vocab_size >= MULTILINGUAL_VOCABULARY)


def lacking(model: WhisperForConditionalGeneration) -> list[str]:
    """What the generation config lacks of that which `generate` needs."""
    config = model.generation_config
    needed = NEEDED + (NEEDED_FOR_LANGUAGES if is_multilingual(model) else ())
    return [name for name in needed if getattr(config, name, None) is None]


def complete(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> None:
    """Fill in what `lacking` names, and what stands in the model's config in the old way. What is there stays."""
    config, vocabulary = model.generation_config, tokenizer.get_vocab()
    languages = {f"<|{code}|>": vocabulary[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in vocabulary}
    values = {"is_multilingual": bool(languages) and vocabulary.get("<|endoftext|>") != ENGLISH_ONLY_END}
    if getattr(config, "is_multilingual", values["is_multilingual"]):
        values["lang_to_id"] = languages
        values["task_to_id"] = {task: vocabulary[f"<|{task}|>"] for task in TASKS if f"<|{task}|>" in vocabulary}
    for name, token in (("no_timestamps_token_id", "<|notimestamps|>"), ("prev_sot_token_id", "<|startofprev|>")):
        if token in vocabulary:
            values[name] = vocabulary[token]
    values |= dict(return_timestamps=False, max_length=model.config.max_target_positions)
    values |= dict(max_initial_timestamp_index=FIRST_TIMESTAMP) if len(vocabulary) > ENGLISH_ONLY_END else {}
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(model.config, name)
    filled = [name for name, value in values.items() if getattr(config, name, None) is None and value is not None]
    for name in filled:
        setattr(config, name, values[name])
    _read_forced_ids(model)
    config._from_model_config = False  # or `generate` would make it anew from the model's config
    logger.warning(
        "%s: its generation config is of an older version, or missing; from its tokenizer: %s",
        model.name_or_path or "the model",
        ", ".join(filled),
    )


def _read_forced_ids(model: WhisperForConditionalGeneration) -> None:
    """Read language and task from the ids of the first tokens, as they were given before 2023."""
    config = model.generation_config
    forced = getattr(config, "forced_decoder_ids", None) or getattr(model.config, "forced_decoder_ids", None) or []
    ids = {token for _, token in forced}
    if config.is_multilingual:
        for name, known in (("language", config.lang_to_id), ("task", config.task_to_id)):
            said = [token.strip("<|>") for token, i in known.items() if i in ids]
            if said and getattr(config, name, None) is None:
                setattr(config, name, said[0])
    config.forced_decoder_ids = None


def drop_missing_heads(model: WhisperForConditionalGeneration) -> None:
    """Remove alignment heads of layers that the decoder doesn't have: word timestamps would crash on them."""
    heads = getattr(model.generation_config, "alignment_heads", None)
    shape = model.config.decoder_layers, model.config.decoder_attention_heads
    if heads is not None and existing_heads(heads, *shape) is None:
        del model.generation_config.alignment_heads
        logger.warning(
            "%s: its generation config names alignment heads that the model doesn't have: no word timestamps",
            model.name_or_path or "the model",
        )


def existing_heads(heads: list[list[int]] | None, layers: int, heads_a_layer: int) -> list[list[int]] | None:
    """Alignment heads, (layer, head), as a generation config names them, if a decoder of this shape has them all."""
    if not heads or not all(0 <= layer < layers and 0 <= head < heads_a_layer for layer, head in heads):
        return None
    return heads
