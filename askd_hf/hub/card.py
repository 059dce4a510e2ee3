"""The model card, filled in from a run's `training.json` and from evaluation results.

What wasn't measured is left out. The text is in `templates/model_card.md`, its tables are in `card_text.py`; here are
the metadata and what is known of the model's limits.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.results import CONFIDENCE, Results, Scores, SetResult
from .card_sections import (
    comparison,
    descent,
    dropped,
    has_negatives,
    hyperparameter_table,
    intended_use,
    keeps_adapter,
    model_table,
    objective,
    phase_table,
    quoted,
    rates_line,
    results_line,
    score_table,
    set_name,
    settings_line,
    speculative_line,
    speech_line,
    speed_conditions,
    speed_table,
    symbols,
    title_line,
    was_distilled,
    was_taught,
)
from .provenance import LICENSE_FIELDS, Provenance
from .training_summary import TrainingSummary

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TASK = "automatic-speech-recognition"
# Whisper's code of Javanese isn't the one of ISO 639-1, which the Hub asks for
ISO_CODES = {"jw": "jv"}
METRIC_NAMES = {"wer": "WER", "cer": "CER", "loss": "loss"}
STUDENT, TEACHER = "student", "teacher"


def render_card(
    facts: TrainingSummary, results: Results | None, repo_id: str, figure: bool = False, license: str | None = None
) -> ModelCard:
    """The card of a run.

    Args:
        facts: of `training.json`.
        results: of an evaluation in which it is the `student`; None: the card has no results section.
        repo_id: where the model is published, `you/name`: as the examples in the card load it.
        figure: whether `run.png` is published beside the card.
        license: as the Hub calls it; None: that of the model that training started from, if its card states one.
    """
    title = repo_id.split("/")[-1]
    data = card_data(facts, results, title, license)
    tables = {}
    if results is not None:
        tables = dict(
            scores=score_table(results) if any(entry.speech for entry in results.sets) else None,
            rates=rates_line(results),
            models=model_table(results),
            comparisons=[comparison(entry) for entry in results.sets if entry.paired],
            dropped=[dropped(entry) for entry in results.sets if entry.dropped],
            settings=settings_line(results.settings),
            blocks=sorted({entry.blocks for entry in results.sets if entry.speech}),
            speed=results.speed and speed_table(results.speed),
            conditions=results.speed and speed_conditions(results.speed),
            speculative=results.speculative and speculative_line(results.speculative),
        )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        repo=repo_id,
        facts=facts,
        origin=facts.origin,
        student=facts.student,
        title_line=title_line(facts),
        results_line=None if results is None else results_line(results),
        descent=descent(facts),
        assistant=assistant_class(facts),
        adapter=keeps_adapter(facts),
        options=pipeline_options(facts),
        intended_use=intended_use(facts),
        speech=speech_line(facts),
        formula=objective(facts.arguments, has_negatives(facts)),
        symbols=symbols(facts),
        phases=phase_table(facts),
        hyperparameters=hyperparameter_table(facts),
        versions=", ".join(f"{name} {number}" for name, number in facts.versions.items()),
        figure=figure,
        evaluation=tables,
        confidence=f"{100 * CONFIDENCE:g}",
        limits=limits(facts, results),
    )


def assistant_class(facts: TrainingSummary) -> str | None:
    """By which transformers loads it as the assistant of its teacher; None if it has none that anyone could load."""
    if not (was_taught(facts) and facts.origin.teacher.on_hub) or keeps_adapter(facts):
        return None
    teacher, student = facts.origin.teacher, facts.student
    for theirs, its in ((teacher.vocabulary, student.vocabulary), (teacher.mel_bins, student.mel_bins)):
        if None not in (theirs, its) and theirs != its:  # `generate` gives both the same tokens and the same features
            return None
    # given the output of an encoder like its own it needs none
    has_its_encoder = facts.arguments["freeze_encoder"] and facts.origin.teachers_encoder
    return "AutoModelForCausalLM" if has_its_encoder else "AutoModelForSpeechSeq2Seq"


def pipeline_options(facts: TrainingSummary) -> str:
    """What `pipeline` must be told of an adapter, as it takes the base's generation config and not the adapter's."""
    origin = facts.origin
    if not (keeps_adapter(facts) and facts.student.multilingual and origin.language):
        return ""
    return f', generate_kwargs={{"language": "{origin.language}", "task": "{origin.task}"}}'


# ---- metadata ----


def card_data(
    facts: TrainingSummary, results: Results | None, title: str, license: str | None = None
) -> ModelCardData:
    """The metadata, of which the Hub makes filters, the model's tree and its leaderboards."""
    origin = facts.origin
    on_hub = origin.base is not None and origin.base.on_hub
    distilled = ["knowledge-distillation"] if was_distilled(facts) else []
    measured = model_index(results) if results is not None else []
    licensed: dict[str, Any] = inherited_license(origin) if license is None else {"license": license}
    return ModelCardData(
        language=_metadata_languages(origin),
        **licensed,
        library_name="peft" if keeps_adapter(facts) else "transformers",
        pipeline_tag=TASK,
        base_model=origin.base.name if on_hub else None,
        # the Hub knows adapter, merge, quantized and finetune: of these a distilled student is a finetune
        base_model_relation=("adapter" if keeps_adapter(facts) else "finetune") if on_hub else None,
        datasets=list(dict.fromkeys(speech.dataset for speech in origin.speech if speech.on_hub)) or None,
        metrics=["wer", "cer"] if measured else None,
        # the leaderboard is of results on datasets of the Hub
        tags=["whisper", *distilled, "askd_hf", *(["hf-asr-leaderboard"] if measured else [])],
        model_name=title if measured else None,
        eval_results=measured or None,
    )


def _metadata_languages(origin: Provenance) -> str | list[str] | None:
    codes = [ISO_CODES.get(language, language) for language in origin.languages]
    return codes if len(codes) > 1 else next(iter(codes), None)


def inherited_license(origin: Provenance) -> dict[str, str]:
    """What the card of the model that training started from states: it was made of that one's weights."""
    stated = {} if origin.base is None else origin.base.license
    return {key: stated[key] for key in LICENSE_FIELDS if key in stated}


def model_index(results: Results) -> list[EvalResult]:
    """The student's WER and CER on each set with speech that it transcribed, of those that are on the Hub.

    The Hub takes a result's `dataset_type` for one of its datasets: a directory here is none.
    """
    found, taken = [], set()
    for entry in results.sets:
        scores = entry.scores.get(STUDENT)
        if not (entry.speech and entry.on_hub) or scores is None or entry.task != "transcribe":
            continue
        # huggingface_hub takes results of one type, configuration and split for the same set's
        dataset, config = entry.dataset, entry.config
        if (dataset, config, entry.split) in taken:
            config = entry.name
        taken.add((dataset, config, entry.split))
        normalizer = "no" if entry.normalizer == "none" else entry.normalizer
        for metric in ("wer", "cer"):
            value, interval = getattr(scores, metric), getattr(scores, f"{metric}_interval")
            if value is None:
                continue
            arguments = dict(normalizer=entry.normalizer, clips=entry.clips, hours=round(entry.hours, 2))
            if interval is not None:
                arguments["interval"] = [round(bound, 2) for bound in interval]
            method = "" if entry.method == "short" else f", {entry.method} long-form"
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


# ---- limits ----


def limits(facts: TrainingSummary, results: Results | None) -> list[str]:
    """What it can't do by its making, and where the evaluation saw it fail."""
    student, origin = facts.student, facts.origin
    found = []
    if facts.step == 0:
        found.append("It wasn't trained: its weights are as `askd_hf` found them.")
    elif facts.ended_early:
        metric = facts.arguments["metric_for_best_model"].removeprefix("eval_")
        name = METRIC_NAMES.get(metric, f"`{metric}`")
        found.append(
            f"Training ended early, at step {facts.step:,} of {facts.total_steps:,}, as the {name} got no better."
        )
    elif facts.step < facts.total_steps:
        found.append(
            f"This is a checkpoint of step {facts.step:,} of {facts.total_steps:,}: training wasn't finished."
        )
    if not student.timestamps:
        found.append(f"No timestamps, and no audio longer than {student.window:g} s at once.")
    elif not student.word_timestamps:
        found.append('No word timestamps (`return_timestamps="word"`): it has no alignment heads.')
    if student.multilingual and facts.step:
        trained = f"{quoted(origin.languages)} only" if origin.languages else "a language that its facts don't name"
        found.append(f"Trained on {trained}: the other languages of its vocabulary may have been unlearnt.")
    elif origin.language is not None and not student.multilingual:
        found.append(f"One language only: `{origin.language}`.")
    if results is None:
        return [*found, "Its error rates haven't been measured."]
    for entry in results.sets:
        if STUDENT in entry.scores:
            found += failures(entry, entry.scores[STUDENT], entry.scores.get(TEACHER))
    return found


def failures(entry: SetResult, student: Scores, teacher: Scores | None) -> list[str]:
    """What went wrong on one set."""

    def beside(value: str | None) -> str:
        return "" if value is None else f" (teacher: {value})"

    name = set_name(entry)
    if not entry.speech:
        theirs = beside(f"{teacher.clips_with_text}" if teacher else None)
        return [
            f"Text where nobody speaks: {student.clips_with_text} of {entry.clips} clips of {name} got some{theirs}."
        ]
    found = []
    if entry.silent_clips:
        theirs = beside(f"{teacher.silent_with_text}" if teacher else None)
        found.append(
            f"Text where nobody speaks: {student.silent_with_text} of {entry.silent_clips} such clips of {name} got "
            f"some{theirs}."
        )
    if student.insertion_rate:
        theirs = beside(f"{teacher.insertion_rate:.2f} %" if teacher else None)
        found.append(f"Words that nobody said on {name}: {student.insertion_rate:.2f} % of the reference's{theirs}.")
    if student.repeated_5grams:
        theirs = beside(f"{teacher.repeated_5grams:.2f} %" if teacher else None)
        found.append(
            f"Loops on {name}: {student.repeated_5grams:.2f} % of its word 5-grams stood there before{theirs}."
        )
    rates = student.wer_by_speaker.values()
    if len(rates) > 1:
        found.append(
            f"Speakers differ on {name}: WER from {min(rates):.1f} to {max(rates):.1f} % over {len(rates)} of them."
        )
    return found
