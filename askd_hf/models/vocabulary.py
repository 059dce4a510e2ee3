"""A teacher of another vocabulary than the student's: its rows of the vocabulary are put in the student's order.

Whisper's input embedding and output projection are one matrix, a row a token. With its rows in the order of the
student's tokens the teacher reads and predicts the student's token ids, and all else is as with a teacher of the same
vocabulary. large-v3, for one, has one language more than the models before it, and all tokens behind it moved.

Tokens are partners if their texts are the same; timestamps, to which many tokenizers give no texts, if their places
behind `<|notimestamps|>` are. What has no partner:

- of the teacher: it can't be predicted any more, and its probability goes to all other tokens in proportion, as the
  softmax is over the student's tokens. For large-v3 that is `<|yue|>` alone, which in transcripts has next to none.
- of the student: it gets the row of `<|startoftranscript|>`, which Whisper never predicts: next to no probability.
"""

import copy
import json
import logging

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

from ..data.labels import SECONDS_A_POSITION, token_id
from ..errors import UserError

logger = logging.getLogger(__name__)

SHOWN = 10
TIMESTAMPS = 1501  # from 0 to 30 seconds


def token_partners(teacher: WhisperTokenizer, student: WhisperTokenizer) -> Tensor:
    """For every token of the student the teacher's id of it, or -1: int `(student's tokens,)`.

    Raises `UserError` if the tokenizers split text into different pieces, as English-only and multilingual Whispers
    do: then the teacher's next token isn't the student's.
    """
    if _pieces(teacher) != _pieces(student):
        raise UserError(
            "teacher and student split text into different tokens (as English-only and multilingual models do), so "
            "the teacher's probabilities mean nothing to the student. Choose a teacher of the student's kind, or "
            "train on the teacher's transcripts: askd-hf pseudo-label, then --preset ce or ps-kd"
        )
    ids = teacher.get_vocab()
    partners = torch.full((len(student),), -1)
    for token, i in student.get_vocab().items():
        partners[i] = ids.get(token, -1)
    return partners


def timestamp_ids(tokenizer: WhisperTokenizer, vocab_size: int) -> range:
    """The ids of `<|0.00|>`, `<|0.02|>`, ... `<|30.00|>`, as far as the vocabulary has them.

    Raises `UserError` without `<|notimestamps|>`, which they follow (as in `data.labels.segment_ids`).
    """
    first = token_id(tokenizer, "<|notimestamps|>") + 1
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    ids = range(first, min(first + TIMESTAMPS, vocab_size))
    others = (i for i in ids if names.get(i) not in (None, f"<|{(i - first) * SECONDS_A_POSITION:.2f}|>"))
    return range(first, next(others, ids.stop))


def _pieces(tokenizer: WhisperTokenizer) -> tuple[set[str], list]:
    """The tokens of text, and how they are merged; special tokens aside."""
    tokens = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return tokens - added, json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def with_vocabulary_of(
    student: WhisperConfig,
    student_tokenizer: WhisperTokenizer,
    teacher: WhisperForConditionalGeneration,
    teacher_tokenizer: WhisperTokenizer,
) -> WhisperForConditionalGeneration:
    """`teacher` itself if it has the student's vocabulary, or else a copy that has it. See the module's docstring.

    Args:
        student: its config.

    Raises `UserError` as `token_partners`, and if the teacher lacks a token that starts every transcript, as that of
    its language.
    """
    partners = token_partners(teacher_tokenizer, student_tokenizer)
    size = student.vocab_size
    # rows that stand for nothing, if there are, have no partners
    partners = torch.cat([partners, partners.new_full((max(size - len(partners), 0),), -1)])[:size]
    theirs = timestamp_ids(teacher_tokenizer, teacher.config.vocab_size)
    for i, partner in zip(timestamp_ids(student_tokenizer, size), theirs, strict=False):
        partners[i] = partner
    named = {*student_tokenizer.get_vocab().values(), *teacher_tokenizer.get_vocab().values()}
    if size == teacher.config.vocab_size and all(partners[i] == i for i in named if i < size):
        return teacher
    names = student_tokenizer.convert_ids_to_tokens(range(len(student_tokenizer)))
    lacking = [names[i] for i in student_tokenizer.prefix_tokens if partners[i] < 0]
    if lacking:
        raise UserError(f"the teacher has no {' '.join(lacking)}, with which the student's transcripts begin")
    unknown = [names[i] for i in (partners < 0).nonzero().flatten().tolist() if i < len(names)]
    dropped = len(set(range(teacher.config.vocab_size)) - set(partners.tolist()))
    shown = ", ".join(unknown[:SHOWN]) + (" ..." if len(unknown) > SHOWN else "")
    logger.warning(
        "the teacher has another vocabulary: %d of its tokens aren't the student's, %d of the student's aren't the "
        "teacher's%s",
        dropped,
        len(unknown),
        f" ({shown}), which it will never expect" if unknown else "",
    )
    return _with_rows(teacher, partners, student)


def _with_rows(
    teacher: WhisperForConditionalGeneration, partners: Tensor, student: WhisperConfig
) -> WhisperForConditionalGeneration:
    # -1: a token without a partner
    rows = torch.where(partners < 0, teacher.config.decoder_start_token_id, partners)
    weight = teacher.get_output_embeddings().weight.data[rows.to(teacher.device)]
    config = copy.deepcopy(teacher.config)
    config.vocab_size = len(rows)
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(student, name))
    with torch.device("meta"):  # no memory for weights that are replaced
        ours = WhisperForConditionalGeneration(config)
    weights = teacher.state_dict() | {"model.decoder.embed_tokens.weight": weight, "proj_out.weight": weight}
    ours.load_state_dict(weights, assign=True)
    ours.tie_weights()
    return ours.train(teacher.training)
