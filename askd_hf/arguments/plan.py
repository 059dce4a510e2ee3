"""Options of `askd-hf plan`."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import COUNT, POSITIVE, check_ranges


@dataclass
class PlanArguments:
    """The teacher and the target."""

    _argument_group_name = "plan"

    teacher: str = HfArg(help="Whisper model to distill: a Hub id or a local directory. Its weights aren't read.")
    speedup: float | None = HfArg(default=None, help="How many times as fast as the teacher the student must be.")
    max_parameters: float | None = HfArg(default=None, help="Maximum number of parameters, in millions.")
    dataset: str | None = HfArg(
        default=None,
        help="Speech of the domain, as `askd-hf distill` takes it. Default: none; choose the window by yours.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of --dataset on the Hub.")
    split: str = HfArg(default="train", help="Split of --dataset.")
    language: str | None = HfArg(
        default=None,
        help="Language of --dataset, such as english or fr. Default: its column `language`, else English.",
    )
    max_samples: int | None = HfArg(default=None, help="Look only at the first max_samples clips. Default: all.")
    batch_size: int = HfArg(default=1, help="Clips per batch to measure at.")
    threads: int | None = HfArg(default=None, help="CPU threads to measure with. Default: PyTorch's.")

    def __post_init__(self):
        if self.speedup is None and self.max_parameters is None:
            raise UserError("--speedup or --max_parameters is required: the target")
        check_ranges(self, speedup=POSITIVE, max_parameters=POSITIVE, batch_size=COUNT, threads=COUNT)
        check_ranges(self, "leave it out for all clips", max_samples=COUNT)
