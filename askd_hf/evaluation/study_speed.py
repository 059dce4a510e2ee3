"""Speed of the students of a study beside their teacher."""

from pathlib import Path

from ..data.json_files import from_json, read_json, write_json
from ..models.generation_config import set_language
from ..models.loading import load_processor, load_whisper
from .options import EvaluationArguments
from .prepared_sets import prepare_set, spread_clips
from .results import Speed
from .speed import measure_speed
from .study import TEACHER, Study
from .suites import DatasetSpec


def saved_speed(file: Path) -> Speed | None:
    """Return what `measure_students` has kept in a file, or None."""
    return from_json(Speed, read_json(file)) if file.exists() else None


def measure_students(
    study: Study,
    teacher: str,
    model: str,
    evaluation: EvaluationArguments,
    spec: DatasetSpec,
    number: int,
    file: Path,
) -> Speed:
    """Measure one student of each kind and training of a teacher, and the teacher, in turns.

    Args:
        teacher: its name in the study.
        model: directory or Hub id of the teacher.
        evaluation: which clips of the set are evaluated.
        spec: the set to measure on.
        number: of clips, at equal distances in the set.
        file: where the result is kept. If it is of the same students and as many clips of the same set, and no
            student is newer, nothing is measured.

    Returns:
        Latencies at batch size 1 and 16. The roles are `STUDENT, TRAINING` and `teacher`.
    """
    directories: dict[str, str] = {}
    for result in study.results:
        if result.teacher == teacher and result.student:
            directories.setdefault(f"{result.student}, {result.training}", result.options["output_dir"])
    directories[TEACHER] = model
    processors = {role: load_processor(name) for role, name in directories.items()}
    window = min(processor.feature_extractor.chunk_length for processor in processors.values())
    sets = prepare_set(
        spec,
        window=min(window, evaluation.max_duration_in_seconds),
        limit=evaluation.max_eval_samples,
        on_bad_audio=evaluation.on_bad_audio,
        num_proc=evaluation.check_workers,
        recheck=evaluation.recheck,
    )
    _, clips = spread_clips(sets, number)
    saved = saved_speed(file)
    if saved is not None:
        same = ({row.role for row in saved.rows}, saved.set, saved.clips) == ({*directories}, spec.name, len(clips))
        if same and not any(_is_newer(Path(name), file) for name in directories.values()):
            return saved
    models = {role: load_whisper(name).eval() for role, name in directories.items()}
    for role, loaded in models.items():
        set_language(loaded, processors[role], spec.language, spec.task)
    sizes = sorted({min(size, len(clips)) for size in (1, 16)})
    speed = measure_speed(models, processors, clips, spec.name, batch_sizes=sizes)
    write_json(file, speed)
    return speed


def _is_newer(model: Path, file: Path) -> bool:
    weights = model / "model.safetensors"
    return weights.is_file() and weights.stat().st_mtime > file.stat().st_mtime
