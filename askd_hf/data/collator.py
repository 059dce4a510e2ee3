"""Rows of speech to a batch of features and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import WhisperConfig, WhisperProcessor

from ..errors import UserError
from .audio import SAMPLING_RATE, AudioError, decode_audio

IGNORED = -100


@dataclass
class SpeechCollator:
    """Decodes the audio of a batch and tokenizes its text; nothing is kept on disk.

    The language and the task of the labels are those of the tokenizer (`tokenizer.set_prefix_tokens`).

    Args:
        processor: the feature extractor and tokenizer of the teacher.
        config: of the student. `decoder_start_token_id` is stripped from the labels; with `apply_spec_augment` the
            batch has an attention mask, so that only speech is masked out.
    """

    processor: WhisperProcessor
    config: WhisperConfig

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
        """A batch from rows with `audio`, `text` and `clip` (see `load_speech`).

        Returns:
            `input_features`: float32 `(batch, mel bins, frames)`; `labels`: int64 `(batch, longest label)`, filled up
            with -100; `clip`: list of str; with SpecAugment also `attention_mask`: int `(batch, frames)`.

        Raises:
            UserError: a clip can't be decoded. It could when it was checked, so it has changed since.
        """
        features = self.processor.feature_extractor(
            [self._waveform(row) for row in rows],
            sampling_rate=SAMPLING_RATE,
            return_attention_mask=self.config.apply_spec_augment,
            return_tensors="pt",
        )
        labels = [torch.tensor(self.label_ids(row["text"])) for row in rows]
        return {
            **features,
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "clip": [row["clip"] for row in rows],
        }

    def _waveform(self, row: Mapping[str, Any]):
        try:
            return decode_audio(row["audio"])
        except AudioError as error:
            raise UserError(f"{row['clip']}: {error}. It was sound when it was checked before training") from error
