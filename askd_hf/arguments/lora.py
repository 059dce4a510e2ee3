"""Options of LoRA."""

from dataclasses import MISSING, dataclass, fields

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import COUNT, POSITIVE, Range, check_ranges
from .renamed import accepts_renamed


@accepts_renamed
@dataclass
class LoraArguments:
    """Options of LoRA."""

    _argument_group_name = "LoRA"

    lora_r: int | None = HfArg(
        default=None, help="Train an adapter of this rank and merge it at the end. Default: train all weights."
    )
    lora_alpha: float | None = HfArg(
        default=None, help="The scale of the adapter is lora_alpha / lora_r. Default: 2 * lora_r."
    )
    lora_dropout: float = HfArg(default=0.0, help="Dropout on the adapter's input.")
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        help="Linear modules to adapt, in the decoder layers and in the encoder layers if these are trained.",
    )
    use_dora: bool = HfArg(
        default=False, help="Use DoRA, which trains the magnitude of the weights separately from their direction."
    )
    keep_adapter: bool = HfArg(
        default=False,
        help="Save the adapter alone, without merging it: a few MB that peft loads on top of --student. With "
        "--push_to_hub it requires a --student on the Hub.",
    )

    def __post_init__(self):
        check_ranges(self, lora_r=COUNT, lora_alpha=POSITIVE, lora_dropout=Range(low=0, below=1))
        if self.lora_r is None:
            for option in fields(self):
                default = option.default if option.default_factory is MISSING else option.default_factory()
                if getattr(self, option.name) != default:
                    raise UserError(f"--{option.name} requires --lora_r")
