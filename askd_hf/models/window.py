"""Shorten the audio window of a Whisper model.

The encoder has one position per 0.02 s, 1500 in Whisper's window of 30 s. Shorter clips are padded, so a clip of 2 s
costs as much as one of 30 s. A model with a window of N seconds has the first 50 N positions, and a feature extractor
that pads to N seconds. Everything else is unchanged, so transformers load it as any Whisper.
"""

from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import ModelArguments
from ..data.audio_context import FRAMES_PER_POSITION, FRAMES_PER_SECOND
from ..errors import UserError

POSITIONS_PER_SECOND = FRAMES_PER_SECOND // FRAMES_PER_POSITION


def window_seconds(model: WhisperForConditionalGeneration) -> float:
    """Return the audio window of a model in seconds."""
    return model.config.max_source_positions / POSITIONS_PER_SECOND


def crop_window(model: WhisperForConditionalGeneration, seconds: int) -> None:
    """Shorten the window of `model` to its first `seconds` seconds, in place.

    Raises `UserError` if its window is shorter.
    """
    positions = seconds * POSITIONS_PER_SECOND
    if positions > model.config.max_source_positions:
        raise UserError(
            f"--window_seconds must be at most {window_seconds(model):g}, the teacher's window, got {seconds}"
        )
    encoder = model.model.encoder
    embedding = encoder.embed_positions
    embedding.weight.data = embedding.weight.data[:positions].clone()
    embedding.num_embeddings = positions
    encoder.max_source_positions = model.config.max_source_positions = positions


def with_window_of(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> WhisperProcessor:
    """Return `processor` if its features have the model's window, else a processor with such features."""
    frames = FRAMES_PER_POSITION * model.config.max_source_positions
    if processor.feature_extractor.nb_max_frames == frames:
        return processor
    return WhisperProcessor(features_of(processor.feature_extractor, frames // FRAMES_PER_SECOND), processor.tokenizer)


def features_of(extractor: WhisperFeatureExtractor, seconds: int) -> WhisperFeatureExtractor:
    """Return a feature extractor with the settings of `extractor` and a window of `seconds` seconds."""
    derived = ("n_samples", "nb_max_frames")  # from chunk_length
    settings = {name: value for name, value in extractor.to_dict().items() if name not in derived}
    return WhisperFeatureExtractor(**settings | {"chunk_length": seconds})


def shortest_context(models: ModelArguments) -> float | None:
    """Return the shortest audio context of a training batch in seconds; None for the whole window."""
    window = models.window
    return None if window is None or window.shortest == window.longest else float(window.shortest)


def check_window(models: ModelArguments, student: WhisperForConditionalGeneration) -> None:
    """Raise `UserError` if the range of `--window_seconds` doesn't end at the window of `--student`."""
    if models.window is not None and models.window.longest != window_seconds(student):
        raise UserError(
            f"--window_seconds must end at the student's window, {window_seconds(student):g} s, got "
            f"{models.window_seconds}"
        )
