"""Rows of speech to a batch of features, or of the encoder's cached outputs, and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor

from ..errors import UserError
from .audio import SAMPLING_RATE, AudioError, extract_features, read_audio, resample, silence, waveform
from .augment import Augmenter
from .checks import Limits
from .encoder_cache import EncoderCache
from .labels import IGNORED, Example, example, token_id

# the teacher's soft labels, in the order of `objective.TopK`; see `askd_hf.data.teacher_cache`
TEACHER_COLUMNS = ("teacher_token_ids", "teacher_log_probs", "teacher_log_rest", "teacher_label_log_prob")
OF_TOKENS = 1  # what is drawn for a clip's tokens comes from another random stream than its augmentation


@dataclass
class SpeechCollator:
    """Decodes the audio of a batch, or reads the encoder's outputs from the cache, and tokenizes its text.

    Language and task of the labels are those of the row, or else of the tokenizer (`tokenizer.set_prefix_tokens`).

    What is random about a clip is drawn for a row's `draw`, integers such as (seed, epoch, row), and so is the same in
    any batch and process. Rows without it, those of evaluation, have nothing random.

    Args:
        processor: the feature extractor and tokenizer of the student.
        config: of the student. With `apply_spec_augment` the batch has an attention mask, so that only speech is
            masked out.
        encoder_cache: of the student's encoder, with all clips (`cache_encoder`). The batch then has the encoder's
            outputs in place of features, and no audio is decoded.
        teacher_extractor: of a teacher whose encoder isn't the student's. The batch then has features for it too.
        timestamps: the probability that a row with `segments` is learned with their times.
        prompts: the probability that a row with a `prompt`, the text before it, is learned with it.
        augmenter: changes the audio; the teacher hears the same.
        limits: of rows that nobody has looked at, as those of a stream: what is unusable or unwanted is left out of
            the batch, which names it. None: all rows have been checked (`filter_invalid_clips`).
    """

    processor: WhisperProcessor
    config: WhisperConfig
    encoder_cache: EncoderCache | None = None
    teacher_extractor: WhisperFeatureExtractor | None = None
    timestamps: float = 0.0
    prompts: float = 0.0
    augmenter: Augmenter | None = None
    limits: Limits | None = None

    def __post_init__(self):
        ours, models = self.processor.tokenizer.prefix_tokens[0], self.config.decoder_start_token_id
        if ours != models:
            raise UserError(
                f"the tokenizer starts labels with token {ours}, the model with {models} (decoder_start_token_id): "
                "they don't belong together"
            )
        if self.timestamps:
            first = token_id(self.processor.tokenizer, "<|notimestamps|>") + 1
            if first + self.config.max_source_positions >= self.config.vocab_size:
                raise UserError("--timestamp_probability: the model's vocabulary has no timestamps")
        if self.augmenter is not None and self.encoder_cache is not None:
            raise UserError("--augment: the encoder's output of a clip that is always another can't be cached")

    @property
    def is_random(self) -> bool:
        """Whether a clip may be another in every epoch."""
        return self.timestamps > 0.0 or self.prompts > 0.0 or self.augmenter is not None

    def label_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The labels of a row: prefix, text, end of text; without timestamps and prompt, nor the leading start token.

        The model shifts labels to the right and puts the start token in front itself: it must not stand there twice.
        """
        return example(self.processor.tokenizer, row).labels

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch from rows with `audio`, `text` and `clip` (see `load_speech_dataset`); for the cache also `audio_key`.

        Rows may have `language`, `task`, `segments` and `prompt` (`data.labels`), `negative` where nobody speaks, and
        the teacher's soft labels, `TEACHER_COLUMNS`.

        Returns:
            `input_features`: float32 `(batch, mel bins, frames)`, with SpecAugment also `attention_mask`: int `(batch,
            frames)`; or `encoder_outputs`: float16 `(batch, positions, d_model)`; with `teacher_extractor` also
            `teacher_input_features`, as `input_features` but for their number of mel bins; `decoder_input_ids` and
            `labels`: int64 `(batch, longest)`, filled up with the padding token and -100; `clip`: list of str;
            `no_speech`: bool `(batch,)`, if there are negatives; with `limits` `skipped`: of each row that was
            left out the clip, the reason, and whether it can't be used (else it isn't wanted); and the teacher's
            columns, if there are any: `(batch, longest)` or `(batch, longest, k)`, filled up with 0.

            If not one row is left, the batch is a clip of silence without labels.

        Raises:
            UserError: a clip can't be decoded, or isn't in the cache: it has changed since it was checked.
        """
        batch: dict[str, Any] = {}
        waves: list[np.ndarray] = []
        if self.limits is not None and "draw" in rows[0]:  # and not those of evaluation, which have been looked at
            rows, waves, batch["skipped"] = self._usable(rows)
        elif self.encoder_cache is None or self.teacher_extractor is not None:
            waves = [waveform(row) for row in rows]  # once, for both models
        if not rows:
            return batch | self._nothing()
        factors = [1.0] * len(rows)
        if self.augmenter is not None:
            augmented = [
                self.augmenter.augment(wave, tuple(row["draw"])) if "draw" in row else (wave, 1.0)
                for wave, row in zip(waves, rows, strict=True)
            ]
            waves, factors = map(list, zip(*augmented, strict=True))
        if self.encoder_cache is None:
            batch |= extract_features(self.processor.feature_extractor, waves, self.config.apply_spec_augment)
        else:
            batch["encoder_outputs"] = self.encoder_cache.read([row["audio_key"] for row in rows])
        if self.teacher_extractor is not None:
            batch["teacher_input_features"] = self._teacher_features(waves, batch.get("input_features"))
        batch |= self._tokens([self._example(row, factor) for row, factor in zip(rows, factors, strict=True)])
        batch["clip"] = [row["clip"] for row in rows]
        silent = [bool(row.get("negative")) for row in rows]
        if any(silent):
            batch["no_speech"] = torch.tensor(silent)
        for name in TEACHER_COLUMNS:
            if name in rows[0]:
                dtype = torch.int64 if name == "teacher_token_ids" else torch.float32
                columns = [torch.from_numpy(np.array(row[name])).to(dtype) for row in rows]
                batch[name] = pad_sequence(columns, batch_first=True)
        return batch

    def _usable(
        self, rows: list[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], list[np.ndarray], list[tuple[str, str, bool]]]:
        """The rows that can be used and are wanted, their waveforms, and the others as in a batch's `skipped`."""
        good, waves, skipped = [], [], []
        for row in rows:
            wave, problem, silent, seconds, tokens = None, "", "", 0.0, 0
            try:
                samples, rate = read_audio(row["audio"])
                wave, silent, seconds = resample(samples, rate), silence(samples), len(samples) / rate
                tokens = len(self.label_ids({**row, "text": row["text"] or ""}))
            except (AudioError, UserError) as error:
                problem = str(error)
            limits = self.limits.of_negatives() if row.get("negative") else self.limits
            unusable = limits.unusable(problem, seconds, row, tokens, silent)
            reason = unusable or limits.unwanted(seconds, tokens)
            if reason:
                skipped.append((row["clip"], reason, unusable is not None))
            else:
                good.append(row)
                waves.append(wave)
        return good, waves, skipped

    def _example(self, row: Mapping[str, Any], time_factor: float) -> Example:
        timestamps = prompt = False
        if "draw" in row:
            chances = np.random.default_rng([*row["draw"], OF_TOKENS]).random(2)
            timestamps, prompt = chances < (self.timestamps, self.prompts)
        return example(
            self.processor.tokenizer,
            row,
            timestamps=timestamps,
            prompt=prompt,
            max_tokens=self.config.max_target_positions,
            max_positions=self.config.max_source_positions,
            time_factor=time_factor,
        )

    def _tokens(self, examples: list[Example]) -> dict[str, Tensor]:
        inputs, labels = zip(*examples, strict=True)
        filled_up_with = (inputs, self.config.pad_token_id), (labels, IGNORED)
        padded = [
            pad_sequence([torch.tensor(ids) for ids in clips], batch_first=True, padding_value=value)
            for clips, value in filled_up_with
        ]
        return dict(zip(("decoder_input_ids", "labels"), padded, strict=True))

    def _nothing(self) -> dict[str, Any]:
        """A clip that teaches nothing: several processes must have the same number of batches."""
        silence = [np.zeros(SAMPLING_RATE // 2, dtype=np.float32)]
        batch = extract_features(self.processor.feature_extractor, silence, self.config.apply_spec_augment)
        if self.teacher_extractor is not None:
            batch["teacher_input_features"] = self._teacher_features(silence, batch["input_features"])
        start = [self.config.decoder_start_token_id]
        return batch | self._tokens([Example(start, [IGNORED])]) | {"clip": ["(none)"]}

    def _teacher_features(self, waves: list[np.ndarray], ours: Tensor | None) -> Tensor:
        """The student's, if they are the same, but a copy: SpecAugment writes into the student's."""
        if ours is not None and self.teacher_extractor.to_dict() == self.processor.feature_extractor.to_dict():
            return ours.clone()
        return extract_features(self.teacher_extractor, waves)["input_features"]
