r"""Fine-tune a Whisper model, with or without a teacher, whole or with LoRA: the same as `askd-hf finetune`.

    python examples/finetune.py --student you/whisper-small-fr --language fr \
        --dataset my_speech --eval_splits validation

It is examples/distill.py with other defaults: --preset ps-kd and --learning_rate 1e-5. All options: --help.
"""

from askd_hf.arguments.parser import parse_args
from askd_hf.commands.finetune import OPTIONS, finetune
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    finetune(*parse_args(OPTIONS))


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
