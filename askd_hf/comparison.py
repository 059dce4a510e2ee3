"""What has become of a student: itself, as it was before, and its teacher, on a run's evaluation splits."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from .config import ASKDConfig, DataArguments
from .evaluation import (
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
from .evaluation.suites import language_code

EVALUATION = "evaluation"  # in the run's directory; the model card takes its results from there
SPEED_CLIPS = 16
REPETITIONS = 3


def compare(
    models: dict[str, tuple[str, WhisperForConditionalGeneration, WhisperProcessor]],
    splits: dict[str, Dataset],
    data_args: DataArguments,
    config: ASKDConfig,
) -> Results:
    """Evaluate models on a run's evaluation splits, as `examples/evaluate.py` does on any speech.

    Writes manifests, `results.json` and `report.html` to `evaluation` in the run's directory; what an earlier run left
    there is overwritten.

    Args:
        models: by role, `student` first, `teacher` last: what it was loaded by, the model in float32, its processor.
        splits: of `check_split`, named as `data_args.eval_sources()` are.
    """
    folder = Path(config.output_dir) / EVALUATION
    # half precision is slower on a CPU, not faster
    dtype = torch.float32 if config.device.type == "cpu" else getattr(torch, config.save_dtype)
    decoding = Decoding(
        generation_max_length=config.generation_max_length,
        batch_size=config.per_device_eval_batch_size,
        num_workers=config.dataloader_num_workers,
    )
    sets = [
        PreparedSet(
            EvalSet(
                source.name,
                source.dataset,
                source.config,
                source.split,
                language=language_code(data_args.language),
                task=data_args.task,
            ),
            "short",
            splits[source.name],
            {},
        )
        for source in data_args.eval_sources()
    ]
    for role, (name, model, processor) in models.items():
        save_spelling(folder / FOLDER, processor.tokenizer.english_spelling_normalizer)
        jobs = plan_manifests(
            role,
            name,
            model,
            processor,
            sets,
            decoding,
            folder / FOLDER,
            device=config.device,
            dtype=dtype,
            overwrite=True,
        )
        for job in jobs:
            complete(job)
    results = score_directory(folder, data_args.normalizer)
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
