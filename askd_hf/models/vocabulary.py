"""Convert a model to another vocabulary, by selecting and reordering the rows of its embedding.

Whisper's input embedding and output projection are one matrix with one row per token. With the rows in the order of
the student's tokens, the teacher takes and predicts the student's token ids. large-v3, for example, has one language
more than earlier models, which shifts the ids of all later tokens.

Two tokens match if their texts are equal. Timestamps, which many tokenizers store without text, match if their
positions after `<|notimestamps|>` are equal. For tokens without a match:

- A token that only the teacher has can no longer be predicted. Its probability is distributed to all other tokens in
  proportion, as the softmax is over the student's tokens. For large-v3 this is only `<|yue|>`, whose probability is
  close to 0 in transcripts. For a student with a smaller vocabulary (`models.smaller_vocabulary`) these are the text
  tokens that it doesn't have. Its labels contain none of them: words without a token are written in pieces.
- A token that only the student has gets the row of `<|startoftranscript|>`, whose probability is always close to 0.
"""

import copy
import json
import logging

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

from ..data.labels import TIME_PRECISION, token_id
from ..errors import UserError

logger = logging.getLogger(__name__)

SHOWN = 10  # tokens that a message names
TIMESTAMPS = 1501  # 0 to 30 seconds in steps of 0.02


def token_partners(teacher: WhisperTokenizer, student: WhisperTokenizer) -> Tensor:
    """Return the teacher's id of every student token, -1 without a match: int64 `(student tokens,)`.

    Raises `UserError` unless the student's text tokens and merges are some or all of the teacher's. Those of
    English-only and multilingual Whisper models aren't.
    """
    (teacher_tokens, teacher_merges), (student_tokens, student_merges) = _pieces(teacher), _pieces(student)
    if not (student_tokens <= teacher_tokens and _is_subsequence(student_merges, teacher_merges)):
        raise UserError(
            "teacher and student split text into different tokens (as English-only and multilingual models do): give "
            "two English-only or two multilingual models, or train on the teacher's transcripts "
            "(askd-hf pseudo-label, then --preset ce or ps-kd)"
        )
    ids = teacher.get_vocab()
    partners = torch.full((len(student),), -1)
    for token, i in student.get_vocab().items():
        partners[i] = ids.get(token, -1)
    return partners


def timestamp_ids(tokenizer: WhisperTokenizer, vocab_size: int) -> range:
    """Return the ids of `<|0.00|>`, `<|0.02|>`, ... `<|30.00|>` that are in the vocabulary.

    They follow `<|notimestamps|>`. Raises `UserError` if the tokenizer lacks this token.
    """
    first = token_id(tokenizer, "<|notimestamps|>") + 1
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    ids = range(first, min(first + TIMESTAMPS, vocab_size))
    others = (i for i in ids if names.get(i) not in (None, f"<|{(i - first) * TIME_PRECISION:.2f}|>"))
    return range(first, next(others, ids.stop))


def _pieces(tokenizer: WhisperTokenizer) -> tuple[set[str], list]:
    """Return the text tokens and the merges, without special tokens."""
    tokens = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return tokens - added, json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def _is_subsequence(merges: list, of: list) -> bool:
    """Return whether `merges` is `of` without some of its elements. The order decides how text is split."""
    rest = iter(of)
    return all(merge in rest for merge in merges)


def token_rows(
    model_tokenizer: WhisperTokenizer, model_size: int, new_tokenizer: WhisperTokenizer, new_size: int
) -> Tensor:
    """Return the model's row of each row of the new vocabulary, -1 without a match: int64 `(new_size,)`.

    Args:
        model_size, new_size: rows of the embeddings, which may have more rows than the tokenizer has tokens.

    Raises `UserError` as `token_partners` does.
    """
    rows = token_partners(model_tokenizer, new_tokenizer)
    rows = torch.cat([rows, rows.new_full((max(new_size - len(rows), 0),), -1)])[:new_size]
    model_timestamps = timestamp_ids(model_tokenizer, model_size)
    for i, row in zip(timestamp_ids(new_tokenizer, new_size), model_timestamps, strict=False):
        rows[i] = row
    return rows


def with_vocabulary_of(
    student: WhisperConfig,
    student_tokenizer: WhisperTokenizer,
    teacher: WhisperForConditionalGeneration,
    teacher_tokenizer: WhisperTokenizer,
) -> WhisperForConditionalGeneration:
    """Return `teacher` if it has the student's vocabulary, else a copy with it. See the docstring of the module.

    Args:
        student: the config of the student.

    Raises `UserError` as `token_partners` does, and if the teacher lacks a token of the student's prefix, such as the
    language.
    """
    size = student.vocab_size
    partners = token_rows(teacher_tokenizer, teacher.config.vocab_size, student_tokenizer, size)
    named = {*student_tokenizer.get_vocab().values(), *teacher_tokenizer.get_vocab().values()}
    if size == teacher.config.vocab_size and all(partners[i] == i for i in named if i < size):
        return teacher
    names = student_tokenizer.convert_ids_to_tokens(range(len(student_tokenizer)))
    lacking = [names[i] for i in student_tokenizer.prefix_tokens if partners[i] < 0]
    if lacking:
        raise UserError(
            f"the teacher's vocabulary lacks {' '.join(lacking)}, the start of the student's transcripts: choose a "
            "teacher with this language and task"
        )
    unknown = [names[i] for i in (partners < 0).nonzero().flatten().tolist() if i < len(names)]
    dropped = len(set(range(teacher.config.vocab_size)) - set(partners.tolist()))
    shown = ", ".join(unknown[:SHOWN]) + (" ..." if len(unknown) > SHOWN else "")
    logger.warning(
        "the teacher has another vocabulary: %d of its tokens are not in the student's, %d of the student's are not "
        "in the teacher's%s",
        dropped,
        len(unknown),
        f" ({shown}), which it predicts with a probability close to 0" if unknown else "",
    )
    config = copy.deepcopy(teacher.config)
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(student, name))
    return with_rows(teacher, partners, config)


def with_rows(
    model: WhisperForConditionalGeneration, rows: Tensor, config: WhisperConfig
) -> WhisperForConditionalGeneration:
    """Return a model with the given rows of the embedding. It shares all other weights with `model`.

    Args:
        rows: int64 `(tokens,)`. -1 for the row of the start token.
        config: of the result. Its `vocab_size` is set here.
    """
    rows = torch.where(rows < 0, model.config.decoder_start_token_id, rows)
    weight = model.get_output_embeddings().weight.data[rows.to(model.device)]
    config.vocab_size = len(rows)
    with torch.device("meta"):  # no memory for weights that are replaced
        converted = WhisperForConditionalGeneration(config)
    weights = model.state_dict() | {"model.decoder.embed_tokens.weight": weight, "proj_out.weight": weight}
    converted.load_state_dict(weights, assign=True)
    converted.tie_weights()
    return converted.train(model.training)
