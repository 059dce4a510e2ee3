"""Turn on SpecAugment, which Whisper's config describes, for a run."""

from transformers import WhisperConfig

from ..errors import UserError


def enable_spec_augment(config: WhisperConfig, enabled: bool) -> None:
    """Set `apply_spec_augment`, in place, if `enabled`. Otherwise the config stays as it is.

    Raises `UserError` as `check_spec_augment`.
    """
    check_spec_augment(config, enabled)
    if enabled:
        config.apply_spec_augment = True


def check_spec_augment(config: WhisperConfig, enabled: bool) -> None:
    """Raise `UserError` if SpecAugment is enabled and the config masks nothing."""
    if enabled and not (config.mask_time_prob or config.mask_feature_prob):
        raise UserError(
            "--spec_augment True has no effect: mask_time_prob and mask_feature_prob are 0 in the student's "
            "config.json"
        )
