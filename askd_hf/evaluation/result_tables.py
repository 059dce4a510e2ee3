"""Tables of evaluation results, as plain text for the terminal and as Markdown for the model card.

The HTML report has the same headings.
"""

import statistics
from dataclasses import dataclass, field

from .excluded_clips import advice_on_long_clips, excluded_lines
from .metrics import describe_normalizers
from .results import CONFIDENCE, EvaluatedModel, Results, Scores, SetResult, Speculative, Speed, Timing, set_name

HEADINGS = {
    "acceptance_rate": "accepted tokens",
    "capped_wer": "WER, capped per clip, %",
    "cer": "CER, %",
    "clips": "clips",
    "clips_at_limit": "clips at token limit",
    "decoder": "decoder, s",
    "deletions": "deletions",
    "encoder": "encoder, s",
    "hours": "hours",
    "identical": "clips with identical tokens",
    "insertion_rate": "insertion rate, %",
    "insertions": "insertions",
    "latency": "latency, s per batch",
    "loops": "loops",
    "layers": "encoder / decoder layers",
    "model": "model",
    "no_speech_hallucinations": "no-speech clips with text",
    "normalizer": "normalizer",
    "parameters": "parameters",
    "peak_memory_mb": "peak memory, MB",
    "probability_of_improvement": "probability of improvement",
    "relative_difference": "relative WER change",
    "repeated_5grams": "repeated 5-grams, %",
    "rtfx": "RTFx",
    "set": "set",
    "size_mb": "MB on disk",
    "speedup": "speedup",
    "substitutions": "substitutions",
    "total": "total, s",
    "verdict": "verdict",
    "wer": "WER, %",
    "wer_difference": "WER difference, points",
    "within_100ms": "within 0.1 s, %",
    "within_200ms": "within 0.2 s, %",
    "word_time_error": "mean difference, s",
    "words": "words",
}
COMBINING_MARKS_NOTE = (
    "basic removes combining marks, such as vowel signs, which splits words: the error rates are of what is left"
)
CAPPED_NOTE = (
    "Capped: a clip has at most as many errors as words. Loop: a text with more than 2 x the reference's words + 10"
)
WORD_TIMES_NOTE = "Starts and ends of the words in both the model's and the teacher's transcript"
PLAIN_TEXT_NOTE = "in lower-case text without punctuation, for every normalizer"
PARTS_NOTE = "Median of 3 interleaved repetitions. Without beam search, fallback and text decoding"
RTFX_NOTE = "RTFx: seconds of audio transcribed per second"
TOKEN_RATIO = 1.3  # of the tokens of two models; above it they are named beside the speedup


@dataclass
class Table:
    """A table of text cells."""

    title: str
    header: list[str]
    rows: list[list[str]]
    # number of leading columns that are aligned to the left; the others are aligned to the right
    text_columns: int = 1
    notes: list[str] = field(default_factory=list)  # sentences for below the table

    def text(self) -> str:
        """Return the title, the table with aligned columns, and the notes, one per line."""
        rows = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < self.text_columns else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([f"{self.title}:", *lines, *(f"{note}." for note in self.notes)])

    def markdown(self) -> str:
        """Return the table in Markdown, without title and notes."""
        rules = ["---" if i < self.text_columns else "---:" for i in range(len(self.header))]
        lines = [self.header, rules, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_results(results: Results) -> str:
    """Return all tables for which there are results, for the terminal."""
    speech = [result for result in results.sets if result.has_speech]
    tables = [model_table(results, names=True)]
    excluded = [*excluded_lines(results.sets, names=True), *advice_on_long_clips(results)]
    if speech:
        tables += [
            error_rate_table(speech),
            comparison_table(speech),
            error_type_table(speech),
            _speaker_table(speech),
        ]
    if results.sets:
        tables.append(hallucination_table(results.sets))
    tables += [word_time_table(results.sets), *_speed_tables(results)]
    models, *parts = [table.text() for table in tables if table.rows]
    parts = [models, "\n".join(excluded), *parts] if excluded else [models, *parts]
    settings = ", ".join(
        f"{name} {value}" for name, value in results.settings.items() if value is not None and name != "command"
    )
    return "\n\n".join([*parts, f"Settings: {settings}"])


def format_speed(results: Results) -> str:
    """Return the tables of speed, of models and of speculative decoding, for the terminal."""
    return "\n\n".join(table.text() for table in _speed_tables(results) if table.rows)


def _speed_tables(results: Results) -> list[Table]:
    tables = []
    if results.speed is not None:
        tables += [speed_table(results.speed, ranges=True), part_table(results.speed)]
    if results.speculative is not None:
        tables.append(speculative_table(results.speculative))
    return tables


# ---- cells ----


def with_interval(value: float | None, interval: tuple[float, float] | None, signed: bool = False) -> str:
    """Return a value with its confidence interval: "6.85 [3.75, 10.27]"; empty for None."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    if interval is None:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


def size_on_disk(model: EvaluatedModel) -> str:
    """Return the size of the stored weights in MB with their dtype; "" if they aren't stored locally."""
    return "" if model.size_mb is None else f"{model.size_mb:,.1f} {model.stored_dtype or ''}".rstrip()


def no_speech_share(result: SetResult, scores: Scores) -> str:
    """Return the no-speech clips with text as "34 of 80 (42.5 %)"; "" for a set without such clips."""
    if not result.no_speech_clips:
        return ""
    share = scores.no_speech_hallucinations / result.no_speech_clips
    return f"{scores.no_speech_hallucinations:,} of {result.no_speech_clips:,} ({100 * share:.1f} %)"


def speedup(value: float | None) -> str:
    """Return a speedup as "1.52x"; "" for None."""
    return "" if value is None else f"{value:.2f}x"


def verdict(interval: tuple[float, float], words: int) -> str:
    """Return in words what the interval of a difference says; "undecided on 398 words" if it includes 0."""
    low, high = interval
    if high < 0.0:
        return "fewer errors"
    return "more errors" if low > 0.0 else f"undecided on {words:,} words"


def _optional(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _headings(*names: str) -> list[str]:
    return [HEADINGS[name] for name in names]


# ---- tables ----


def model_table(results: Results, names: bool = False) -> Table:
    """Return the sizes of the models; with `names` also where they were loaded from, which may be a local path."""
    rows = [
        [role, f"{model.encoder_layers} / {model.decoder_layers}", f"{model.parameters:,}", size_on_disk(model)]
        for role, model in results.models.items()
    ]
    header = _headings("model", "layers", "parameters", "size_mb")
    if names:
        header.append("loaded from")
        rows = [[*row, model.name] for row, model in zip(rows, results.models.values(), strict=True)]
    return Table("Models", header, rows)


def _pairs(results: list[SetResult]) -> list[tuple[SetResult, str, Scores]]:
    return [(result, role, scores) for result in results for role, scores in result.scores.items()]


def error_rate_table(results: list[SetResult]) -> Table:
    """Return WER and CER of all models on sets with speech."""
    rows = [
        [
            set_name(result),
            role,
            with_interval(scores.wer, scores.wer_confidence_interval),
            with_interval(scores.cer, scores.cer_confidence_interval),
            f"{result.clips:,}",
            f"{result.hours:.2f}",
            f"{result.reference_words:,}",
            result.normalizer_name,
        ]
        for result, role, scores in _pairs(results)
    ]
    header = _headings("set", "model", "wer", "cer", "clips", "hours", "words", "normalizer")
    notes = [interval_note(results), f"Normalizers: {describe_normalizers({result.normalizer for result in results})}"]
    if marks := [result.name for result in results if result.has_combining_marks]:
        notes.append(f"{', '.join(marks)}: {COMBINING_MARKS_NOTE}")
    return Table("Error rates", header, rows, 2, notes)


def interval_note(results: list[SetResult]) -> str:
    """Return what the intervals are."""
    units = " or ".join(sorted({f"{result.bootstrap_unit}s" for result in results}))
    return f"[a, b]: {100 * CONFIDENCE:g} % bootstrap confidence interval, resampled over {units}"


def comparison_table(results: list[SetResult]) -> Table:
    """Return the paired comparisons of the first with the last model."""
    rows = []
    for result in results:
        if (paired := result.comparison) is not None:
            rows.append(
                [
                    set_name(result),
                    f"{paired.system} - {paired.baseline}",
                    with_interval(paired.wer_difference, paired.confidence_interval, signed=True),
                    relative_difference(result),
                    f"{100 * paired.probability_of_improvement:.1f} %",
                    verdict(paired.confidence_interval, result.reference_words),
                ]
            )
    names = ("wer_difference", "relative_difference", "probability_of_improvement", "verdict")
    notes = ["Paired bootstrap on the same clips. Negative: the first model is better"]
    return Table("Comparison", [HEADINGS["set"], "models", *_headings(*names)], rows, 2, notes)


def relative_difference(result: SetResult) -> str:
    """Return the WER difference relative to the baseline, such as "+18.5 %"; "" if the baseline has no errors."""
    baseline = result.scores[result.comparison.baseline].wer
    return f"{100 * result.comparison.wer_difference / baseline:+.1f} %" if baseline else ""


def error_type_table(results: list[SetResult]) -> Table:
    """Return the word errors of all models on sets with speech, by type."""
    rows = [
        [set_name(result), role, *(f"{n:,}" for n in (scores.substitutions, scores.deletions, scores.insertions))]
        for result, role, scores in _pairs(results)
    ]
    header = _headings("set", "model", "substitutions", "deletions", "insertions")
    return Table("Error types", header, rows, 2, ["Number of words"])


def _speaker_table(results: list[SetResult]) -> Table:
    """Return the spread of the WER over the speakers; the WER of each is in results.json."""
    rows = []
    for result, role, scores in _pairs(results):
        if len(scores.wer_by_speaker) > 1:
            ranked = sorted(scores.wer_by_speaker.items(), key=lambda item: item[1])
            median = statistics.median(scores.wer_by_speaker.values())
            name, highest = ranked[-1]  # Common Voice has speaker ids of 128 digits
            spread = [f"{ranked[0][1]:.2f}", f"{median:.2f}", f"{highest:.2f} ({name[:12]})"]
            rows.append([set_name(result), role, str(len(ranked)), *spread])
    header = [*_headings("set", "model"), "speakers", "lowest WER, %", "median WER, %", "highest WER, % (speaker)"]
    return Table("Speakers", header, rows, 2)


def hallucination_table(results: list[SetResult]) -> Table:
    """Return the hallucination indicators of all models on all sets."""
    rows = [
        [
            set_name(result),
            role,
            _optional(scores.insertion_rate, ".2f"),
            _optional(scores.capped_wer, ".2f"),
            _optional(scores.loops, ","),
            f"{scores.repeated_5grams:.2f}",
            _optional(scores.clips_at_limit, ","),
            no_speech_share(result, scores),
        ]
        for result, role, scores in _pairs(results)
    ]
    names = ("insertion_rate", "capped_wer", "loops", "repeated_5grams", "clips_at_limit", "no_speech_hallucinations")
    notes = [CAPPED_NOTE, f"Repeated 5-grams and no-speech clips with text are counted {PLAIN_TEXT_NOTE}"]
    return Table("Hallucination indicators", _headings("set", "model", *names), rows, 2, notes)


def word_time_table(results: list[SetResult]) -> Table:
    """Return how near the word timestamps of all models are to those of the last one, for sets that have them."""
    rows = [
        [set_name(result), role, f"{times.words:,}", f"{times.error:.3f}"]
        + [f"{share:.1f}" for share in (times.within_100ms, times.within_200ms)]
        for result, role, scores in _pairs(results)
        if (times := scores.word_times) is not None
    ]
    header = _headings("set", "model", "words", "word_time_error", "within_100ms", "within_200ms")
    return Table("Word timestamps", header, rows, 2, [WORD_TIMES_NOTE])


def speed_table(speed: Speed, ranges: bool = False) -> Table:
    """Return the speed of all models; with `ranges` also the range of each time over the repetitions."""

    def seconds(timing: Timing) -> str:
        return with_interval(timing.median, (timing.lowest, timing.highest) if ranges else None)

    rows = [
        [
            row.role,
            str(row.batch_size),
            speedup(row.speedup),
            f"{row.rtfx:.1f}",
            f"{row.latency:.3f}",
            *map(seconds, (row.total, row.encoder, row.decoder)),
            _optional(row.peak_memory_mb, ",.0f"),
        ]
        for row in speed.rows
    ]
    times = _headings("speedup", "rtfx", "latency", "total", "encoder", "decoder", "peak_memory_mb")
    notes = [f"Median{' [minimum, maximum]' if ranges else ''} of {speed_conditions(speed)}", RTFX_NOTE]
    notes += token_notes(speed)
    return Table("Speed", [HEADINGS["model"], "batch size", *times], rows, 1, notes)


def speed_conditions(speed: Speed) -> str:
    """Return how the speed was measured."""
    clips = "1 clip" if speed.clips == 1 else f"{speed.clips} clips"
    threads = "1 thread" if speed.threads == 1 else f"{speed.threads} threads"
    machine = f"{speed.device}, {speed.dtype}, {threads}, {speed.attention} attention"
    return (
        f"{speed.repetitions} interleaved repetitions with greedy decoding; {clips} of {speed.set}, "
        f"{speed.audio_seconds:.0f} s of audio; {machine}. Audio decoding and feature extraction are not included"
    )


def token_notes(speed: Speed) -> list[str]:
    """Return a sentence, without its full stop, on each model that wrote many more or fewer tokens than the last one.

    The counts are those of the first batch size.
    """
    rows = [row for row in speed.rows if row.batch_size == speed.rows[0].batch_size]
    notes = []
    for row in rows[:-1]:
        fewer, more = sorted([row.tokens, rows[-1].tokens])
        if more > TOKEN_RATIO * fewer:
            own, other = (f"{each.tokens / speed.clips:.3g}" for each in (row, rows[-1]))
            notes.append(
                f"The {row.role} wrote {own} tokens per clip, the {rows[-1].role} {other}, and each token takes time"
            )
    return notes


def part_table(speed: Speed) -> Table:
    """Return the latency of the parts of all models."""
    rows = [
        [row.role, *map(str, (row.batch_size, row.threads, row.tokens))]
        + [f"{1000 * part:.1f}" for part in (row.features, row.encoder, row.decoder, row.projection, row.total)]
        for row in speed.parts
    ]
    header = [HEADINGS["model"], "batch size", "threads", "tokens per clip", "features", "encoder", "decoder layers"]
    notes = [PARTS_NOTE]
    return Table("Latency by part, ms per batch", [*header, "output projection", "sum"], rows, 1, notes)


def speculative_table(result: Speculative) -> Table:
    """Return the speculative decoding by number of proposed tokens."""
    header = ["tokens per proposal", *_headings("speedup", "acceptance_rate", "identical"), "s per clip"]
    rows = [["teacher alone", "", "", "", f"{result.teacher.median / result.clips:.3f}"]]
    for length in result.draft_lengths:
        faster = with_interval(length.speedup, length.speedup_range)
        identical, seconds = f"{length.identical} of {result.clips}", f"{length.assisted.median / result.clips:.3f}"
        accepted = f"{100 * length.acceptance_rate:.1f} %"
        number = "as configured" if length.num_assistant_tokens is None else str(length.num_assistant_tokens)
        rows.append([number, faster, accepted, identical, seconds])
    notes = [
        f"{result.clips} clips of {result.set}, greedy, batch size 1, interleaved; median [lowest, highest]",
        speculative_verdict(result),
    ]
    if result.differing:
        notes.append(f"Tokens differ from the teacher's for {', '.join(result.differing)}")
    return Table("Speculative decoding", header, rows, 1, notes)


def speculative_verdict(result: Speculative) -> str:
    """Return whether the student as assistant makes its teacher faster, in a sentence without its full stop."""
    best = result.best
    number = "" if best.num_assistant_tokens is None else f" (num_assistant_tokens {best.num_assistant_tokens})"
    said = f"Speculative decoding is {speedup(best.speedup)} as fast as the teacher alone{number}"
    if not result.is_faster:
        return f"{said}: don't use it"
    if best.speedup_range is not None and not result.is_clearly_faster:
        return f"{said}, and not faster in every repetition: no clear gain"
    return said
