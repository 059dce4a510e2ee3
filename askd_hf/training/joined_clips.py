"""`--concatenate_probability`: clips that are joined, of a dataset and of a stream."""

from datasets import Dataset

from ..arguments import MixArguments
from ..data import SpeechCollator
from ..data.checks import Limits
from ..data.concatenation import with_concatenated
from ..data.packing import Packing
from ..data.soft_labels import has_soft_labels
from ..errors import UserError
from ..evaluation.suites import with_speakers


def packing_of(mix_args: MixArguments, limits: Limits, collator: SpeechCollator) -> Packing | None:
    """Return how clips of a stream are joined; None without `--concatenate_probability`."""
    if not mix_args.concatenate_probability:
        return None
    return Packing(mix_args.concatenate_probability, limits, lambda row: len(collator.label_ids(row)))


def concatenated(speech: Dataset, mix_args: MixArguments, limits: Limits, seed: int) -> Dataset:
    """Return a training set with the clips that `--concatenate_probability` joins."""
    if has_soft_labels(speech):
        raise UserError(
            "--concatenate_probability is not supported with a dataset of cached soft labels, which are of single "
            "clips: give the speech itself as --dataset, and --teacher_cache_dir"
        )
    longest = int(min(limits.max_target_positions, limits.max_label_length))
    return with_concatenated(
        with_speakers(speech), mix_args.concatenate_probability, limits.chunk_length, longest, seed
    )
