"""Sentences on the clips that an evaluation doesn't score."""

from .results import LongClips, Results, SetResult, set_name

SPEAKERS = 3  # at most as many are named


def excluded_lines(results: list[SetResult], names: bool = False) -> list[str]:
    """Return one line per set with excluded clips, such as "test: excluded clips: 3 (no transcript)".

    Args:
        names: whether to name speakers. A model card doesn't.
    """
    lines = []
    for result in results:
        if result.excluded:
            reasons = ", ".join(f"{count:,} ({reason})" for reason, count in result.excluded.items())
            long = "" if result.long_clips is None else f". {_described(result.long_clips, names)}"
            lines.append(f"{set_name(result)}: excluded clips: {reasons}{long}")
    return lines


def _described(long: LongClips, names: bool) -> str:
    """Return such as "The long ones are 5 of 15 clips with 41 % of the text, among them all of 1 speaker"."""
    text = f"The long ones are {long.clips:,} of {long.of_clips:,} clips with {long.text_share:.0f} % of the text"
    if not long.speakers:
        return text
    who = f"speaker{'s' * (len(long.speakers) > 1)}"
    some = ", ".join(name[:12] for name in long.speakers[:SPEAKERS])  # Common Voice has ids of 128 digits
    more = f" and {len(long.speakers) - SPEAKERS:,} more" if long.speakers[SPEAKERS:] else ""
    return f"{text}, among them all of {f'{who} {some}{more}' if names else f'{len(long.speakers):,} {who}'}"


def advice_on_long_clips(results: Results) -> list[str]:
    """Return how to evaluate the clips that are longer than the window, in a line; empty if they are evaluated."""
    window = min((model.window for model in results.models.values() if model.window is not None), default=None)
    long_form = {(result.dataset, result.split) for result in results.sets if result.method != "short_form"}
    for result in results.sets:
        evaluated = (result.dataset, result.split) in long_form
        # the limit may also be that of --max_duration_in_seconds
        if not evaluated and result.long_clips is not None and result.long_clips.seconds == window:
            return ["--long_form sequential evaluates the long ones too"]
    return []
