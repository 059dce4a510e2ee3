"""Options: the teacher, and where the student comes from."""

from dataclasses import dataclass, field
from typing import Literal

from .ranges import check_layers
from .renamed import accepts_renamed


@accepts_renamed
@dataclass
class ModelArguments:
    """The teacher, and where the student comes from."""

    _argument_group_name = "models"

    teacher: str | None = field(
        default=None,
        metadata={"help": "Whisper model to distil: a Hub id such as openai/whisper-large-v3 or a local directory."},
    )
    student: str | None = field(
        default=None,
        metadata={"help": "Student to train: a Hub id or a local directory. Default: made from the teacher's layers."},
    )
    decoder_layers: str = field(
        default="2",
        metadata={
            "help": "Decoder layers of a student made from the teacher: a number (spread evenly, the first and the "
            "last are kept), or the teacher's layers to copy, as in 0,1,31 (a single one with a comma: 31,)."
        },
    )
    encoder_layers: str | None = field(
        default=None,
        metadata={
            "help": "Likewise for the encoder, which is then trained, with a hidden-state loss against the teacher's "
            "(see --hidden_weight). Default: all of the teacher's layers, frozen."
        },
    )
    layer_selection: Literal["spread", "greedy"] = field(
        default="spread",
        metadata={
            "help": "Which layers a number means: spread evenly, or greedy: the layer whose loss raises the teacher's "
            "cross-entropy on 16 training clips least goes, one after another. Of large-v3's 32 to 4 that is 518 "
            "passes of the encoder over them; 32 to 2 of the decoder are 525 of the decoder."
        },
    )
    teacher_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = field(
        default="auto",
        metadata={
            "help": "Weights of the teacher in memory. auto: bfloat16 under --bf16, float16 under --fp16, or float32. "
            "int8: those of its decoder layers in 8 bits, all others as auto; it needs pip install 'askd-hf[int8]'."
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the teacher's layers in CPU memory and bring each to the GPU when it runs: little of its "
            "memory for much more time, which with --teacher_cache_dir is spent once."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention of teacher and student: sdpa, eager, flash_attention_2."}
    )

    def __post_init__(self):
        for name in ("decoder_layers", "encoder_layers"):
            check_layers(name, getattr(self, name))
