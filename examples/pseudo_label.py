r"""Transcribe speech with a teacher and keep the good transcripts: the steps of `askd-hf pseudo-label`.

    python examples/pseudo_label.py --teacher openai/whisper-large-v3 --language fr --dataset my_audio

To resume an interrupted run, repeat the command. All options: --help.
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("pseudo-label")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.pseudo_label import load_speech, load_teacher, save_dataset, transcribe_and_filter

    teacher, processor = load_teacher(args)

    # the clips of --dataset, every one checked before anything is transcribed
    clips = load_speech(args, processor)

    # transcripts of an earlier run are used again, so that other limits take seconds
    transcripts, kept = transcribe_and_filter(args, teacher, processor, clips)

    # the dataset to train students on, with --concatenate joined to clips of 30 s, with --hub_dataset_id on the Hub
    save_dataset(args, teacher, processor, clips, transcripts, kept)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
