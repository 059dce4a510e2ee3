"""Give a Whisper model a smaller vocabulary: the tokens of a domain, and the bytes for everything else.

The output projection multiplies every decoder state with one row per token. In a small student with Whisper's 51,865
tokens this is most of the decoder's work and more than half of the weights.

Whisper's tokenizer is a byte-level BPE: a text starts as bytes, and the merge with the lowest rank is applied until
none applies. Kept are

- all 256 bytes, so that every text has tokens,
- tokens of the training transcripts, and with each the tokens that it is merged from. `--vocabulary auto` keeps all
  of them. No merge that the training transcripts need is missing then, and at each step the applied merge is the
  lowest of the kept ones, as it was the lowest of all. Hence these transcripts are tokenized as before. A number
  prefers those that occur at least `--vocabulary_min_count` times: rarer ones make room for general tokens, and the
  student learns to write words in pieces,
- general tokens, for words that the training transcripts don't contain,
- special tokens of all languages and tasks, and the timestamps of the window.

Other texts are split into more and shorter tokens. Decoding is unchanged.
"""

import copy
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

from ..data.labels import TIME_PRECISION, text_ids, token_id
from .vocabulary import timestamp_ids, token_rows, with_rows

AUTO_SIZE = 6_000  # tokens. Measured: examples/guides/fast-students.md
# fields of the configs with a token id, with a list of ids, and with ids by name
SINGLE_IDS = (
    "decoder_start_token_id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "no_timestamps_token_id",
    "prev_sot_token_id",
)
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
IDS_BY_NAME = ("lang_to_id", "task_to_id")


def count_tokens(tokenizer: WhisperTokenizer, rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Return how often the labels of `rows` contain each text token.

    Args:
        rows: `text`; optionally `language`, `task`, `segments`, `prompt`, as for `data.labels.build_decoder_tokens`.
    """
    counts: Counter[int] = Counter()
    for row in rows:
        texts = [row["text"], row.get("prompt"), *(part["text"] for part in row.get("segments") or [] if part)]
        for text in texts:
            counts.update(text_ids(tokenizer, text or "", row.get("language"), row.get("task")))
    return Counter(dict(zip(tokenizer.convert_ids_to_tokens(list(counts)), counts.values(), strict=True)))


class TextTokens:
    """The text tokens of a byte-level BPE tokenizer, without special tokens and timestamps.

    Attributes:
        ranked: all of them, by id.
        parts: the tokens of all merges that make a token, by token. A token without parts is a byte.
    """

    def __init__(self, tokenizer: WhisperTokenizer):
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self.ranked = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in added]
        self.parts: dict[str, set[str]] = {}
        for first, second in model["merges"]:
            self.parts.setdefault(first + second, set()).update((first, second))

    def bytes(self) -> set[str]:
        """Return the tokens that no merge makes: the bytes."""
        return {token for token in self.ranked if token not in self.parts}

    def with_parts(self, token: str, kept: set[str]) -> set[str]:
        """Return `token` and all tokens that it is merged from, without those in `kept`."""
        found: set[str] = set()
        waiting = [token]
        while waiting:
            token = waiting.pop()
            if token not in kept and token not in found:
                found.add(token)
                waiting += self.parts.get(token, ())
        return found


@functools.lru_cache(maxsize=1)  # reading a tokenizer takes a fifth of a second, and the planner asks 20 times
def text_tokens(tokenizer: WhisperTokenizer) -> TextTokens:
    return TextTokens(tokenizer)


def choose_tokens(
    tokenizer: WhisperTokenizer,
    counts: Counter[str],
    number: int,
    keep_counted: bool = False,
    min_count: int = 1,
) -> set[str]:
    """Return the text tokens to keep: the bytes, counted tokens with their parts, and general ones.

    The tokens that were counted at least `min_count` times come first, the most frequent before the others, then the
    tokens with the lowest ids. These are the most frequent ones in the text that the tokenizer was made of, and spell
    words that the training transcripts don't contain.

    Args:
        counts: of `count_tokens`.
        number: how many text tokens to keep besides the bytes.
        keep_counted: keep all counted tokens, also if they are more than `number`.
        min_count: rarer tokens are kept only if their ids are low enough.
    """
    tokens = text_tokens(tokenizer)
    kept = tokens.bytes()
    most = len(kept) + number
    counted = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if keep_counted:
        for token in counted:
            kept |= tokens.with_parts(token, kept)
    often = [token for token in counted if counts[token] >= min_count]
    for token in [*often, *tokens.ranked]:
        if len(kept) >= most:
            break
        more = tokens.with_parts(token, kept)
        if len(kept) + len(more) <= most:
            kept |= more
    return kept


def choose_domain_tokens(
    tokenizer: WhisperTokenizer, vocab_size: int, window_seconds: float, counts: Counter[str]
) -> set[str]:
    """Return the text tokens of `--vocabulary auto`: all counted tokens, and general ones up to `AUTO_SIZE` in all.

    Args:
        vocab_size: of the model.
        counts: of `count_tokens`.
    """
    fewest = vocabulary_size(tokenizer, vocab_size, window_seconds)
    return choose_tokens(tokenizer, counts, max(AUTO_SIZE - fewest, 0), keep_counted=True)


def vocabulary_size(
    tokenizer: WhisperTokenizer, vocab_size: int, window_seconds: float, kept: set[str] | None = None
) -> int:
    """Return the size of a vocabulary: text tokens, special tokens and the timestamps of the window.

    Args:
        vocab_size: of the model.
        kept: the text tokens, of `choose_tokens`. None for the bytes alone, the fewest possible.
    """
    text = text_tokens(tokenizer)
    special = set(tokenizer.get_vocab()) - set(text.ranked) - _timestamp_names(tokenizer, vocab_size)
    kept = text.bytes() if kept is None else kept
    return len(kept) + len(special) + len(_window_timestamps(tokenizer, vocab_size, window_seconds))


def _window_timestamps(tokenizer: WhisperTokenizer, vocab_size: int, window_seconds: float) -> range:
    return timestamp_ids(tokenizer, vocab_size)[: round(window_seconds / TIME_PRECISION) + 1]


def _timestamp_names(tokenizer: WhisperTokenizer, vocab_size: int) -> set[str]:
    """Return the timestamps that the tokenizer names. Many tokenizers name none."""
    ids = timestamp_ids(tokenizer, vocab_size)
    return {token for token, i in tokenizer.get_vocab().items() if i in ids}


def smaller_tokenizer(
    tokenizer: WhisperTokenizer, vocab_size: int, kept: set[str], window_seconds: float
) -> WhisperTokenizer:
    """Return a tokenizer with the text tokens `kept`, all special tokens, and the timestamps of the window.

    The order of the ids is kept.

    Args:
        vocab_size: of the model.
        kept: of `choose_tokens`.
    """
    text = set(text_tokens(tokenizer).ranked)
    beyond = timestamp_ids(tokenizer, vocab_size)[len(_window_timestamps(tokenizer, vocab_size, window_seconds)) :]
    old_ids = tokenizer.get_vocab()
    names = [token for token in sorted(old_ids, key=old_ids.__getitem__) if token in kept or token not in text]
    ids = {token: i for i, token in enumerate(token for token in names if old_ids[token] not in beyond)}
    with tempfile.TemporaryDirectory() as directory:  # made from files, as users of the student load it
        tokenizer.save_pretrained(directory)
        file = Path(directory) / "tokenizer.json"
        state = _with_ids(json.loads(file.read_text(encoding="utf-8")), ids)
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        smaller = WhisperTokenizer.from_pretrained(directory)
    smaller.english_spelling_normalizer = tokenizer.english_spelling_normalizer
    smaller.set_prefix_tokens(tokenizer.language, tokenizer.task, tokenizer.predict_timestamps)
    return smaller


def _with_ids(state: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the tokens of `ids` only."""
    model = state["model"]
    model["vocab"] = {token: ids[token] for token in model["vocab"] if token in ids}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= ids.keys()]
    added = [token for token in state["added_tokens"] if token["content"] in ids]
    state["added_tokens"] = [token | {"id": ids[token["content"]]} for token in added]
    for token in (state["post_processor"] or {}).get("special_tokens", {}).values():
        token["ids"] = [ids[name] for name in token["tokens"]]
    return state


def with_smaller_vocabulary(
    model: WhisperForConditionalGeneration,
    tokenizer: WhisperTokenizer,
    smaller: WhisperTokenizer,
    window_seconds: float,
) -> WhisperForConditionalGeneration:
    """Return `model` with the vocabulary of `smaller`, and with its ids in both configs. Other weights are shared.

    Args:
        tokenizer: of the model.
        smaller: of `smaller_tokenizer`.
        window_seconds: the window that `smaller` was made for, the student's. Later timestamps are dropped, which many
            tokenizers don't name.
    """
    first = token_id(smaller, "<|notimestamps|>") + 1
    after_timestamps = first + len(_window_timestamps(tokenizer, model.config.vocab_size, window_seconds))
    size = max(after_timestamps, len(smaller))  # tokens that were added later have ids behind the timestamps
    rows = token_rows(tokenizer, model.config.vocab_size, smaller, size)
    new_ids = {old: new for new, old in enumerate(rows.tolist())}
    config = copy.deepcopy(model.config)
    _renumber(config, new_ids)
    converted = with_rows(model, rows, config)
    converted.generation_config = copy.deepcopy(model.generation_config)
    _renumber(converted.generation_config, new_ids)
    converted.name_or_path = model.name_or_path
    return converted


def _renumber(config: WhisperConfig | GenerationConfig, new_ids: dict[int, int]) -> None:
    """Replace all token ids of a config. Suppressed tokens that don't exist any more are dropped."""
    values = config.to_dict()
    for name in SINGLE_IDS:
        if values.get(name) is not None:
            setattr(config, name, new_ids[values[name]])
    for name in ID_LISTS:
        if values.get(name):
            setattr(config, name, [new_ids[i] for i in values[name] if i in new_ids])
    for name in IDS_BY_NAME:
        if values.get(name):
            setattr(config, name, {token: new_ids[i] for token, i in values[name].items()})
    if values.get("forced_decoder_ids"):
        forced = [[place, i if i is None else new_ids[i]] for place, i in values["forced_decoder_ids"]]
        config.forced_decoder_ids = forced
