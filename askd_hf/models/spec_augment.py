"""Turn on SpecAugment, which Whisper's config describes, for a run."""

from transformers import WhisperConfig

from ..errors import UserError


def enable_spec_augment(config: WhisperConfig, enabled: bool) -> None:
    """Set `apply_spec_augment`, in place, if `enabled`. Otherwise the config stays as it is.

    Raises `UserError` if the config masks nothing.
    """
    if not enabled:
        return
    if not (config.mask_time_prob or config.mask_feature_prob):
        raise UserError(
            "--spec_augment True has no effect: mask_time_prob and mask_feature_prob are 0 in the student's "
            "config.json"
        )
    config.apply_spec_augment = True
