"""A Whisper's generation config, completed from its tokenizer where a checkpoint of 2022 or 2023 lacks something.

Since then `generate(language=)` and `pipeline` need `lang_to_id`, `task_to_id` and `is_multilingual` in it, which
fine-tunes of that time don't have; many have no generation_config.json at all.
"""

import logging

from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from ..errors import UserError

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


def set_language(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, language: str | None, task: str
) -> None:
    """Make a multilingual model generate, and its tokenizer label, in `language`; an English-only one needs nothing.

    Raises `UserError` if a multilingual model has no language, or one that it doesn't know.
    """
    if not is_multilingual(model):
        if language is not None and language.lower() not in ("en", "english"):
            raise UserError(f"--language {language}: this model knows English only")
        if task != "transcribe":
            raise UserError(f"--task {task}: this model knows English only, and nothing to translate")
        return
    if language is None:
        raise UserError(
            "--language is missing: the model is multilingual; say what is spoken, as in --language english"
        )
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    known = [token.strip("<|>") for token in model.generation_config.lang_to_id]
    if code not in known:
        raise UserError(f"--language {language}: the model knows {', '.join(known)}")
    processor.tokenizer.set_prefix_tokens(language=code, task=task, predict_timestamps=False)
    model.generation_config.language = code
    model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None  # the older way to say the same; both together are refused


def set_languages(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, spoken: list[tuple[str | None, str | None]]
) -> None:
    """`set_language` for several pairs of language and task; None: as the rows of speech say.

    Of several languages the model finds out for itself which it is; of both tasks it transcribes, unless it is told
    otherwise.
    """
    languages = {language for language, _ in spoken}
    tasks = {task or "transcribe" for _, task in spoken}
    task = tasks.pop() if len(tasks) == 1 else "transcribe"
    if not is_multilingual(model):
        for language in languages:
            set_language(model, processor, language, task)
        return
    for language in sorted(languages - {None}, reverse=True):  # the first is what the tokenizer stays set to
        set_language(model, processor, language, task)
    if len(languages) > 1 or None in languages:
        model.generation_config.language = None
    model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None


def allow_silence(model: WhisperForConditionalGeneration) -> None:
    """Let a model that learns when nobody speaks say nothing: OpenAI's configuration forbids to end at once."""
    config = model.generation_config
    if config.begin_suppress_tokens:
        config.begin_suppress_tokens = [i for i in config.begin_suppress_tokens if i != model.config.eos_token_id]


def no_timestamps(model: WhisperForConditionalGeneration) -> dict[str, list[int]]:
    """Options with which `generate` gives none: beside what the model's configuration suppresses, all timestamps.

    A student that learns with timestamps may write some without being asked. `generate` then looks for more text
    behind them, for ever if they stand still, and can't without the features of the clip.
    """
    config = model.generation_config
    # what isn't in a generation config's file isn't there
    last = getattr(config, "no_timestamps_token_id", None)
    timestamps = range(0) if last is None else range(last + 1, model.config.vocab_size)
    return {"suppress_tokens": [*(config.suppress_tokens or []), *timestamps]} if timestamps else {}
