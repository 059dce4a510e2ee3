r"""Select a student's alignment heads, for word timestamps: the steps of `askd-hf select-heads`.

    python examples/select_heads.py --model runs/student --teacher openai/whisper-small.en --dataset my_speech

All options: --help.
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("select-heads")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.select_heads import load_clips, load_models, save
    from askd_hf.models.alignment_heads import select_alignment_heads

    student, teacher = load_models(args)

    # both read the same transcripts, and each word has two times
    selection = select_alignment_heads(*student, *teacher, load_clips(args))

    # to the student's generation_config.json
    save(args.model, selection)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
