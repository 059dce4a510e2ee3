"""Loading a Whisper and its processor from a directory or the Hub, whole and fit for each other, or an error."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, is_flash_attn_2_available, is_flash_attn_3_available

from ..errors import UserError
from ..hub_access import hub_access, local_or_hub
from .checkpoint_files import check_files, check_model_type, loading_errors
from .generation_config import complete, drop_missing_heads, lacking
from .lora import adapter_base, is_adapter, with_adapter

logger = logging.getLogger(__name__)

SHOWN = 3  # weights that a message names
# the encoder's positions are sinusoids, and the output projection is the embedding
COMPUTED_WEIGHTS = {"model.encoder.embed_positions.weight", "proj_out.weight"}
TIMESTAMP = re.compile(r"<\|\d+\.\d+\|>")


def load_whisper(
    name: str, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> WhisperForConditionalGeneration:
    """A Whisper model from a local directory or the Hub; of an adapter its base, with the adapter merged.

    What its generation config lacks, as in checkpoints of 2022, is taken from the tokenizer beside it.

    Raises `UserError` if there is none, if it isn't a Whisper model, if its files aren't whole or its weights not all
    of the model's, or if the Hub can't be reached.
    """
    check_attention(attn_implementation)
    if local_or_hub(name):  # the Hub's files are whole
        check_files(name)
    if is_adapter(name):
        base = load_whisper(adapter_base(name), attn_implementation=attn_implementation)
        return with_adapter(base, name).to(dtype)  # merged in full precision
    with loading_errors(name), hub_access("the model", name):
        config = AutoConfig.from_pretrained(name)
    check_model_type(name, config.model_type)
    with loading_errors(name), hub_access("the model", name), _without_report():
        model, report = WhisperForConditionalGeneration.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    _check_weights(name, report)
    if lacking(model):
        try:
            tokenizer = load_processor(name).tokenizer
        except UserError as error:
            logger.warning("its generation config lacks %s, and %s", ", ".join(lacking(model)), error)
        else:
            complete(model, tokenizer)
    drop_missing_heads(model)
    return model


def check_attention(name: str) -> None:
    """Raise `UserError` for an attention that transformers doesn't have, or whose package is absent."""
    packages = {
        "flash_attention_2": (is_flash_attn_2_available, "flash-attn --no-build-isolation"),
        "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    }
    if name in packages:
        available, package = packages[name]
        if not available():
            raise UserError(f"--attn_implementation {name} needs a GPU and a package: pip install {package}")
    elif name not in ALL_ATTENTION_FUNCTIONS.valid_keys() and name != "eager" and "/" not in name:
        raise UserError(f"--attn_implementation {name}: there are sdpa, eager and flash_attention_2")


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without the table of weights that transformers logs: what matters in it is an error here, in one line."""
    log = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(keep)  # and not its level: below it transformers logs other things
    try:
        yield
    finally:
        log.removeFilter(keep)


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Raise `UserError` unless all weights of the model were in its files, and no layers besides."""
    missing = sorted(set(report["missing_keys"]) - COMPUTED_WEIGHTS)
    wrong = sorted(report["mismatched_keys"])
    layers = sorted(key for key in report["unexpected_keys"] if ".layers." in key)
    advice = "its config.json and its weights are of different models, or the weights aren't whole: copy both again"
    if missing:
        raise UserError(f"{name}: its weights lack {_first_of(missing)}; {advice}")
    if wrong:
        key, stored, expected = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{name}: {key} is {tuple(stored)}, not {tuple(expected)} as its config says{more}; {advice}")
    if layers:
        raise UserError(f"{name}: its config.json has no place for {_first_of(layers)} of its weights; {advice}")
    if report["unexpected_keys"]:
        logger.warning(
            "%s: weights that Whisper has no use for: %s", name, _first_of(sorted(report["unexpected_keys"]))
        )


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def load_processor(name: str) -> WhisperProcessor:
    """The feature extractor and tokenizer of a Whisper model; of an adapter without them those of its base.

    Raises `UserError` as `load_whisper` does, and if the tokenizer isn't whole.
    """
    if local_or_hub(name):
        check_files(name)
    if is_adapter(name) and not has_processor(name):
        return load_processor(adapter_base(name))
    try:
        with hub_access("the processor", name):
            processor = WhisperProcessor.from_pretrained(name)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # a directory without tokenizer, or with half of one
        raise UserError(
            f"{name} has no complete Whisper processor (preprocessor_config.json and tokenizer.json, or vocab.json "
            f"and merges.txt): {' '.join(str(error).split())[:200]}. Copy these from the model that it was made from"
        ) from error
    _mend_tokenizer(name, processor.tokenizer)
    return processor


def has_processor(name: str) -> bool:
    """Whether a directory or Hub id has a feature extractor and a tokenizer."""

    def has(*files: str) -> bool:
        return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None for file in files)

    with hub_access("the processor", name):
        return has("processor_config.json", "preprocessor_config.json") and has("tokenizer.json", "vocab.json")


def _mend_tokenizer(name: str, tokenizer: WhisperTokenizer) -> None:
    """Make what an old save or a hand-made one left out: a padding token, and which tokens aren't text.

    Raises `UserError` if it hasn't the tokens that every Whisper has.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ("<|startoftranscript|>", "<|endoftext|>") if token not in vocabulary]
    if missing:
        raise UserError(
            f"{name}: its tokenizer has {len(vocabulary)} tokens and no {' '.join(missing)}: it isn't Whisper's, "
            "or not whole. Copy tokenizer.json and tokenizer_config.json from the model that it was made from"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # from added_tokens.json they come as text, and `skip_special_tokens` would leave them in transcripts
    as_text = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and re.fullmatch(r"<\|[^|]+\|>", token.content) and not TIMESTAMP.fullmatch(token.content)
    ]
    if as_text:
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in as_text], special_tokens=True
        )


def check_processor(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Raise `UserError` unless the features are of the shape that the model hears, and the tokens are its own."""
    extractor, config = processor.feature_extractor, model.config
    name = model.name_or_path or "the model"
    made = extractor.feature_size, extractor.nb_max_frames
    heard = config.num_mel_bins, 2 * config.max_source_positions
    if made != heard:
        raise UserError(
            f"{name} hears {heard[0]} mel bins and {heard[1]} frames, its "
            f"preprocessor_config.json makes {made[0]} and {made[1]}: they don't belong together"
        )
    vocabulary = processor.tokenizer.get_vocab()
    advice = "its tokenizer is another model's. Copy that of the model that it was made from"
    if max(vocabulary.values()) >= config.vocab_size:
        raise UserError(
            f"{name} knows {config.vocab_size} tokens, and its tokenizer has ids up to {max(vocabulary.values())}: "
            f"{advice}, or resize the model's embeddings"
        )
    ids = {
        "<|startoftranscript|>": config.decoder_start_token_id,
        "<|notimestamps|>": getattr(model.generation_config, "no_timestamps_token_id", None),
    }
    for token, expected in ids.items():
        if None not in (expected, vocabulary.get(token)) and vocabulary[token] != expected:
            raise UserError(f"{name} has {token} as id {expected}, its tokenizer as {vocabulary[token]}: {advice}")


def check_max_length(model: WhisperForConditionalGeneration, length: int | None) -> None:
    """Raise `UserError` if transcripts of `length` tokens, `--generation_max_length`, don't fit the decoder."""
    positions = model.config.max_target_positions
    if length is not None and length > positions:
        raise UserError(f"--generation_max_length {length} is more than the decoder's {positions} positions")
