"""An evaluation's results for the terminal."""

from .metrics import meaning_of
from .results import CONFIDENCE, Results, Scores, SetResult, Speculative, Speed

BROKEN_WORDS = (
    "basic takes out combining marks, such as vowel signs, and breaks words there: WER and CER are of what is left"
)
PLAIN = "in lower case without punctuation, whatever the normalizer"


def tables(results: Results) -> str:
    """All tables that the results have something for, each with its conditions in the line below."""
    speech = [result for result in results.sets if result.speech]
    silent = [result for result in results.sets if not result.speech or result.silent_clips]
    parts = [_models(results)]
    if speech:
        parts += [_error_rates(speech), *_paired(speech), _error_kinds(speech), *_by_speaker(speech)]
    if silent:
        parts.append(_non_speech(silent))
    if any(result.dropped for result in results.sets):
        parts.append(_dropped(results.sets))
    if results.speed is not None:
        parts.append(_speed(results.speed))
    if results.speculative is not None:
        parts.append(_speculative(results.speculative))
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items() if value is not None)
    return "\n\n".join([*parts, f"({settings})"])


def columns(rows: list[list[str]], left: int = 1) -> str:
    """Rows, the first of them the header, aligned: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _models(results: Results) -> str:
    rows = [["", "parameters", "MB on disk", "encoder + decoder layers", ""]]
    for role, facts in results.models.items():
        megabytes = "?" if facts.megabytes is None else f"{facts.megabytes:.1f} {facts.stored_dtype or ''}".rstrip()
        layers = f"{facts.encoder_layers} + {facts.decoder_layers}"
        rows.append([role, f"{facts.parameters:,}", megabytes, layers, facts.name])
    return columns(rows)


def _each(results: list[SetResult]) -> list[tuple[str, str, SetResult, Scores]]:
    """What a set and a model are called in a table, where a set is named once; and the scores."""
    return [
        (result.name if i == 0 else "", role, result, scores)
        for result in results
        for i, (role, scores) in enumerate(result.scores.items())
    ]


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"{value:.2f}"
    low, high = interval
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _error_rates(results: list[SetResult]) -> str:
    rows = [["", "", "WER %", "CER %", "normalizer", "clips", "words", "hours"]]
    for name, role, result, scores in _each(results):
        of_set = [result.normalizer_name, f"{result.clips:,}", f"{result.reference_words:,}", f"{result.hours:.2f}"]
        wer, cer = _with_interval(scores.wer, scores.wer_interval), _with_interval(scores.cer, scores.cer_interval)
        rows.append([name, role, wer, cer, *of_set])
    drawn = " or ".join(sorted({f"{result.blocks}s" for result in results}))
    meaning = meaning_of({result.normalizer for result in results})
    notes = f"({meaning})\n(in brackets {100 * CONFIDENCE:g} % intervals, by bootstrap over {drawn})"
    broken = [result.name for result in results if result.broken_words]
    if broken:
        notes += f"\n({', '.join(broken)}: {BROKEN_WORDS})"
    return f"{columns(rows, left=2)}\n{notes}"


def _paired(results: list[SetResult]) -> list[str]:
    rows = [["", "WER difference", f"{100 * CONFIDENCE:g} % interval", "probability of improvement"]]
    for result in results:
        if result.paired is not None:
            paired, (low, high) = result.paired, result.paired.interval
            title = f"{result.name}: {paired.first} - {paired.second}"
            chance = f"{paired.probability_of_improvement:.3f}"
            rows.append([title, f"{paired.difference:+.2f}", f"{low:+.2f} to {high:+.2f}", chance])
    return [f"{columns(rows)}\n(points, on the same clips; below 0 the first is better)"] if len(rows) > 1 else []


def _error_kinds(results: list[SetResult]) -> str:
    header = ["substitutions", "deletions", "insertions", "insertions %", "repeated 5-grams %", "clips at token limit"]
    rows = [["", "", *header]]
    for name, role, _, scores in _each(results):
        counts = [f"{n:,}" for n in (scores.substitutions, scores.deletions, scores.insertions)]
        rates = [f"{scores.insertion_rate:.2f}", f"{scores.repeated_5grams:.2f}"]
        rows.append([name, role, *counts, *rates, _known(scores.clips_at_limit)])
    return f"{columns(rows, left=2)}\n(repeated 5-grams {PLAIN}; the rest as normalized for the WER)"


def _known(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _by_speaker(results: list[SetResult]) -> list[str]:
    """The spread over the speakers; each one's WER is in results.json."""
    rows = [["WER % by speaker", "", "speakers", "lowest", "median", "highest (who)"]]
    for name, role, _, scores in _each(results):
        if len(scores.wer_by_speaker) > 1:
            ranked = sorted(scores.wer_by_speaker.items(), key=lambda item: item[1])
            middle = (ranked[(len(ranked) - 1) // 2][1] + ranked[len(ranked) // 2][1]) / 2
            worst = f"{ranked[-1][1]:.2f} ({ranked[-1][0][:12]})"  # Common Voice names speakers with 128 digits
            rows.append([name, role, str(len(ranked)), f"{ranked[0][1]:.2f}", f"{middle:.2f}", worst])
    return [columns(rows, left=2)] if len(rows) > 1 else []


def _non_speech(results: list[SetResult]) -> str:
    """Sets without speech, and in sets with speech the clips that have no transcript."""
    rows = [["without speech", "", "method", "clips", "with any text", "%", "repeated 5-grams %", "at token limit"]]
    for name, role, result, scores in _each(results):
        clips, with_text = result.clips, scores.clips_with_text
        of_all = [f"{scores.repeated_5grams:.2f}", _known(scores.clips_at_limit)]
        if result.speech:  # these are of the other clips
            clips, with_text, of_all = result.silent_clips, scores.silent_with_text, ["", ""]
        share = f"{100 * with_text / clips:.1f}"
        rows.append([name, role, result.method, f"{clips:,}", f"{with_text:,}", share, *of_all])
    return f"{columns(rows, left=2)}\n(clips with an empty reference; text {PLAIN})"


def _dropped(results: list[SetResult]) -> str:
    lines = [
        f"{result.name}: {count:,} clips not scored: {reason}"
        for result in results
        for reason, count in result.dropped.items()
    ]
    return "\n".join(lines)


def _speed(speed: Speed) -> str:
    rows = [["", "batch", "encoder s", "decoder s", "total s", "latency s", "RTFx", "peak MB", "times faster"]]
    for row in speed.rows:
        seconds = [
            f"{t.median:.2f} ({t.lowest:.2f} to {t.highest:.2f})" for t in (row.encoder, row.decoder, row.total)
        ]
        memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}"
        faster = "" if row.times_faster is None else f"{row.times_faster:.2f}"
        rows.append([row.role, str(row.batch_size), *seconds, f"{row.latency:.3f}", f"{row.rtfx:.1f}", memory, faster])
    return (
        f"{columns(rows)}\n(greedy; median, lowest and highest of {speed.repetitions} interleaved repetitions; "
        f"{speed.clips} clips of {speed.set}, {speed.audio_seconds:.0f} s of audio; {speed.device}, {speed.dtype}, "
        f"{speed.threads} threads, {speed.attention}; without audio decoding and features)"
    )


def _speculative(result: Speculative) -> str:
    rows = [["speculative decoding", "same tokens", "accepted", "teacher s", "assisted s", "times faster"]]
    same = f"{result.identical} of {result.clips} clips"
    seconds = [f"{result.teacher.median:.2f}", f"{result.assisted.median:.2f}"]
    rows.append([result.set, same, f"{100 * result.acceptance_rate:.1f} %", *seconds, f"{result.times_faster:.2f}"])
    return f"{columns(rows)}\n(the student proposes, the teacher decides; greedy, one clip at a time)"
