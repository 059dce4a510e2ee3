"""Collate speech rows into batches of features, or cached encoder outputs, and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor

from ..arguments.renamed import renamed_keywords
from ..errors import UserError
from ..projection import label_positions
from .audio import (
    PAUSE,
    SAMPLING_RATE,
    AudioError,
    audio_files_of,
    extract_features,
    read_audio,
    resample,
    silence,
    waveform,
    with_pauses,
)
from .audio_context import FRAMES_PER_POSITION, FRAMES_PER_SECOND, context_frames
from .augment import Augmenter
from .checks import Limits
from .device_features import WaveformFeatures, attention_mask, check_extractor
from .encoder_cache import EncoderCache
from .labels import LABEL_PAD_TOKEN_ID, DecoderTokens, build_decoder_tokens, token_id

# the teacher's soft labels, in the order of `objective.TopK`; see `askd_hf.data.soft_labels`
TEACHER_COLUMNS = ("teacher_token_ids", "teacher_log_probs", "teacher_log_rest", "teacher_label_log_prob")
# appended to `rng_key`: token choices and the audio context use other random streams than the augmentation
TOKEN_STREAM, CONTEXT_STREAM = 1, 2
PADDING = "is_padding"  # of a row that fills a batch: its labels are masked
RESAMPLING_TOLERANCE = SAMPLING_RATE // 100  # samples by which resampling may lengthen a clip
FILTER_ADVICE = "askd_hf.filter_invalid_clips leaves out such clips, and of a stream SpeechCollator(limits=...)"


@dataclass
class SpeechCollator:
    """Decode the audio of a batch, or read its encoder outputs from a cache, and tokenize the transcripts.

    Language and task of the labels are those of the row, or else of the tokenizer (`tokenizer.set_prefix_tokens`).

    Random choices are seeded by the row's `rng_key`, integers such as (seed, epoch, row number). They are hence
    independent of the batch and the process. Evaluation rows have no `rng_key` and are deterministic.

    Args:
        processor: feature extractor and tokenizer of the student.
        config: config of the student. With `apply_spec_augment` batches have an attention mask, so that SpecAugment
            masks only speech.
        encoder_cache: cache with the outputs of the student's encoder for all clips (`cache_encoder`). Batches then
            have encoder outputs in place of features, and no audio is decoded. Default: None.
        teacher_extractor: feature extractor of a teacher with another encoder than the student's, or of any teacher
            that takes clean clips while the student's are augmented. Batches then also have features for the teacher.
            Default: None.
        timestamp_probability: probability of timestamps in the labels of a row with `segments`. Default: 0.
        condition_on_prev_probability: probability of the prompt in the decoder input of a row with `prompt`.
            Default: 0.
        augmenter: waveform augmentation of the student's audio. The teacher takes the clean clips, unless
            `augment_teacher` in its options. Default: None.
        shortest_context: shortest audio context of a training batch in seconds. Each batch gets a random context: at
            least this, at least `CONTEXT_MARGIN` more than its longest clip, and at most the window. Evaluation uses
            the whole window. Default: None, for the whole window in training too.
        features_on_device: leave the features to the device that the batch is moved to: batches have
            `WaveformFeatures` in place of feature tensors. Default: False.
        limits: validate rows here (streaming): invalid or filtered rows are dropped and listed in `batch["skipped"]`.
            Default: None, for rows validated by `filter_invalid_clips`.

    Raises:
        UserError: tokenizer and model have different start tokens, the vocabulary has no timestamps, or augmentation
            or `shortest_context` is combined with the encoder cache. With `features_on_device`: a feature extractor
            adds dither, or pads with another value than 0.
    """

    processor: WhisperProcessor
    config: WhisperConfig
    encoder_cache: EncoderCache | None = None
    teacher_extractor: WhisperFeatureExtractor | None = None
    timestamp_probability: float = 0.0
    condition_on_prev_probability: float = 0.0
    augmenter: Augmenter | None = None
    shortest_context: float | None = None
    features_on_device: bool = False
    limits: Limits | None = None

    def __post_init__(self):
        tokenizer_start, model_start = self.processor.tokenizer.prefix_tokens[0], self.config.decoder_start_token_id
        if tokenizer_start != model_start:
            raise UserError(
                f"decoder_start_token_id: the tokenizer starts labels with token {tokenizer_start}, the model with "
                f"{model_start}. Use the tokenizer of the model"
            )
        if self.timestamp_probability:
            first = token_id(self.processor.tokenizer, "<|notimestamps|>") + 1
            if first + self.config.max_source_positions >= self.config.vocab_size:
                raise UserError("--timestamp_probability: the model's vocabulary has no timestamps")
        if self.features_on_device:
            for extractor in filter(None, (self.processor.feature_extractor, self.teacher_extractor)):
                check_extractor(extractor)
        if self.augmenter is not None and self.encoder_cache is not None:
            raise UserError(
                "--augmentations can't be combined with --encoder_cache_dir: the student's audio differs in every "
                "epoch"
            )
        if self.shortest_context is not None and self.encoder_cache is not None:
            raise UserError(
                "a range of --window_seconds can't be combined with --encoder_cache_dir: the encoder's output depends "
                "on the audio context"
            )

    @property
    def is_random(self) -> bool:
        """Whether the batch of a clip may differ between epochs."""
        return self.changes_targets or self.augmenter is not None or self.shortest_context is not None

    @property
    def keeps_teacher_clean(self) -> bool:
        """Whether the student alone takes augmented audio."""
        return self.augmenter is not None and not self.augmenter.options.augment_teacher

    @property
    def changes_targets(self) -> bool:
        """Whether the labels of a clip, or the audio that the teacher takes, may differ between epochs."""
        augments_teacher = self.augmenter is not None and not self.keeps_teacher_clean
        return self.timestamp_probability > 0.0 or self.condition_on_prev_probability > 0.0 or augments_teacher

    def label_ids(self, row: Mapping[str, Any]) -> list[int]:
        """Return the labels of a row: prefix, text and end of text, without timestamps and prompt.

        They don't start with the start token, which the model prepends when it shifts the labels to the right.
        """
        return build_decoder_tokens(self.processor.tokenizer, row).labels

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows with `audio`, `text` and `clip` (see `load_speech_dataset`), and `audio_key` for the cache.

        Optional columns are `language`, `task`, `segments`, `prompt` (see `askd_hf.data.labels`), `no_speech`,
        `PADDING` (the labels of the row are masked), and `TEACHER_COLUMNS`.

        Returns:
            input_features: float32 `(batch, mel bins, frames)`; not with `encoder_cache`.
                With `features_on_device` this and `teacher_input_features` are `WaveformFeatures`.
            attention_mask: int `(batch, frames)`; only with SpecAugment.
            encoder_outputs: float16 `(batch, positions, d_model)`; only with `encoder_cache`.
            teacher_input_features: float32 `(batch, mel bins of the teacher, frames)`; only with `teacher_extractor`.
                Left out if `keeps_teacher_clean` and they equal the student's, as in evaluation.
            decoder_input_ids, labels: int64 `(batch, longest)`, padded with the padding token and -100.
            label_positions: int64 `(label tokens,)`, see `askd_hf.projection.label_positions`.
            clip: list of str.
            no_speech: bool `(batch,)`; only if some clip has no speech.
            skipped: list of (clip, reason, whether the row is invalid rather than filtered); only with `limits`.
            `TEACHER_COLUMNS`: `(batch, longest)` or `(batch, longest, k)`, padded with 0; only if the rows have them.

            If no row is left, the batch is one silent clip whose labels are all masked.

        Raises:
            UserError: a clip can't be decoded, or isn't in the cache: its file has changed since validation. Or a clip
                wasn't validated, and is longer than the window, or its transcript is missing or too long.
        """
        batch: dict[str, Any] = {}
        waves: list[np.ndarray] = []
        if self.limits is not None and "rng_key" in rows[0]:  # evaluation rows were validated before
            rows, waves, batch["skipped"] = self._valid_rows(rows)
        elif self.encoder_cache is None or self.teacher_extractor is not None:
            waves = [self._whole_waveform(row) for row in rows]  # decoded once for both models
        if not rows:
            return batch | self._dummy_batch()
        clean = waves
        waves, time_factors = self._augment(rows, waves)
        if self.encoder_cache is None:
            batch |= self._student_features(waves)
        else:
            batch["encoder_outputs"] = self.encoder_cache.read([row["audio_key"] for row in rows])
        if self.teacher_extractor is not None and self.keeps_teacher_clean:
            if "rng_key" in rows[0] or not self._has_same_extractor():
                batch["teacher_input_features"] = self._teacher_features(clean, None)
        elif self.teacher_extractor is not None:
            batch["teacher_input_features"] = self._teacher_features(waves, batch.get("input_features"))
        if self.shortest_context is not None and "rng_key" in rows[0]:
            self._shorten_context(batch, rows, max(map(len, waves)) / SAMPLING_RATE)
        tokens = [self._decoder_tokens(row, factor) for row, factor in zip(rows, time_factors, strict=True)]
        batch |= self._pad_tokens(tokens)
        batch["clip"] = [row["clip"] for row in rows]
        no_speech = [bool(row.get("no_speech")) for row in rows]
        if any(no_speech):
            batch["no_speech"] = torch.tensor(no_speech)
        return batch | _soft_labels(rows)

    def _whole_waveform(self, row: Mapping[str, Any]) -> np.ndarray:
        """Return the waveform of a clip. Raise `UserError` if it is speech that is longer than the window."""
        wave, window = waveform(row), self.processor.feature_extractor.n_samples
        if len(wave) > window + RESAMPLING_TOLERANCE and not row.get("no_speech"):
            raise UserError(
                f"{row['clip']}: too long: {len(wave) / SAMPLING_RATE:.2f} s, the limit is "
                f"{window / SAMPLING_RATE:g} s. {FILTER_ADVICE}"
            )
        return wave

    def _valid_rows(
        self, rows: list[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], list[np.ndarray], list[tuple[str, str, bool]]]:
        """Return the rows that are valid and not filtered out, their waveforms, and the others as in `skipped`."""
        valid, waves, skipped = [], [], []
        for row in rows:
            wave, error, silent, duration, tokens = None, "", "", 0.0, 0
            try:
                parts = [read_audio(audio) for audio in audio_files_of(row)]
                wave = with_pauses([resample(*part) for part in parts])
                silent = next(filter(None, (silence(samples) for samples, _ in parts)), "")
                duration = sum(len(samples) / rate for samples, rate in parts) + PAUSE * (len(parts) - 1)
                tokens = len(self.label_ids({**row, "text": row["text"] or ""}))
            except (AudioError, UserError) as caught:
                error = str(caught)
            limits = self.limits.for_no_speech() if row.get("no_speech") else self.limits
            if row.get("more_audio"):
                limits = limits.for_joined()
            invalid = limits.invalid_reason(error, duration, row, tokens, silent)
            reason = invalid or limits.filter_reason(duration, tokens)
            if reason:
                skipped.append((row["clip"], reason, invalid is not None))
            else:
                valid.append(row)
                waves.append(wave)
        return valid, waves, skipped

    def _augment(self, rows: list[Mapping[str, Any]], waves: list[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
        """Return the augmented waveforms and their durations relative to the original ones."""
        if self.augmenter is None:
            return waves, [1.0] * len(rows)
        augmented = [
            self.augmenter(wave, tuple(row["rng_key"])) if "rng_key" in row else (wave, 1.0)
            for wave, row in zip(waves, rows, strict=True)
        ]
        return [wave for wave, _ in augmented], [factor for _, factor in augmented]

    def _shorten_context(self, batch: dict[str, Any], rows: list[Mapping[str, Any]], longest_clip: float) -> None:
        """Cut the student's features to a random number of frames. See `shortest_context`.

        Args:
            longest_clip: seconds.
        """
        window = self.processor.feature_extractor.nb_max_frames
        shortest = max(context_frames(longest_clip, window), round((self.shortest_context or 0.0) * FRAMES_PER_SECOND))
        lowest, highest = (frames // FRAMES_PER_POSITION for frames in (min(shortest, window), window))
        rng = np.random.default_rng([*rows[0]["rng_key"], CONTEXT_STREAM])
        frames = FRAMES_PER_POSITION * int(rng.integers(lowest, highest, endpoint=True))
        for name in ("input_features", "attention_mask"):
            if name in batch:
                batch[name] = _first_frames(batch[name], frames)

    def _decoder_tokens(self, row: Mapping[str, Any], time_factor: float) -> DecoderTokens:
        timestamps = prompt = False
        if "rng_key" in row:
            values = np.random.default_rng([*row["rng_key"], TOKEN_STREAM]).random(2)
            timestamps, prompt = values < (self.timestamp_probability, self.condition_on_prev_probability)
        if row["text"] is None:
            raise UserError(f"{row['clip']}: no transcript. {FILTER_ADVICE}")
        tokens = build_decoder_tokens(
            self.processor.tokenizer,
            row,
            timestamps=timestamps,
            prompt=prompt,
            max_tokens=self.config.max_target_positions,
            max_positions=self.config.max_source_positions,
            time_factor=time_factor,
        )
        if len(tokens.labels) > self.config.max_target_positions:
            raise UserError(
                f"{row['clip']}: transcript too long: {len(tokens.labels)} tokens, the limit is "
                f"{self.config.max_target_positions}. {FILTER_ADVICE}"
            )
        if row.get(PADDING):
            return tokens._replace(labels=[LABEL_PAD_TOKEN_ID] * len(tokens.labels))
        return tokens

    def _pad_tokens(self, tokens: list[DecoderTokens]) -> dict[str, Tensor]:
        inputs, labels = zip(*tokens, strict=True)
        padded = [
            pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=value)
            for sequences, value in ((inputs, self.config.pad_token_id), (labels, LABEL_PAD_TOKEN_ID))
        ]
        batch = dict(zip(("decoder_input_ids", "labels"), padded, strict=True))
        return batch | {"label_positions": label_positions(batch["labels"])}

    def _dummy_batch(self) -> dict[str, Any]:
        """Return a batch with all labels masked: every process must run the same number of steps."""
        waves = [np.zeros(SAMPLING_RATE // 2, dtype=np.float32)]
        batch = self._student_features(waves)
        if self.teacher_extractor is not None:
            batch["teacher_input_features"] = self._teacher_features(waves, batch["input_features"])
        tokens = DecoderTokens([self.config.decoder_start_token_id], [LABEL_PAD_TOKEN_ID])
        return batch | self._pad_tokens([tokens]) | {"clip": ["(none)"]}

    def _student_features(self, waves: list[np.ndarray]) -> dict[str, Any]:
        """Return `input_features`, and with SpecAugment the `attention_mask`."""
        extractor, with_mask = self.processor.feature_extractor, self.config.apply_spec_augment
        if not self.features_on_device:
            return extract_features(extractor, waves, with_mask)
        features = {"input_features": WaveformFeatures.of(extractor, waves)}
        return features | ({"attention_mask": attention_mask(waves, extractor)} if with_mask else {})

    def _teacher_features(self, waves: list[np.ndarray], student_features: Any) -> Any:
        """Return the teacher's features. Equal student features are copied, as SpecAugment changes them in place."""
        if student_features is not None and self._has_same_extractor():
            return student_features if self.features_on_device else student_features.clone()
        if self.features_on_device:
            return WaveformFeatures.of(self.teacher_extractor, waves)
        return extract_features(self.teacher_extractor, waves)["input_features"]

    def _has_same_extractor(self) -> bool:
        return self.teacher_extractor.to_dict() == self.processor.feature_extractor.to_dict()


SpeechCollator.__init__ = renamed_keywords(  # type: ignore[method-assign]
    timestamps="timestamp_probability", prompts="condition_on_prev_probability"
)(SpeechCollator.__init__)


def _first_frames(features: Any, frames: int) -> Any:
    if isinstance(features, WaveformFeatures):
        return features.cut(frames)
    return features[..., :frames].contiguous()


def _soft_labels(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the padded `TEACHER_COLUMNS`, or nothing if the rows don't have them."""
    columns = {}
    for name in TEACHER_COLUMNS:
        if name in rows[0]:
            dtype = torch.int64 if name == "teacher_token_ids" else torch.float32
            values = [torch.from_numpy(np.array(row[name])).to(dtype) for row in rows]
            columns[name] = pad_sequence(values, batch_first=True)
    return columns
