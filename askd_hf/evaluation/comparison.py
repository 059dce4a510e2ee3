"""Evaluate a student, its initial weights and its teacher on the evaluation splits of a training run."""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import GenerationConfig, Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor

from ..arguments import Normalizer, SpeechSource
from ..config import ASKDConfig
from ..data.languages import language_code
from ..models.generation_config import set_language
from . import (
    MANIFESTS_DIR,
    DatasetSpec,
    Decoding,
    PreparedSet,
    Results,
    measure_speed,
    plan_jobs,
    run_jobs,
    save_spelling_normalizer,
    score_directory,
    write_report,
)
from .clip_audio import AUDIO_DIR
from .manifest import read_manifests
from .prepared_sets import spread
from .scoring import SPELLING_FILE
from .suites import with_speakers

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"  # in the output directory of the run; the model card takes its results from there
SPEED_CLIPS = 8
REPETITIONS = 3


class EvalSplit(NamedTuple):
    """Clips of one language and task to evaluate on."""

    source: SpeechSource
    clips: Dataset  # the valid clips, longest first
    skipped: int  # number of invalid clips of the split


def evaluate_models(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]],
    splits: dict[str, EvalSplit],
    normalizer: Normalizer,
    config: ASKDConfig,
) -> Results:
    """Evaluate models on the evaluation splits of a run, as `askd-hf evaluate` does on any dataset.

    Writes manifests, `results.json`, and `report.html` with its audio, to `evaluation` in the output directory of the
    run. Files of an earlier evaluation are overwritten or removed, because they are of other weights.

    Args:
        models: by role, `student` first, `teacher` last: the name it was loaded by, the model in float32, its
            processor.
        splits: from `evaluation_speech`.
        normalizer: see `normalizer_for`.
    """
    folder = Path(config.output_dir) / EVALUATION
    sets = [_prepared_set(name, split) for name, split in splits.items()]
    remove_stale_files(folder, [prepared.spec.name for prepared in sets], list(models))
    decoding = Decoding(
        num_beams=_apply_generation_config(models, config),
        generation_max_length=config.generation_max_length,
        batch_size=config.per_device_eval_batch_size,
        num_workers=config.dataloader_num_workers,
        share_work=False,  # the other processes have ended
    )
    for _, _, processor in models.values():
        save_spelling_normalizer(folder / MANIFESTS_DIR, processor.tokenizer.english_spelling_normalizer)
    jobs = plan_jobs(
        models, sets, decoding, folder / MANIFESTS_DIR, device=config.device, dtype=_dtype(config), overwrite=True
    )
    run_jobs(jobs)
    results = score_directory(folder, normalizer)
    clips = spread(sets[0].clips, SPEED_CLIPS)
    timed = {role: models[role] for role in models if role != "initial student"}  # it has the student's shape
    for _, model, processor in timed.values():
        set_language(model, processor, sets[0].spec.language, sets[0].spec.task)
    results.speed = measure_speed(
        {role: model for role, (_, model, _) in timed.items()},
        {role: processor for role, (_, _, processor) in timed.items()},
        clips,
        sets[0].spec.name,
        batch_sizes=speed_batch_sizes(len(clips)),
        repetitions=REPETITIONS,
        max_length=config.generation_max_length,
    )
    results.save(folder / "results.json")
    write_report(results, folder, sets)
    return results


def speed_batch_sizes(clips: int) -> list[int]:
    """Return the batch sizes that speed is measured at on so many clips."""
    return sorted({1, clips})


def _apply_generation_config(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]], config: ASKDConfig
) -> int:
    """Decode with the settings of the evaluations during training, so that both give the same WER.

    Copies the numbers and switches of `config.generation_config` to all models, but no token ids and languages.

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
    if config.bf16_full_eval or config.fp16_full_eval:  # as during training
        return torch.bfloat16 if config.bf16_full_eval else torch.float16
    # half precision is slower on a CPU
    return torch.float32 if config.device.type == "cpu" else getattr(torch, config.save_dtype)


def _prepared_set(name: str, split: EvalSplit) -> PreparedSet:
    source = split.source
    return PreparedSet(
        DatasetSpec(
            name,
            source.dataset,
            source.config,
            source.split,
            language=language_code(source.language),
            task=source.task or "transcribe",
        ),
        "short_form",
        with_speakers(split.clips),
        {"invalid, or longer than the window": split.skipped} if split.skipped else {},
    )


def remove_stale_files(folder: Path, sets: list[str], roles: list[str]) -> None:
    """Remove the files of an earlier evaluation from `folder`, except the manifests of these sets and roles.

    Manifests of other sets and roles are of earlier weights, and not comparable with the new ones.
    """
    for name in ("results.json", "report.html", f"{MANIFESTS_DIR}/{SPELLING_FILE}"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / AUDIO_DIR, ignore_errors=True)
    for name, manifests in read_manifests(folder / MANIFESTS_DIR).items():
        for role, manifest in manifests.items():
            if name not in sets or role not in roles:
                logger.warning("%s is of an earlier evaluation: removed", manifest.lines_file)
                manifest.lines_file.unlink(missing_ok=True)
                manifest.metadata_file.unlink()
