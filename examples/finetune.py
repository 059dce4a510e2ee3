r"""Fine-tune a Whisper model, with or without a teacher, whole or with LoRA: the same as `askd-hf finetune`.

    python examples/finetune.py --student you/whisper-small-fr --language fr \
        --dataset my_speech --eval_splits validation

It is examples/distill.py with other defaults: --preset ps-kd and --learning_rate 1e-5. All options: --help.
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    options = parse("finetune")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.finetune import finetune

    finetune(*options)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
