r"""Train a Whisper of your own further: on labels and its own average, with a teacher or without, whole or with LoRA.

    python examples/finetune.py --student you/whisper-small-fr --language fr \
        --dataset my_speech --eval_splits validation

fine-tunes it on the labels and, as a regulariser, on the student's own average: self-distillation, without a teacher.
A teacher adds its distribution at first; it may have another vocabulary or other mel bins, as large-v3 has:

    python examples/finetune.py --student you/whisper-small-fr --language fr \
        --dataset my_speech --eval_splits validation --teacher openai/whisper-large-v3 --preset askd

--lora_r 32 --learning_rate 1e-3 trains an adapter only, a few hundredths of the weights, and merges it at the end.
With --keep_adapter it stays an adapter, some MB that pipeline(...) loads on top of --student.

It is examples/distill.py with other defaults, and has all its options: --help.
"""

from dataclasses import dataclass, field

from distill import OPTIONS, distill

from askd_hf import ASKDConfig, UserError
from askd_hf.arguments.parser import parse_args
from askd_hf.errors import exit_on_user_error


@dataclass
class FinetuningConfig(ASKDConfig):
    """`ASKDConfig` with the defaults for a student that knows its language already."""

    preset: str = field(
        default="ps-kd",
        metadata={"help": "As of examples/distill.py: ps-kd (self only), askd (teacher, then self), ce..."},
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate; of an adapter, 1e-3."})


def main() -> None:
    arguments = parse_args((*OPTIONS, FinetuningConfig))
    model_args, config = arguments[0], arguments[-1]
    if not model_args.student:
        raise UserError("--student is missing: the Whisper model to train further")
    if model_args.teacher and not (config.uses_teacher or arguments[1].unlabeled_dataset):
        raise UserError(f"--teacher has no use: --preset {config.preset} has no teacher phase; choose --preset askd")
    distill(*arguments)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
