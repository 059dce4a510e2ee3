r"""Make a dataset of a CSV file and the audio files that it names, split by speaker.

    python examples/prepare.py --source transcripts.csv --audio_dir recordings --target my_speech \
        --audio_column recording --text_column what_was_said --speaker_column who
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("prepare")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.prepare import print_splits, read_clips, split_by_speaker, write_splits

    # the rows with askd-hf's names of the columns; every file is there
    clips = read_clips(args)

    # no speaker is in two splits
    splits = split_by_speaker(args, clips)

    write_splits(args, splits)
    print_splits(args, splits)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
