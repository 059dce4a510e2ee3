"""Options of the models."""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .ranges import COUNT, NOT_NEGATIVE, Window, check_layers, check_ranges, check_vocabulary, parse_window
from .renamed import accepts_renamed

DECODER_LAYERS = "2"
MIN_COUNT = 3  # measured: examples/guides/fast-students.md


@accepts_renamed
@dataclass
class ModelArguments:
    """Options of the teacher and the student."""

    _argument_group_name = "models"

    teacher: str | None = HfArg(
        default=None,
        help="Whisper model to distill: a Hub id such as openai/whisper-large-v3, or a local directory.",
    )
    student: str | None = HfArg(
        default=None,
        help="Student to train: a Hub id or a local directory. Default: created from the teacher's layers.",
    )
    decoder_layers: str = HfArg(
        default=DECODER_LAYERS,
        help="Decoder layers of a student created from the teacher: a number (spread evenly, with first and "
        "last layer), or the indices of the teacher's layers, such as 0,1,31 (a single one with a comma: 31,).",
    )
    encoder_layers: str | None = HfArg(
        default=None,
        help="Encoder layers, as --decoder_layers. The encoder is then trained first, on audio alone (see "
        "--encoder_recovery_epochs), and frozen. With --student, layers of the student, as a second step after a run "
        "with more layers. Default: all layers, frozen.",
    )
    encoder_recovery_epochs: int | None = HfArg(
        default=None,
        help="Epochs over the training audio, before the distillation, in which the layers of the smaller encoder are "
        "trained to give the output of the whole one. Transcripts aren't used. The encoder is then frozen, unless "
        "--freeze_encoder False. Default: 10 with --encoder_layers; 0 with --freeze_encoder False, --hidden_weight or "
        "--streaming.",
    )
    encoder_recovery_dataset: list[str] = HfArg(
        default_factory=list,
        help="More audio for --encoder_recovery_epochs, without transcripts: directories or Hub ids. "
        "Recordings are decoded once per window: cut those of more than a few minutes first.",
    )
    layer_selection: Literal["spread", "greedy", "merged"] = HfArg(
        default="spread",
        help="Layers for a number. spread: evenly spread. merged: the same, with each dropped encoder layer averaged "
        "into the nearest kept one. greedy: repeatedly remove the layer whose removal "
        "increases the teacher's cross-entropy on 16 training clips least.",
    )
    window_seconds: str | None = HfArg(
        default=None,
        help="Audio window of a student created from the teacher, in whole seconds, such as 6: the encoder "
        "keeps its first positions. Clips must fit in it; see --long_clips. A range such as 3-10 makes a student "
        "with a window of 10 s and gives each training batch a random audio context, from the length of its "
        "longest clip (at least 3 s) to the window, for runtimes that take shorter inputs. Default: the teacher's.",
    )
    vocabulary: str | None = HfArg(
        default=None,
        help="Vocabulary of a student created from the teacher. auto: the tokens of the training transcripts, and "
        "general ones up to 6,000. A number: that many tokens. A text file: as auto, with the tokens of its lines. "
        "All bytes are kept, so that any text can be transcribed. Default: the teacher's vocabulary.",
    )
    vocabulary_min_count: int = HfArg(
        default=MIN_COUNT,
        help="With a number as --vocabulary, tokens that occur this often in the training transcripts are kept "
        "before general ones. Rarer words are written in pieces.",
    )
    teacher_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = HfArg(
        default="auto",
        help="Dtype of the teacher in memory. auto: bfloat16 with --bf16, float16 with --fp16, else float32. "
        "int8: 8-bit weights in the decoder layers, the others as auto; requires pip install 'askd-hf[int8]'.",
    )
    teacher_offload: bool = HfArg(
        default=False,
        help="Keep the teacher's layers in CPU memory and copy each to the GPU while it runs. It saves GPU "
        "memory and is much slower; with --teacher_cache_dir the teacher runs only once.",
    )
    attn_implementation: str = HfArg(
        default="sdpa",
        help="Attention implementation of teacher and student: sdpa, eager, flash_attention_2.",
    )

    def __post_init__(self):
        for name in ("decoder_layers", "encoder_layers"):
            check_layers(name, getattr(self, name))
        if self.layer_selection == "merged" and self.encoder_layers is None:
            raise UserError("--layer_selection merged requires --encoder_layers")
        check_ranges(self, encoder_recovery_epochs=NOT_NEGATIVE, vocabulary_min_count=COUNT)
        if self.window_seconds is not None:
            parse_window(self.window_seconds)
        if self.vocabulary is not None:
            check_vocabulary(self.vocabulary)
        if self.vocabulary_min_count != MIN_COUNT and not (self.vocabulary or "").isdecimal():
            raise UserError("--vocabulary_min_count requires a number of tokens as --vocabulary")

    @property
    def window(self) -> Window | None:
        """The parsed `window_seconds`, None for the teacher's window."""
        return None if self.window_seconds is None else parse_window(self.window_seconds)
