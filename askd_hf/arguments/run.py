"""Options of a run of `askd-hf distill` and `askd-hf finetune` as a whole."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg


@dataclass
class RunArguments:
    """Options of the run as a whole."""

    _argument_group_name = "run"

    select_alignment_heads: bool = HfArg(
        default=True,
        help="After training, select the student's heads for word timestamps: those whose word times on 32 training "
        "clips are nearest to the teacher's. Nothing is done without a --teacher with alignment heads, as OpenAI's "
        "models have. askd-hf select-heads does it later.",
    )
    dry_run: bool = HfArg(
        default=False,
        help="Do everything up to training: check options, models, data and access to the Hub, build the student, and "
        "measure three steps of each phase. Print the plan of the run: the student's size and expected speedup, "
        "schedule, time, memory, disk for caches and checkpoints, what is pushed. Transcribing "
        "--unlabeled_dataset, greedy layer selection, the recovery of the encoder and the caches are only measured on "
        "a few clips. Nothing is saved or pushed. Downloads from the Hub, datasets that have to be converted, and "
        "what was found in the clips (see --recheck) stay in their caches.",
    )
