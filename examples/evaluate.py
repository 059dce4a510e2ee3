r"""Evaluate a Whisper model and its teacher: the steps of `askd-hf evaluate`.

    python examples/evaluate.py --model runs/my-student --teacher openai/whisper-large-v3 --suite open-asr

To resume an interrupted run, repeat the command. All options: --help.
"""

from pathlib import Path

from askd_hf.arguments.writable import check_writable
from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("evaluate")

    # imported after the options, as --help needs none of it
    from accelerate import PartialState

    from askd_hf.commands.evaluate import load_models, load_speech, report, score, time_models, write_manifests
    from askd_hf.commands.next_steps import print_publishing
    from askd_hf.evaluation import format_speed

    check_writable(Path(args.output_dir), "--output_dir")

    # --score_only: the manifests of an earlier run, scored again
    if args.score_only:
        report(args, score(args))
        return

    # student and teacher, and the speech, every clip checked before anything is transcribed
    models = load_models(args)
    speech = load_speech(args, models)

    # the transcript of every clip, in all processes; those of an earlier run are used again
    write_manifests(args, models, speech)
    if not PartialState().is_main_process:
        return

    # WER and CER with intervals, insertions and repetitions, from the manifests alone
    results = score(args)
    report(args, results, speech)

    # --speed and --speculative
    if speech.timed:
        report(args, time_models(args, models, speech, results), speech, format_speed)

    # the command that publishes the model with these results
    print_publishing(args.model, Path(args.output_dir) / "results.json")


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
