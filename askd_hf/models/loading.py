"""Load a Whisper model and its processor from a directory or the Hub, and check them."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, is_flash_attn_2_available, is_flash_attn_3_available

from ..errors import UserError, warn_once
from ..hub_access import expanded, hub_access, local_or_hub
from .checkpoint_files import check_files, check_model_type, loading_errors
from .generation_config import complete, drop_missing_heads, missing_fields
from .lora import adapter_base, is_adapter, with_adapter
from .vocabulary import TIMESTAMPS

logger = logging.getLogger(__name__)

SHOWN = 3  # weights that a message names
# not in all files: the encoder's positions are sinusoids, and the output projection is the embedding
COMPUTED_WEIGHTS = {"model.encoder.embed_positions.weight", "proj_out.weight"}
TIMESTAMP = re.compile(r"<\|\d+\.\d+\|>")


def load_whisper(
    name: str, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> WhisperForConditionalGeneration:
    """Load a Whisper model from a local directory or the Hub. For an adapter, load its base and merge the adapter.

    Fields that the generation config lacks, as in checkpoints of 2022, are taken from the tokenizer.

    Raises:
        UserError: the model doesn't exist, isn't Whisper, has incomplete files or other weights than its config says,
            or the Hub can't be reached.
    """
    check_attention(attn_implementation)
    name = expanded(name)
    if local_or_hub(name):  # files of the Hub are complete
        check_files(name)
    if is_adapter(name):
        base = load_whisper(adapter_base(name), attn_implementation=attn_implementation)
        return with_adapter(base, name).to(dtype)  # merged in full precision
    config = load_config(name)
    with loading_errors(name), hub_access("the model", name), _without_report():
        model, report = WhisperForConditionalGeneration.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error below names them
        )
    _check_weights(name, report)
    if missing_fields(model):
        try:
            tokenizer = load_processor(name).tokenizer
        except UserError as error:
            logger.warning("%s: its generation config lacks %s, and %s", name, ", ".join(missing_fields(model)), error)
        else:
            complete(model, tokenizer)
    drop_missing_heads(model)
    return model


def load_config(name: str) -> WhisperConfig:
    """Load the config of a Whisper model. Raise `UserError` if there is none, or it is of another model."""
    name = expanded(name)
    with loading_errors(name), hub_access("the model", name):
        config = AutoConfig.from_pretrained(name)
    check_model_type(name, config.model_type)
    return config


def check_attention(name: str) -> None:
    """Raise `UserError` for an attention implementation that doesn't exist, or whose package isn't installed."""
    packages = {
        "flash_attention_2": (is_flash_attn_2_available, "flash-attn --no-build-isolation"),
        "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    }
    if name in packages:
        available, package = packages[name]
        if not available():
            raise UserError(f"--attn_implementation {name} requires a GPU and a package: pip install {package}")
    elif name not in ALL_ATTENTION_FUNCTIONS.valid_keys() and name != "eager" and "/" not in name:
        raise UserError(f"--attn_implementation must be one of sdpa, eager, flash_attention_2, got {name!r}")


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Suppress the table of weights that transformers logs: `_check_weights` raises an error of one line instead."""
    log = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(keep)  # a higher level would suppress other messages
    try:
        yield
    finally:
        log.removeFilter(keep)


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Raise `UserError` if weights are missing, have other shapes, or belong to layers that the model doesn't have."""
    missing = sorted(set(report["missing_keys"]) - COMPUTED_WEIGHTS)
    wrong = sorted(report["mismatched_keys"])
    layers = sorted(key for key in report["unexpected_keys"] if ".layers." in key)
    advice = "config.json and the weights are of different models, or the weights are incomplete: copy both again"
    if missing:
        raise UserError(f"{name}: its weights lack {_first_of(missing)}; {advice}")
    if wrong:
        key, stored, expected = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{name}: {key} is {tuple(stored)}, but {tuple(expected)} in config.json{more}; {advice}")
    if layers:
        raise UserError(f"{name}: its weights have {_first_of(layers)}, but config.json has no such layers; {advice}")
    if report["unexpected_keys"]:
        logger.warning(
            "%s: ignored weights that aren't Whisper's: %s", name, _first_of(sorted(report["unexpected_keys"]))
        )


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def load_processor(name: str) -> WhisperProcessor:
    """Load the feature extractor and tokenizer of a Whisper model; for an adapter without them, those of its base.

    Raises `UserError` as `load_whisper` does, and if the tokenizer is incomplete.
    """
    name = expanded(name)
    if local_or_hub(name):
        check_files(name)
    if is_adapter(name) and not has_processor(name):
        return load_processor(adapter_base(name))
    try:
        with hub_access("the processor", name):
            processor = WhisperProcessor.from_pretrained(name)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # a missing or incomplete tokenizer
        raise UserError(
            f"{name} has no complete Whisper processor (preprocessor_config.json and tokenizer.json, or vocab.json "
            f"and merges.txt): {' '.join(str(error).split())[:200]}. Copy these files from its base model"
        ) from error
    _fix_tokenizer(name, processor.tokenizer)
    return processor


def has_processor(name: str) -> bool:
    """Return whether a directory or Hub repository has a feature extractor and a tokenizer."""

    def has(*files: str) -> bool:
        return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None for file in files)

    with hub_access("the processor", name):
        return has("processor_config.json", "preprocessor_config.json") and has("tokenizer.json", "vocab.json")


def _fix_tokenizer(name: str, tokenizer: WhisperTokenizer) -> None:
    """Set the padding token and the special tokens, which old tokenizer files don't define.

    Raises `UserError` if the tokenizer lacks tokens of every Whisper model.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ("<|startoftranscript|>", "<|endoftext|>") if token not in vocabulary]
    if missing:
        raise UserError(
            f"{name}: its tokenizer has {len(vocabulary)} tokens and no {' '.join(missing)}: it is incomplete or not "
            "Whisper's. Copy tokenizer.json and tokenizer_config.json from its base model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # added_tokens.json doesn't mark them as special, so `skip_special_tokens` would leave them in transcripts
    special = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and re.fullmatch(r"<\|[^|]+\|>", token.content) and not TIMESTAMP.fullmatch(token.content)
    ]
    if special:
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True
        )


def check_processor(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Raise `UserError` if the processor has other features or another tokenizer than the model expects."""
    extractor, config = processor.feature_extractor, model.config
    name = model.name_or_path or "the model"
    produced = extractor.feature_size, extractor.nb_max_frames
    expected = config.num_mel_bins, 2 * config.max_source_positions
    if produced != expected:
        raise UserError(
            f"{name} expects {expected[0]} mel bins x {expected[1]} frames, but its preprocessor_config.json produces "
            f"{produced[0]} x {produced[1]}: copy preprocessor_config.json from its base model"
        )
    vocabulary = processor.tokenizer.get_vocab()
    advice = "the tokenizer is of another model. Copy that of its base model"
    if max(vocabulary.values()) >= config.vocab_size:
        raise UserError(
            f"{name} has a vocabulary of {config.vocab_size} tokens, but its tokenizer has ids up to "
            f"{max(vocabulary.values())}: "
            f"{advice}, or resize the model's embeddings"
        )
    before = getattr(model.generation_config, "no_timestamps_token_id", config.vocab_size)
    if added := [token for token, token_id in vocabulary.items() if token_id > before + TIMESTAMPS]:
        warn_once(
            f"{name} has {len(added)} tokens behind the timestamps, such as {added[0]!r}: they are taken for "
            "timestamps, so no transcript has them"
        )
    ids = {
        "<|startoftranscript|>": config.decoder_start_token_id,
        "<|notimestamps|>": getattr(model.generation_config, "no_timestamps_token_id", None),
    }
    for token, token_id in ids.items():
        if None not in (token_id, vocabulary.get(token)) and vocabulary[token] != token_id:
            raise UserError(
                f"{name}: {token} is {token_id} in its config, {vocabulary[token]} in its tokenizer: {advice}"
            )


def check_max_length(model: WhisperForConditionalGeneration, length: int | None) -> None:
    """Raise `UserError` if `--generation_max_length` exceeds the decoder's positions."""
    positions = model.config.max_target_positions
    if length is not None and length > positions:
        raise UserError(f"--generation_max_length must be at most {positions}, the decoder's positions, got {length}")
