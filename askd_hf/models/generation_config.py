"""The generation config of a Whisper model: completed for checkpoints of 2022 and 2023, set for language and task.

`generate(language=)` and `pipeline` require `lang_to_id`, `task_to_id` and `is_multilingual`. Older fine-tuned models
lack these fields, and many have no generation_config.json at all.
"""

import logging
from pathlib import Path

from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE
from transformers.utils import GENERATION_CONFIG_NAME

from ..arguments.writable import check_writable
from ..errors import UserError

logger = logging.getLogger(__name__)

MULTILINGUAL_VOCABULARY = 51865
# id of the end of text in GPT-2's vocabulary, that of the English-only models
ENGLISH_ONLY_END = 50256
MAX_INITIAL_TIMESTAMP_INDEX = 50  # times 0.02 s, as in OpenAI's configs
TASKS = ("transcribe", "translate")
REQUIRED = ("is_multilingual", "no_timestamps_token_id")
REQUIRED_IF_MULTILINGUAL = ("lang_to_id", "task_to_id")


def is_multilingual(model: WhisperForConditionalGeneration) -> bool:
    # older generation configs lack the field; the vocabulary decides then
    return getattr(model.generation_config, "is_multilingual", model.config.vocab_size >= MULTILINGUAL_VOCABULARY)


def missing_fields(model: WhisperForConditionalGeneration) -> list[str]:
    """Return the fields that `generate` requires and the generation config lacks."""
    config = model.generation_config
    required = REQUIRED + (REQUIRED_IF_MULTILINGUAL if is_multilingual(model) else ())
    return [name for name in required if getattr(config, name, None) is None]


def complete(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> None:
    """Add the `missing_fields`, and language and task in their old form. Existing fields aren't changed."""
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
    values |= (
        dict(max_initial_timestamp_index=MAX_INITIAL_TIMESTAMP_INDEX) if len(vocabulary) > ENGLISH_ONLY_END else {}
    )
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(model.config, name)
    filled = [name for name, value in values.items() if getattr(config, name, None) is None and value is not None]
    for name in filled:
        setattr(config, name, values[name])
    _read_forced_ids(model)
    config._from_model_config = False  # or `generate` would derive it from the model's config again
    logger.warning(
        "%s: its generation config is missing or outdated; added from its tokenizer: %s",
        model.name_or_path or "the model",
        ", ".join(filled),
    )


def _read_forced_ids(model: WhisperForConditionalGeneration) -> None:
    """Read language and task from `forced_decoder_ids`, where they were stored before 2023."""
    config = model.generation_config
    forced = getattr(config, "forced_decoder_ids", None) or getattr(model.config, "forced_decoder_ids", None) or []
    ids = {token for _, token in forced}
    if config.is_multilingual:
        for name, token_ids in (("language", config.lang_to_id), ("task", config.task_to_id)):
            forced_values = [token.strip("<|>") for token, i in token_ids.items() if i in ids]
            if forced_values and getattr(config, name, None) is None:
                setattr(config, name, forced_values[0])
    config.forced_decoder_ids = None


def alignment_heads(model: WhisperForConditionalGeneration) -> list[list[int]] | None:
    """Return the alignment heads, [layer, head], of the generation config. None without any, or if one is missing."""
    heads = getattr(model.generation_config, "alignment_heads", None)  # absent unless generation_config.json has it
    return existing_heads(heads, model.config.decoder_layers, model.config.decoder_attention_heads)


def drop_missing_heads(model: WhisperForConditionalGeneration) -> None:
    """Remove the alignment heads if the decoder lacks some of their layers: word timestamps would crash."""
    if getattr(model.generation_config, "alignment_heads", None) is not None and alignment_heads(model) is None:
        del model.generation_config.alignment_heads
        logger.warning(
            "%s: no word timestamps, as the model lacks some alignment heads of its generation config. Select them "
            "with askd-hf select-heads",
            model.name_or_path or "the model",
        )


def existing_heads(heads: list[list[int]] | None, layers: int, heads_per_layer: int) -> list[list[int]] | None:
    """Return the alignment heads, (layer, head), if a decoder of this shape has all of them, else None."""
    if not heads or not all(0 <= layer < layers and 0 <= head < heads_per_layer for layer, head in heads):
        return None
    return heads


def generation_config_file(model: str | Path, writer: str) -> Path:
    """Return the file of a model's generation config, to which `writer`, an option or a command, writes.

    Raises `UserError` if `--model` isn't a local directory with this file, or isn't writable.
    """
    file = Path(model) / GENERATION_CONFIG_NAME
    if not file.is_file():
        raise UserError(
            f"--model {model} must be a local directory with a {GENERATION_CONFIG_NAME}, to which {writer} writes"
        )
    check_writable(file.parent, "--model")
    return file


def set_language(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, language: str | None, task: str = "transcribe"
) -> None:
    """Set language and task of a multilingual model's generation config and tokenizer.

    An English-only model is left unchanged.

    Raises `UserError` if `language` is None for a multilingual model, or if the model doesn't support it.
    """
    if not is_multilingual(model):
        if language is not None and language.lower() not in ("en", "english"):
            raise UserError(f"--language {language}: the model supports English only")
        if task != "transcribe":
            raise UserError(f"--task {task} requires a multilingual model, and the model supports English only")
        return
    if language is None:
        raise UserError(
            "--language is required for a multilingual model: give the language, such as --language english"
        )
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    supported = [token.strip("<|>") for token in model.generation_config.lang_to_id]
    if code not in supported:
        raise UserError(f"--language must be one of {', '.join(supported)}, got {language!r}")
    processor.tokenizer.set_prefix_tokens(language=code, task=task, predict_timestamps=False)
    model.generation_config.language = code
    model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None  # the old form; `generate` rejects both together


def set_languages(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, spoken: list[tuple[str | None, str | None]]
) -> None:
    """Set language and task for several pairs of language and task.

    With several languages, generation falls back to language detection. With both tasks, it transcribes by default.

    Args:
        spoken: pairs of language and task. None if a column of the rows has them.
    """
    languages = {language for language, _ in spoken}
    tasks = {task or "transcribe" for _, task in spoken}
    task = tasks.pop() if len(tasks) == 1 else "transcribe"
    if not is_multilingual(model):
        for language in languages:
            set_language(model, processor, language, task)
        return
    for language in sorted(
        languages - {None}, reverse=True
    ):  # the tokenizer keeps the last, the first in the alphabet
        set_language(model, processor, language, task)
    if len(languages) > 1 or None in languages:
        model.generation_config.language = None
    model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None


def allow_silence(model: WhisperForConditionalGeneration) -> None:
    """Allow an empty transcript. OpenAI's configs suppress the end of text as the first token."""
    config = model.generation_config
    if config.begin_suppress_tokens:
        config.begin_suppress_tokens = [i for i in config.begin_suppress_tokens if i != model.config.eos_token_id]


def no_timestamps(model: WhisperForConditionalGeneration) -> dict[str, list[int]]:
    """Return the options with which `generate` suppresses all timestamps besides the tokens of the config.

    A student trained with timestamps may generate them without being asked. `generate` then continues after the
    timestamp, which never ends if the timestamps don't increase, and fails without the features of the clip.
    """
    config = model.generation_config
    # a field that isn't in the file doesn't exist
    last = getattr(config, "no_timestamps_token_id", None)
    timestamps = range(0) if last is None else range(last + 1, model.config.vocab_size)
    return {"suppress_tokens": [*(config.suppress_tokens or []), *timestamps]} if timestamps else {}
