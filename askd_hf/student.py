"""Teacher and student: loading Whisper models, making a student of a teacher's layers, checking that a pair fits."""

import copy
import logging

import torch
from torch import nn
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from .errors import UserError
from .generation_config import is_multilingual
from .pretrained import check_max_length, check_processor, load_processor, load_whisper
from .teacher_memory import full_weights

__all__ = [
    "allow_silence",
    "check_max_length",
    "check_pair",
    "check_processor",
    "encoder_is_deterministic",
    "init_student",
    "is_multilingual",
    "layers_kept",
    "layers_to_copy",
    "load_processor",
    "load_whisper",
    "no_timestamps",
    "pair_differences",
    "same_encoder",
    "set_language",
    "set_languages",
]

logger = logging.getLogger(__name__)


def set_language(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, language: str | None, task: str
) -> None:
    """Make a multilingual model generate, and its tokenizer label, in `language`; an English-only one needs nothing.

    Raises `UserError` if a multilingual model has no language, or one that it doesn't know.
    """
    if not is_multilingual(model):
        if language is not None and language.lower() not in ("en", "english"):
            raise UserError(f"--language {language}: this model knows English only")
        if task != "transcribe":
            raise UserError(f"--task {task}: this model knows English only, and nothing to translate")
        return
    if language is None:
        raise UserError(
            "--language is missing: the model is multilingual; say what is spoken, as in --language english"
        )
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    known = [token.strip("<|>") for token in model.generation_config.lang_to_id]
    if code not in known:
        raise UserError(f"--language {language}: the model knows {', '.join(known)}")
    processor.tokenizer.set_prefix_tokens(language=code, task=task, predict_timestamps=False)
    model.generation_config.language = code
    model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None  # the older way to say the same; both together are refused


def set_languages(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, spoken: list[tuple[str | None, str | None]]
) -> None:
    """`set_language` for several pairs of language and task; None: as the rows of speech say.

    Of several languages the model finds out for itself which it is; of both tasks it transcribes, unless it is told
    otherwise.
    """
    languages = {language for language, _ in spoken}
    tasks = {task or "transcribe" for _, task in spoken}
    task = tasks.pop() if len(tasks) == 1 else "transcribe"
    if not is_multilingual(model):
        for language in languages:
            set_language(model, processor, language, task)
        return
    for language in sorted(languages - {None}, reverse=True):  # the first is what the tokenizer stays set to
        set_language(model, processor, language, task)
    if len(languages) > 1 or None in languages:
        model.generation_config.language = None
    model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None


def allow_silence(model: WhisperForConditionalGeneration) -> None:
    """Let a model that learns when nobody speaks say nothing: OpenAI's configuration forbids to end at once."""
    config = model.generation_config
    if config.begin_suppress_tokens:
        config.begin_suppress_tokens = [i for i in config.begin_suppress_tokens if i != model.config.eos_token_id]


def no_timestamps(model: WhisperForConditionalGeneration) -> dict[str, list[int]]:
    """Options with which `generate` gives none: beside what the model's configuration suppresses, all timestamps.

    A student that learns with timestamps may write some without being asked. `generate` then looks for more text
    behind them, for ever if they stand still, and can't without the features of the clip.
    """
    config = model.generation_config
    # what isn't in a generation config's file isn't there
    last = getattr(config, "no_timestamps_token_id", None)
    timestamps = range(0) if last is None else range(last + 1, model.config.vocab_size)
    return {"suppress_tokens": [*(config.suppress_tokens or []), *timestamps]} if timestamps else {}


def layers_to_copy(layers: int | list[int] | str, available: int, kind: str = "decoder") -> list[int]:
    """The teacher's layers that the student gets, from a number or a list, as in `2`, `"2"`, `[0, 31]` or `"0,31"`.

    `"31,"` is a list of a single layer. A number is spread evenly. Raises `UserError` for layers that the teacher
    doesn't have.
    """
    try:
        if isinstance(layers, str):
            layers = [int(i) for i in layers.removesuffix(",").split(",")] if "," in layers else int(layers)
    except ValueError:
        raise UserError(f"{kind}_layers: {layers!r} is neither a number nor a list such as 0,1,31") from None
    if isinstance(layers, int):
        if not 1 <= layers <= available:
            raise UserError(f"{kind}_layers: {layers} is not between 1 and the teacher's {available}")
        return evenly_spread(layers, available)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < available for i in layers):
        raise UserError(f"{kind}_layers: {layers} must be different layers from 0 to the teacher's {available - 1}")
    return list(layers)


def evenly_spread(layers: int, available: int) -> list[int]:
    """`layers` of `available`, the first and the last kept (distil-whisper, Gandhi et al. 2023, section 4).

    A single layer is the last, whose output the layer norm and what follows it were trained on.
    """
    if layers == 1:
        return [available - 1]
    return [round(i * (available - 1) / (layers - 1)) for i in range(layers)]


def init_student(
    teacher: WhisperForConditionalGeneration,
    decoder_layers: int | list[int] | str = 2,
    encoder_layers: int | list[int] | str | None = None,
) -> WhisperForConditionalGeneration:
    """A float32 student of the chosen layers of `teacher`, all weights copied; the teacher is left as it is.

    Args:
        decoder_layers: how many (spread evenly) or which of the teacher's decoder layers to keep.
        encoder_layers: likewise; None keeps the encoder whole.
    """
    config = copy.deepcopy(teacher.config)
    decoder = layers_to_copy(decoder_layers, config.decoder_layers)
    encoder = layers_to_copy(
        config.encoder_layers if encoder_layers is None else encoder_layers, config.encoder_layers, "encoder"
    )
    config.decoder_layers, config.encoder_layers = len(decoder), len(encoder)
    config.num_hidden_layers = config.encoder_layers
    config.dtype = torch.float32
    student = WhisperForConditionalGeneration(config)

    new_index = {f"model.decoder.layers.{old}.": f"model.decoder.layers.{new}." for new, old in enumerate(decoder)}
    new_index |= {f"model.encoder.layers.{old}.": f"model.encoder.layers.{new}." for new, old in enumerate(encoder)}
    weights = {}
    for name, weight in teacher.state_dict().items():
        if ".layers." in name:
            prefix = ".".join(name.split(".")[:4]) + "."
            if prefix not in new_index:
                continue
            name = new_index[prefix] + name.removeprefix(prefix)
        weights[name] = weight
    student.load_state_dict(weights)
    student.generation_config = _generation_config(teacher, decoder)
    return student.to(teacher.device)


def _generation_config(teacher: WhisperForConditionalGeneration, kept: list[int]) -> GenerationConfig:
    """The teacher's, with the alignment heads (layer, head) of the decoder layers that the student has.

    Word timestamps index the decoder's layers by them, and crash where a layer is gone.
    """
    generation_config = copy.deepcopy(teacher.generation_config)
    heads = getattr(generation_config, "alignment_heads", None)
    if heads is not None:
        heads = [[kept.index(layer), head] for layer, head in heads if layer in kept]
        if heads:
            generation_config.alignment_heads = heads
        else:
            del generation_config.alignment_heads
            logger.warning("none of the teacher's alignment heads is left: the student has no word timestamps")
    return generation_config


def check_pair(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, own_features: bool = False
) -> None:
    """Raise `UserError` unless one batch serves both models and their logits speak of the same tokens.

    Args:
        own_features: the batch has features for each of them, so they needn't have the same mel bins.
    """
    differences = pair_differences(teacher, student, own_features)
    if differences:
        raise UserError(
            f"teacher and student don't match: {'; '.join(differences)}. Another vocabulary: "
            "askd_hf.vocabulary.with_vocabulary_of; other mel bins: SpeechCollator(..., teacher_extractor=...). The "
            "scripts do both by themselves"
        )


def pair_differences(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, own_features: bool = False
) -> list[str]:
    """What `check_pair` refuses, in words."""
    differences = []
    for name, meaning in {
        "vocab_size": "tokens in the vocabulary",
        "num_mel_bins": "mel bins",
        "max_source_positions": "encoder positions",
        "decoder_start_token_id": "as the id of the start token",
    }.items():
        if name == "num_mel_bins" and own_features:
            continue
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            differences.append(f"{theirs} against {ours} {meaning}")
    return differences


def same_encoder(teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration) -> bool:
    """Whether the encoders have equal weights, up to the teacher's dtype."""
    same_heads = teacher.config.encoder_attention_heads == student.config.encoder_attention_heads
    return same_heads and _same_weights(teacher.model.encoder, student.model.encoder)


def _same_weights(teacher: nn.Module, student: nn.Module) -> bool:
    """Up to the teacher's dtype; an adapter on the student, and its names, aside."""
    theirs = full_weights(teacher)
    ours = {
        name.replace(".base_layer.", "."): weight
        for name, weight in student.state_dict().items()
        if ".lora_" not in name
    }
    return theirs.keys() == ours.keys() and all(
        weight.shape == ours[name].shape and torch.equal(weight, ours[name].to(weight.device, weight.dtype))
        for name, weight in theirs.items()
    )


def layers_kept(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration
) -> list[int] | None:
    """The layers of the teacher's encoder that the student's was compressed to, by equal weights.

    Up to the teacher's dtype, and in the student's order. None if the student's encoder is whole, or if its layers
    are others.
    """
    theirs, ours = teacher.model.encoder.layers, student.model.encoder.layers
    kept = [next((i for i, layer in enumerate(theirs) if _same_weights(layer, copy)), None) for copy in ours]
    return None if None in kept or kept == list(range(len(theirs))) else kept


def encoder_is_deterministic(config: WhisperConfig) -> bool:
    """Whether training leaves the encoder's output alone: no SpecAugment, no layerdrop, no dropout."""
    varies = config.apply_spec_augment or config.encoder_layerdrop or config.dropout or config.attention_dropout
    return not (varies or config.activation_dropout)
