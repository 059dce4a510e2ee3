"""The model card: its metadata, and its template filled from `training.json` and evaluation results.

The text is in `templates/model_card.md`, `card_sections.py` and `card_training.py`. Sections without data are omitted.
"""

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.excluded_clips import excluded_lines
from ..evaluation.result_tables import (
    Table,
    comparison_table,
    error_rate_table,
    error_type_table,
    hallucination_table,
    model_table,
    part_table,
    speculative_verdict,
    speed_table,
    word_time_table,
)
from ..evaluation.results import CLIP_CONTEXT, Results
from .card_sections import (
    STUDENT,
    TEACHER,
    base_model_sentence,
    had_named_teacher,
    join_code,
    keeps_adapter,
    observed_errors,
    plural,
    results_line,
    settings_table,
    title_line,
    training_data,
    was_distilled,
)
from .card_training import (
    divergence_formula,
    has_no_speech_clips,
    hyperparameter_table,
    objective,
    schedule_table,
    uses,
)
from .provenance import LICENSE_FIELDS, Provenance
from .training_summary import TrainingSummary

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TASK = "automatic-speech-recognition"
ISO_CODES = {"jw": "jv"}  # the Hub requires ISO 639-1 codes; Whisper's code of Javanese is another


def render_card(
    summary: TrainingSummary, results: Results | None, repo_id: str, figure: bool = False, license: str | None = None
) -> ModelCard:
    """Return the card of a run.

    Args:
        results: an evaluation of the model as `student`; None for a card without results.
        repo_id: repository of the model, `you/name`, for the examples in the card.
        figure: whether `run.png` is published beside the card.
        license: license id of the Hub. Default: that of the model that training started from, if its card states one.
    """
    title = repo_id.split("/")[-1]
    if results is not None:
        results = public_results(results)
    uses_teacher, uses_self = uses(summary.arguments)
    return ModelCard.from_template(
        card_data(summary, results, title, license),
        template_path=str(TEMPLATE),
        title=title,
        repo=repo_id,
        summary=summary,
        provenance=summary.provenance,
        student=summary.student,
        arguments=summary.arguments,
        uses_teacher=uses_teacher,
        uses_self=uses_self,
        has_no_speech_clips=has_no_speech_clips(summary),
        uses_mix="{mix}" in divergence_formula(summary.arguments["divergence"]),
        title_line=title_line(summary),
        results_line=None if results is None else results_line(results),
        base_model=base_model_sentence(summary),
        assistant=assistant_class(summary),
        adapter=keeps_adapter(summary),
        options=pipeline_options(summary),
        training_data=training_data(summary),
        formula=objective(summary.arguments, has_no_speech_clips(summary)),
        phases=schedule_table(summary),
        hyperparameters=hyperparameter_table(summary),
        versions=", ".join(f"{name} {number}" for name, number in summary.versions.items()),
        figure=figure,
        evaluation=None if results is None else evaluation(results),
        code=join_code,
        plural=plural,
    )


def public_results(results: Results) -> Results:
    """Return the results of student and teacher only, without the initial student."""
    roles = [role for role in results.models if role in (STUDENT, CLIP_CONTEXT, TEACHER)]
    speed = results.speed
    return dataclasses.replace(
        results,
        models={role: results.models[role] for role in roles},
        sets=[
            dataclasses.replace(
                entry,
                scores={role: entry.scores[role] for role in roles if role in entry.scores},
                comparison=entry.comparison if entry.comparison and entry.comparison.baseline in roles else None,
            )
            for entry in results.sets
        ],
        speed=speed
        and dataclasses.replace(
            speed,
            rows=[row for row in speed.rows if row.role in roles],
            parts=[part for part in speed.parts if part.role in roles],
        ),
    )


def evaluation(results: Results) -> dict[str, Any]:
    """Return the tables and sentences of the evaluation section."""
    speech = [entry for entry in results.sets if entry.has_speech]
    tables = [error_rate_table(speech), comparison_table(speech), error_type_table(speech)] if speech else []
    tables += [hallucination_table(results.sets), word_time_table(results.sets), model_table(results)]
    if results.speed:
        tables += [speed_table(results.speed), part_table(results.speed)]
    return dict(
        tables=[_section(table) for table in tables if table.rows],
        excluded=excluded_lines(results.sets),
        speculative=results.speculative,
        speculative_verdict=results.speculative and speculative_verdict(results.speculative),
        settings=settings_table(results.settings),
        observed=[line for entry in results.sets for line in observed_errors(entry)],
    )


def _section(table: Table) -> str:
    notes = " ".join(f"{note}." for note in table.notes)
    return "\n\n".join([f"**{table.title}**", table.markdown(), *([notes] if notes else [])])


def assistant_class(summary: TrainingSummary) -> str | None:
    """Return the class that loads the student as the assistant of its teacher; None if it can't be one.

    The teacher must be on the Hub, with the same window, vocabulary and mel bins.
    """
    if not (had_named_teacher(summary) and summary.provenance.teacher.on_hub) or keeps_adapter(summary):
        return None
    teacher, student = summary.provenance.teacher, summary.student
    if teacher.window != student.window:
        return None
    for of_teacher, of_student in ((teacher.vocabulary, student.vocabulary), (teacher.mel_bins, student.mel_bins)):
        if None not in (of_teacher, of_student) and of_teacher != of_student:
            return None
    # with the teacher's encoder, the student's decoder is sufficient
    has_teacher_encoder = summary.arguments["freeze_encoder"] and summary.provenance.teachers_encoder
    return "AutoModelForCausalLM" if has_teacher_encoder else "AutoModelForSpeechSeq2Seq"


def pipeline_options(summary: TrainingSummary) -> str:
    """Return the arguments that `pipeline` needs for an adapter: it reads the generation config of the base model."""
    provenance = summary.provenance
    if not (keeps_adapter(summary) and summary.student.multilingual and provenance.language):
        return ""
    return f', generate_kwargs={{"language": "{provenance.language}", "task": "{provenance.task}"}}'


# ---- metadata ----


def card_data(
    summary: TrainingSummary, results: Results | None, title: str, license: str | None = None
) -> ModelCardData:
    """Return the metadata, from which the Hub derives filters, the model tree and leaderboards."""
    provenance = summary.provenance
    on_hub = provenance.base is not None and provenance.base.on_hub
    distilled = ["knowledge-distillation"] if was_distilled(summary) else []
    measured = model_index(results) if results is not None else []
    codes = [ISO_CODES.get(language, language) for language in provenance.languages]
    licensed: dict[str, Any] = inherited_license(provenance) if license is None else {"license": license}
    return ModelCardData(
        language=codes if len(codes) > 1 else next(iter(codes), None),
        **licensed,
        library_name="peft" if keeps_adapter(summary) else "transformers",
        pipeline_tag=TASK,
        base_model=provenance.base.name if on_hub else None,
        # the Hub's relations are adapter, merge, quantized and finetune; there is none for distillation
        base_model_relation=("adapter" if keeps_adapter(summary) else "finetune") if on_hub else None,
        datasets=list(dict.fromkeys(speech.dataset for speech in provenance.speech if speech.on_hub)) or None,
        metrics=["wer", "cer"] if measured else None,
        # the leaderboard lists results on datasets of the Hub
        tags=["whisper", *distilled, "askd_hf", *(["hf-asr-leaderboard"] if measured else [])],
        model_name=title if measured else None,
        eval_results=measured or None,
    )


def inherited_license(provenance: Provenance) -> dict[str, str]:
    """Return the license of the model that training started from, as the student is derived from its weights."""
    stated = {} if provenance.base is None else provenance.base.license
    return {key: stated[key] for key in LICENSE_FIELDS if key in stated}


def model_index(results: Results) -> list[EvalResult]:
    """Return the student's WER and CER on each transcribed set with speech that is on the Hub.

    Local sets are omitted, because `dataset_type` must be a dataset on the Hub.
    """
    found, named = [], set()
    for entry in results.sets:
        scores = entry.scores.get(STUDENT)
        if not (entry.has_speech and entry.on_hub) or scores is None or entry.task != "transcribe":
            continue
        # huggingface_hub merges results of the same type, configuration and split
        dataset, config = entry.dataset, entry.config
        if (dataset, config, entry.split) in named:
            config = entry.name
        named.add((dataset, config, entry.split))
        normalizer = "no" if entry.normalizer == "none" else entry.normalizer
        for metric in ("wer", "cer"):
            value, interval = getattr(scores, metric), getattr(scores, f"{metric}_confidence_interval")
            if value is None:
                continue
            arguments = dict(normalizer=entry.normalizer, clips=entry.clips, hours=round(entry.hours, 2))
            if interval is not None:
                arguments["interval"] = [round(bound, 2) for bound in interval]
            method = "" if entry.method == "short_form" else f", {entry.method} long-form"
            found.append(
                EvalResult(
                    task_type=TASK,
                    task_name="Automatic Speech Recognition",
                    dataset_type=dataset,
                    dataset_name=entry.name,
                    dataset_config=config,
                    dataset_split=entry.split,
                    dataset_args={"language": entry.language} if entry.language else None,
                    metric_type=metric,
                    metric_name=f"{metric.upper()} ({normalizer} normalizer, {entry.clips} clips{method})",
                    metric_value=round(value, 2),
                    metric_args=arguments,
                )
            )
    return found
