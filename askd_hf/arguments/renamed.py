"""Old and foreign names of options and keywords.

Old names still work, with a warning. Options of other training scripts that don't exist here are an error, whose
message names the replacement. The scripts are those of transformers 4 (`Seq2SeqTrainingArguments`,
`run_speech_recognition_seq2seq.py`), which the Whisper fine-tuning blog uses, and distil-whisper's
`run_distillation.py`, `run_pseudo_labelling.py`, `run_eval.py` and `create_student_model.py`.
"""

import difflib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

# old name of an option -> current name
OPTIONS = {
    "audio_column": "audio_column_name",
    "augment": "augmentations",
    "cache_encoder": "encoder_cache_dir",
    "cache_teacher": "teacher_cache_dir",
    "dataset_weights": "dataset_probabilities",
    "divergence_mix": "divergence_beta",
    "eval_blend": "eval_teacher_losses",
    "join_clips": "concatenate_seconds",
    "layer_choice": "layer_selection",
    "lora_rank": "lora_r",
    "max_compression_ratio": "compression_ratio_threshold",
    "max_label_tokens": "max_label_length",
    "max_repetition": "repeated_5gram_threshold",
    "max_seconds": "max_duration_in_seconds",
    "max_wer": "wer_threshold",
    "min_label_tokens": "min_label_length",
    "min_log_prob": "logprob_threshold",
    "min_seconds": "min_duration_in_seconds",
    "negatives": "no_speech_dataset",
    "negatives_share": "no_speech_probability",
    "noise_folder": "noise_dir",
    "pack": "concatenate",
    "pack_seconds": "concatenate_seconds",
    "prompt_probability": "condition_on_prev_probability",
    "model": "model_dir",
    "repo": "repo_id",
    "push_labels_to": "hub_dataset_id",
    "push_to_hub": "hub_dataset_id",  # where it names a dataset: askd-hf pseudo-label
    "resamples": "n_resamples",
    "self_refresh": "snapshot_strategy",
    "shuffle_buffer": "shuffle_buffer_size",
    "teacher_phase": "teacher_phase_ratio",
    "text": "label_source",
    "text_column": "text_column_name",
    "trust_label": "weight_teacher_by_label_prob",
    "unlabelled": "unlabeled_dataset",
    # names of other training scripts
    "dataset_config_name": "dataset_config",
    "dataset_name": "dataset",
    "model_name_or_path": "student",
    "student_model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
}
# current name of an option -> old value -> current value
VALUES = {
    "layer_selection": {"probe": "greedy"},
    "metric_for_best_model": {"ce_loss": "loss", "eval_ce_loss": "eval_loss"},
    "snapshot_strategy": {"never": "no"},
}

# Names of options of other training scripts, and their replacements here: the first whose option the script has is
# shown. Advice without an option is for all scripts.
LEAVE_OUT = "leave it out"
SPLITS = ("--train_split SPLIT", "--split SPLIT", "--eval_splits SPLIT")
PROCESSOR = "leave it out: the processor is read from the model's directory"
DOWNLOAD = "download the model, `hf download MODEL`, and give"
WANDB = "set the environment variables of wandb"
FORMER = {
    name: replacements
    for names, *replacements in [
        # without a replacement, in all scripts
        ("use_mps_device half_precision_backend fp16_opt_level fp16_backend include_tokens_per_second", LEAVE_OUT),
        ("do_train tpu_num_cores ray_scope jit_mode_eval use_ipex past_index mp_parameters", LEAVE_OUT),
        ("predict_with_generate use_fast_tokenizer overwrite_cache preprocessing_only", LEAVE_OUT),
        ("preprocessing_batch_size min_duration_in_seconds freeze_encoder id_column_name", LEAVE_OUT),
        ("pad_target_to_multiple_of freeze_embed_positions mix_lang_emb decode_token_ids use_pipeline", LEAVE_OUT),
        ("condition_on_prev_tokens temperature_fallback", LEAVE_OUT),
        # Seq2SeqTrainingArguments of transformers 4
        ("evaluation_strategy", "--eval_strategy"),
        ("group_by_length", "--train_sampling_strategy group_by_length"),
        ("warmup_ratio", "--warmup_steps, which below 1 is a fraction of the run"),
        ("overwrite_output_dir", "--overwrite True", "give an --output_dir without a run"),
        ("logging_dir", "set the environment variable TENSORBOARD_LOGGING_DIR"),
        ("no_cuda", "--use_cpu True", "--device cpu"),
        ("push_to_hub_model_id", "--hub_model_id", "--repo_id"),
        ("push_to_hub_organization", "--hub_model_id ORGANIZATION/NAME", "--repo_id ORGANIZATION/NAME"),
        ("per_gpu_train_batch_size", "--per_device_train_batch_size"),
        ("per_gpu_eval_batch_size", "--per_device_eval_batch_size", "--batch_size"),
        ("per_device_eval_batch_size per_device_train_batch_size", "--batch_size"),
        ("dataloader_num_workers", "--num_workers"),
        ("adafactor", "--optim adafactor"),
        ("save_safetensors", "leave it out: weights are always saved as safetensors"),
        ("include_inputs_for_metrics", "--include_for_metrics inputs"),
        ("do_eval", "--eval_splits SPLIT", LEAVE_OUT),
        ("do_predict", "use askd-hf evaluate"),
        ("torchdynamo", "--torch_compile_backend"),
        # run_speech_recognition_seq2seq.py, and shared with distil-whisper
        ("model_name_or_path", "--model MODEL", "--teacher MODEL"),
        ("config_name", "leave it out: the config is read from the model's directory"),
        ("tokenizer_name feature_extractor_name processor_name", PROCESSOR),
        ("cache_dir dataset_cache_dir", "set HF_HOME, or HF_HUB_CACHE and HF_DATASETS_CACHE"),
        ("model_revision", "download that revision, `hf download MODEL --revision ...`, and give its directory"),
        ("subfolder", f"{DOWNLOAD} the directory of the subfolder"),
        ("model_variant", f"{DOWNLOAD} its directory"),
        ("token use_auth_token hub_token push_to_hub_token", "log in with `hf auth login`, or set HF_TOKEN"),
        ("trust_remote_code", "leave it out: no code from the Hub is run"),
        ("train_split_name dataset_split_name", *SPLITS),
        ("eval_split_name", "--eval_splits SPLIT"),
        ("max_duration_in_seconds", "--concatenate_seconds, with --concatenate", LEAVE_OUT),
        ("do_lower_case", "--text_case lower", "--normalizer"),
        ("do_remove_punctuation", "--text_normalizer basic", "--normalizer"),
        ("do_normalize_eval", "--normalizer"),
        ("preprocessing_num_workers", "--num_workers", LEAVE_OUT),
        ("freeze_feature_encoder", "--freeze_encoder True", LEAVE_OUT),
        ("forced_decoder_ids", "--language and --task"),
        ("suppress_tokens", "set suppress_tokens in the model's generation_config.json"),
        ("apply_spec_augment", "--spec_augment True", LEAVE_OUT),
        # distil-whisper
        ("teacher_name_or_path teacher_checkpoint", "--teacher MODEL"),
        ("student_model_name_or_path", "--model MODEL"),
        ("assistant_model_name_or_path", "--speculative True, with the assistant as --model and its --teacher"),
        ("save_dir", "--output_dir"),
        ("train_dataset_name", "--dataset NAME; several separated by spaces, not `+`"),
        ("train_dataset_config_name", "--dataset_config NAME; several separated by spaces, not `+`"),
        ("train_dataset_samples", "--dataset_probabilities"),
        ("eval_dataset_name", "--eval_dataset NAME", "--dataset NAME"),
        ("eval_dataset_config_name", "--eval_dataset_config NAME", "--dataset_config NAME"),
        ("eval_text_column_name", "--text_column_name NAME"),
        ("speaker_id_column_name", "--speaker_column NAME"),
        ("max_label_length", "--generation_max_length"),
        ("kl_weight", "--teacher_weight, between 0 and 1, or --preset kd for distil-whisper's weights"),
        ("dtype", "--bf16 or --fp16, and --teacher_dtype for the teacher"),
        ("freeze_decoder", "leave it out: the decoder is always trained"),
        ("wer_threshold", "use askd-hf pseudo-label --wer_threshold"),
        (
            "use_pseudo_labels",
            "--text_column_name whisper_transcript for distil-whisper's pseudo-labels, or --unlabeled_dataset",
            "--label_source teacher",
        ),
        ("timestamp_probability", "--timestamps True"),
        ("return_timestamps", "--timestamp_probability", "--timestamps True", "--timestamps segment"),
        ("concatenate_audio", "--concatenate True", "use askd-hf pseudo-label --concatenate True"),
        ("max_samples_per_split", "--max_train_samples", "--max_samples", "--max_eval_samples"),
        ("max_train_samples", "--max_samples", "--max_eval_samples"),
        ("samples_per_dataset", "--speed_clips"),
        ("private_dataset", "leave it out: a new dataset is private"),
        ("attn_type", "--attn_implementation"),
        ("use_bettertransformer", "--attn_implementation sdpa"),
        ("chunk_length_s", "--long_form chunked"),
        ("log_predictions", "leave it out: every prediction is in the manifests"),
        ("save_best_total_limit", "--save_total_limit, with --load_best_model_at_end True"),
        ("wandb_project wandb_dir wandb_job_type", WANDB),
        ("wandb_name", "--run_name", WANDB),
    ]
    for name in names.split()
}

T = TypeVar("T")


def unknown_options(names: list[str], known: Collection[str]) -> str:
    """Return a message that names every unknown option and its replacement."""
    return "no option " + ", ".join(f"--{name}{_instead(name, known)}" for name in dict.fromkeys(names))


def _instead(name: str, known: Collection[str]) -> str:
    for advice in FORMER.get(name, ()):
        options = re.findall(r"^--(\w+)", advice)
        if all(option in known for option in options):
            return f" (here: {advice})" if options else f" ({advice})"
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def current_name(name: str, known: Collection[str]) -> str:
    """Return the current name of an option, or `name` itself if it isn't the old name of a `known` option."""
    new = OPTIONS.get(name, name)
    return new if name not in known and new in known else name


def rename_arguments(argv: list[str], known: Collection[str]) -> list[str]:
    """Return a command line with the current names and values of options. Log a warning for each old one.

    Args:
        argv: arguments such as `--name value`, `--name=value` or `--no_name`, with `_` or `-`.
    """
    renamed, option = [], ""
    for word in argv:
        if word.startswith("--") and word != "--":
            written, equals, value = word.removeprefix("--").partition("=")
            name = written.replace("-", "_")
            negated = name.startswith("no_") and name not in known and current_name(name, known) == name
            option = current_name(name.removeprefix("no_") if negated else name, known)
            if option != name.removeprefix("no_" if negated else ""):
                logger.warning("--%s is called --%s now", name, f"no_{option}" if negated else option)
                word = f"--{'no_' if negated else ''}{option}{equals}{_told_value(option, value)}"
            elif equals:
                word = word.partition("=")[0] + equals + _told_value(option, value)
        else:
            word = _told_value(option, word)
        renamed.append(word)
    return renamed


def _current_value(option: str, value: Any) -> Any:
    """Return the current value of an option."""
    return VALUES.get(option, {}).get(value, value) if isinstance(value, str) else value


def _told_value(option: str, value: str) -> str:
    """Return the current value, and log a warning if it has another name."""
    new = _current_value(option, value)
    if new != value:
        logger.warning("--%s %s is called --%s %s now", option, value, option, new)
    return new


def rename_saved(options: dict[str, Any]) -> dict[str, Any]:
    """Return options saved by an earlier version with their current names and values."""
    named = {OPTIONS.get(name, name): value for name, value in options.items()}
    return {name: _current_value(name, value) for name, value in named.items()}


def renamed_keywords(**old: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function: with `renamed_keywords(old="new")` it also accepts the keyword `old`, with a warning."""
    return lambda function: _renaming(function, old, "{}=")


def accepts_renamed(cls: type[T]) -> type[T]:
    """Decorate a dataclass of options: its constructor also accepts the old names, with a FutureWarning."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]  # a dataclass
    old = {name: new for name, new in OPTIONS.items() if new in known and name not in known}
    cls.__init__ = _renaming(cls.__init__, old, f"{cls.__name__}({{}}=)")  # type: ignore[method-assign]
    return cls


def _renaming(function: Callable[..., T], old: dict[str, str], form: str) -> Callable[..., T]:
    @functools.wraps(function)
    def renaming(*args: Any, **kwargs: Any) -> T:
        current = {}
        for name, value in kwargs.items():
            new = old.get(name, name)
            if new != name:
                warnings.warn(f"{form.format(name)} is called {new}= now", FutureWarning, stacklevel=2)
            current[new] = _current_value(new, value)
        return function(*args, **current)

    return renaming
