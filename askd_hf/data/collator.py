"""Rows of speech to a batch of features, or of the encoder's cached outputs, and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor

from ..errors import UserError
from .audio import extract_features, waveform
from .encoder_cache import EncoderCache

IGNORED = -100
# the teacher's soft labels, in the order of `objective.TopK`; see `askd_hf.teacher_cache`
TEACHER_COLUMNS = ("teacher_token_ids", "teacher_log_probs", "teacher_log_rest", "teacher_label_log_prob")


@dataclass
class SpeechCollator:
    """Decodes the audio of a batch, or reads the encoder's outputs from the cache, and tokenizes its text.

    The language and the task of the labels are those of the tokenizer (`tokenizer.set_prefix_tokens`).

    Args:
        processor: the feature extractor and tokenizer of the student.
        config: of the student. `decoder_start_token_id` is stripped from the labels; with `apply_spec_augment` the
            batch has an attention mask, so that only speech is masked out.
        encoder_cache: of the student's encoder, with all clips (`cache_encoder`). The batch then has the encoder's
            outputs in place of features, and no audio is decoded.
        teacher_extractor: of a teacher whose encoder isn't the student's. The batch then has features for it too.
    """

    processor: WhisperProcessor
    config: WhisperConfig
    encoder_cache: EncoderCache | None = None
    teacher_extractor: WhisperFeatureExtractor | None = None

    def label_ids(self, text: str) -> list[int]:
        """The labels of a transcript: prefix, text, end of text; without the leading start token.

        The model shifts labels to the right and puts the start token in front itself: it must not stand there twice.
        """
        ids = self.processor.tokenizer(text).input_ids
        if ids[0] != self.config.decoder_start_token_id:
            start = self.config.decoder_start_token_id
            raise UserError(
                f"the tokenizer starts labels with token {ids[0]}, the model with {start} (decoder_start_token_id): "
                "they don't belong together"
            )
        return ids[1:]

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch from rows with `audio`, `text` and `clip` (see `load_speech`); for the cache also `audio_key`.

        Rows may have the teacher's soft labels, `TEACHER_COLUMNS`.

        Returns:
            `input_features`: float32 `(batch, mel bins, frames)`, with SpecAugment also `attention_mask`: int `(batch,
            frames)`; or `encoder_outputs`: float16 `(batch, positions, d_model)`; with `teacher_extractor` also
            `teacher_input_features`, as `input_features` but for their number of mel bins; `labels`: int64 `(batch,
            longest label)`, filled up with -100; `clip`: list of str; and the teacher's columns, if there are any:
            `(batch, longest label)` or `(batch, longest label, k)`, filled up with 0.

        Raises:
            UserError: a clip can't be decoded, or isn't in the cache: it has changed since it was checked.
        """
        batch = {}
        if self.encoder_cache is None or self.teacher_extractor is not None:
            waves = [waveform(row) for row in rows]  # once, for both models
        if self.encoder_cache is None:
            batch |= extract_features(self.processor.feature_extractor, waves, self.config.apply_spec_augment)
        else:
            batch["encoder_outputs"] = self.encoder_cache.read([row["audio_key"] for row in rows])
        if self.teacher_extractor is not None:
            batch["teacher_input_features"] = self._teacher_features(waves, batch.get("input_features"))
        labels = [torch.tensor(self.label_ids(row["text"])) for row in rows]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        batch["clip"] = [row["clip"] for row in rows]
        for name in TEACHER_COLUMNS:
            if name in rows[0]:
                dtype = torch.int64 if name == "teacher_token_ids" else torch.float32
                columns = [torch.from_numpy(np.array(row[name])).to(dtype) for row in rows]
                batch[name] = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)
        return batch

    def _teacher_features(self, waves: list[np.ndarray], ours: Tensor | None) -> Tensor:
        """The student's, if they are the same, but a copy: SpecAugment writes into the student's."""
        if ours is not None and self.teacher_extractor.to_dict() == self.processor.feature_extractor.to_dict():
            return ours.clone()
        return extract_features(self.teacher_extractor, waves)["input_features"]
