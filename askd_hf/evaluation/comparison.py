"""What has become of a student: itself, as it was before, and its teacher, on a run's evaluation splits."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import GenerationConfig, Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import Normalizer, SpeechSource
from ..config import ASKDConfig
from . import (
    FOLDER,
    Decoding,
    EvalSet,
    PreparedSet,
    Results,
    complete,
    measure_speed,
    plan_manifests,
    save_spelling,
    score_directory,
    write_report,
)
from .manifest import read_manifests
from .scoring import SPELLING_FILE
from .suites import language_code, with_speakers

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"  # in the run's directory; the model card takes its results from there
SPEED_CLIPS = 16
REPETITIONS = 3


class EvalSplit(NamedTuple):
    """Clips to evaluate on, of one language and task.

    Attributes:
        skipped: clips of the split that can't be used.
    """

    source: SpeechSource
    clips: Dataset
    skipped: int


def compare(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]],
    splits: dict[str, EvalSplit],
    normalizer: Normalizer,
    config: ASKDConfig,
) -> Results:
    """Evaluate models on a run's evaluation splits, as `askd-hf evaluate` does on any speech.

    Writes manifests, `results.json` and `report.html` to `evaluation` in the run's directory; what an earlier run left
    there, of these splits and models or others, is overwritten or removed: it was of other weights.

    Args:
        models: by role, `student` first, `teacher` last: what it was loaded by, the model in float32, its processor.
        splits: of `evaluation_speech`.
    """
    folder = Path(config.output_dir) / EVALUATION
    sets = [_set(name, split) for name, split in splits.items()]
    remove_others(folder, [prepared.source.name for prepared in sets], list(models))
    decoding = Decoding(
        num_beams=_as_in_training(models, config),
        generation_max_length=config.generation_max_length,
        batch_size=config.per_device_eval_batch_size,
        num_workers=config.dataloader_num_workers,
    )
    for _, _, processor in models.values():
        save_spelling(folder / FOLDER, processor.tokenizer.english_spelling_normalizer)
    jobs = plan_manifests(
        models, sets, decoding, folder / FOLDER, device=config.device, dtype=_dtype(config), overwrite=True
    )
    for job in jobs:
        complete(job)
    results = score_directory(folder, normalizer)
    clips = sets[0].clips.select(range(min(SPEED_CLIPS, len(sets[0].clips))))
    results.speed = measure_speed(
        {role: model for role, (_, model, _) in models.items()},
        {role: processor for role, (_, _, processor) in models.items()},
        clips,
        sets[0].source.name,
        batch_sizes=sorted({1, len(clips)}),
        repetitions=REPETITIONS,
        max_length=config.generation_max_length,
    )
    results.save(folder / "results.json")
    write_report(results, folder)
    return results


def _as_in_training(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]], config: ASKDConfig
) -> int:
    """Make all models search as the evaluations while training did, so that a student has one figure.

    Of `generation_config` its numbers and switches are taken over; tokens and languages are each model's own.

    Returns:
        The number of beams.
    """
    if config.generation_config is not None:
        given, known = Seq2SeqTrainer.load_generation_config(config.generation_config), GenerationConfig().to_dict()
        search = {
            name: value
            for name, value in given.to_dict().items()
            if name in known and isinstance(value, int | float) and not name.endswith(("token_id", "_model_config"))
        }
        for _, model, _ in models.values():
            model.generation_config.update(**search)
    _, student, _ = models["student"]
    return config.generation_num_beams or student.generation_config.num_beams or 1


def _dtype(config: ASKDConfig) -> torch.dtype:
    if config.bf16_full_eval or config.fp16_full_eval:  # as while training
        return torch.bfloat16 if config.bf16_full_eval else torch.float16
    # half precision is slower on a CPU, not faster
    return torch.float32 if config.device.type == "cpu" else getattr(torch, config.save_dtype)


def _set(name: str, split: EvalSplit) -> PreparedSet:
    source = split.source
    return PreparedSet(
        EvalSet(
            name,
            source.dataset,
            source.config,
            source.split,
            language=language_code(source.language),
            task=source.task or "transcribe",
        ),
        "short",
        with_speakers(split.clips),
        {"skipped, --on_bad_audio": split.skipped} if split.skipped else {},
    )


def remove_others(folder: Path, sets: list[str], roles: list[str]) -> None:
    """Remove an earlier evaluation from `folder`, but for manifests of these sets and roles.

    Others couldn't be scored together with what has been trained since.
    """
    for name in ("results.json", "report.html", f"{FOLDER}/{SPELLING_FILE}"):
        (folder / name).unlink(missing_ok=True)
    for name, manifests in read_manifests(folder / FOLDER).items():
        for role, manifest in manifests.items():
            if name not in sets or role not in roles:
                logger.warning("%s is of an earlier evaluation: removed", manifest.lines_file)
                manifest.lines_file.unlink(missing_ok=True)
                manifest.settings_file.unlink()
