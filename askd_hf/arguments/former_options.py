"""Options of other training scripts, and their names here.

The scripts are those of transformers 4 (`Seq2SeqTrainingArguments`, `run_speech_recognition_seq2seq.py`), which the
Whisper fine-tuning blog uses, and distil-whisper's `run_distillation.py`, `run_pseudo_labelling.py`, `run_eval.py` and
`create_student_model.py`.
"""

import difflib
import re
from collections.abc import Collection

# Replacements: the first whose option the script has is shown. Advice without an option is for all scripts.
HUB_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
HUB_CACHE = "set HF_HOME, or HF_HUB_CACHE and HF_DATASETS_CACHE"
LEAVE_OUT = "leave it out"
PROCESSOR = "leave it out: the processor is read from the model's directory"
OWN_MODEL = ("--student MODEL", "--model MODEL", "--teacher MODEL")
SPLITS = ("--train_split SPLIT", "--split SPLIT", "--eval_splits SPLIT")
PRECISION = ("--bf16 or --fp16, and --teacher_dtype for the teacher",)
WANDB = "set the environment variables of wandb"
FORMER = {
    # Seq2SeqTrainingArguments of transformers 4
    "evaluation_strategy": ("--eval_strategy",),
    "group_by_length": ("--train_sampling_strategy group_by_length",),
    "warmup_ratio": ("--warmup_steps, which below 1 is a fraction of the run",),
    "overwrite_output_dir": ("--overwrite True", "give an --output_dir without a run"),
    "logging_dir": ("set the environment variable TENSORBOARD_LOGGING_DIR",),
    "no_cuda": ("--use_cpu True", "--device cpu"),
    "use_mps_device": (LEAVE_OUT,),
    "push_to_hub_token": (HUB_LOGIN,),
    "push_to_hub_model_id": ("--hub_model_id", "--repo_id"),
    "push_to_hub_organization": ("--hub_model_id ORGANIZATION/NAME", "--repo_id ORGANIZATION/NAME"),
    "per_gpu_train_batch_size": ("--per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("--per_device_eval_batch_size", "--batch_size"),
    "per_device_eval_batch_size": ("--batch_size",),
    "per_device_train_batch_size": ("--batch_size",),
    "dataloader_num_workers": ("--num_workers",),
    "adafactor": ("--optim adafactor",),
    "half_precision_backend": (LEAVE_OUT,),
    "fp16_opt_level": (LEAVE_OUT,),
    "fp16_backend": (LEAVE_OUT,),
    "save_safetensors": ("leave it out: weights are always saved as safetensors",),
    "include_inputs_for_metrics": ("--include_for_metrics inputs",),
    "include_tokens_per_second": (LEAVE_OUT,),
    "do_train": (LEAVE_OUT,),
    "do_eval": ("--eval_splits SPLIT", LEAVE_OUT),
    "do_predict": ("use askd-hf evaluate",),
    "tpu_num_cores": (LEAVE_OUT,),
    "ray_scope": (LEAVE_OUT,),
    "jit_mode_eval": (LEAVE_OUT,),
    "use_ipex": (LEAVE_OUT,),
    "torchdynamo": ("--torch_compile_backend",),
    "past_index": (LEAVE_OUT,),
    "mp_parameters": (LEAVE_OUT,),
    "predict_with_generate": (LEAVE_OUT,),
    # run_speech_recognition_seq2seq.py, and shared with distil-whisper
    "model_name_or_path": OWN_MODEL,
    "config_name": ("leave it out: the config is read from the model's directory",),
    "tokenizer_name": (PROCESSOR,),
    "feature_extractor_name": (PROCESSOR,),
    "processor_name": (PROCESSOR,),
    "use_fast_tokenizer": (LEAVE_OUT,),
    "cache_dir": (HUB_CACHE,),
    "dataset_cache_dir": (HUB_CACHE,),
    "model_revision": ("download that revision, `hf download MODEL --revision ...`, and give its directory",),
    "subfolder": ("download the model, `hf download MODEL`, and give the directory of the subfolder",),
    "model_variant": ("download the model, `hf download MODEL`, and give its directory",),
    "token": (HUB_LOGIN,),
    "use_auth_token": (HUB_LOGIN,),
    "hub_token": (HUB_LOGIN,),
    "trust_remote_code": ("leave it out: no code from the Hub is run",),
    "dataset_name": ("--dataset NAME",),
    "dataset_config_name": ("--dataset_config NAME",),
    "train_split_name": SPLITS,
    "eval_split_name": ("--eval_splits SPLIT",),
    "max_duration_in_seconds": ("--concatenate_seconds, with --concatenate", LEAVE_OUT),
    "min_duration_in_seconds": (LEAVE_OUT,),
    "do_lower_case": ("--text_case lower", "--normalizer"),
    "do_remove_punctuation": ("--text_normalizer basic", "--normalizer"),
    "do_normalize_eval": ("--normalizer",),
    "preprocessing_only": (LEAVE_OUT,),
    "preprocessing_batch_size": (LEAVE_OUT,),
    "preprocessing_num_workers": ("--num_workers", LEAVE_OUT),
    "overwrite_cache": (LEAVE_OUT,),
    "freeze_feature_encoder": ("--freeze_encoder True", LEAVE_OUT),
    "freeze_encoder": (LEAVE_OUT,),
    "forced_decoder_ids": ("--language and --task",),
    "suppress_tokens": ("set suppress_tokens in the model's generation_config.json",),
    "apply_spec_augment": ("set apply_spec_augment in the model's config.json",),
    # distil-whisper
    "teacher_model_name_or_path": ("--teacher MODEL",),
    "teacher_name_or_path": ("--teacher MODEL",),
    "teacher_checkpoint": ("--teacher MODEL",),
    "student_model_name_or_path": ("--student MODEL", "--model MODEL"),
    "assistant_model_name_or_path": ("--speculative True, with the assistant as --model and its --teacher",),
    "save_dir": ("--output_dir",),
    "train_dataset_name": ("--dataset NAME; several separated by spaces, not `+`",),
    "train_dataset_config_name": ("--dataset_config NAME; several separated by spaces, not `+`",),
    "train_dataset_samples": ("--dataset_probabilities",),
    "eval_dataset_name": ("--eval_dataset NAME", "--dataset NAME"),
    "eval_dataset_config_name": ("--eval_dataset_config NAME", "--dataset_config NAME"),
    "eval_text_column_name": ("--text_column_name NAME",),
    "dataset_split_name": SPLITS,
    "id_column_name": (LEAVE_OUT,),
    "speaker_id_column_name": ("--speaker_column NAME",),
    "max_label_length": ("--generation_max_length",),
    "pad_target_to_multiple_of": (LEAVE_OUT,),
    "kl_weight": ("--teacher_weight, between 0 and 1, or --preset kd for distil-whisper's weights",),
    "dtype": PRECISION,
    "freeze_decoder": ("leave it out: the decoder is always trained",),
    "freeze_embed_positions": (LEAVE_OUT,),
    "mix_lang_emb": (LEAVE_OUT,),
    "wer_threshold": ("use askd-hf pseudo-label --wer_threshold",),
    "use_pseudo_labels": (
        "--text_column_name whisper_transcript for distil-whisper's pseudo-labels, or --unlabeled_dataset",
        "--label_source teacher",
    ),
    "timestamp_probability": ("--timestamps True",),
    "return_timestamps": ("--timestamp_probability", "--timestamps True", "--timestamps segment"),
    "concatenate_audio": ("--concatenate True", "use askd-hf pseudo-label --concatenate True"),
    "max_samples_per_split": ("--max_train_samples", "--max_samples", "--max_eval_samples"),
    "max_train_samples": ("--max_samples", "--max_eval_samples"),
    "samples_per_dataset": ("--speed_clips",),
    "private_dataset": ("leave it out: a new dataset is private",),
    "decode_token_ids": (LEAVE_OUT,),
    "attn_type": ("--attn_implementation",),
    "use_bettertransformer": ("--attn_implementation sdpa",),
    "use_pipeline": (LEAVE_OUT,),
    "chunk_length_s": ("--long_form chunked",),
    "condition_on_prev_tokens": (LEAVE_OUT,),
    "temperature_fallback": (LEAVE_OUT,),
    "log_predictions": ("leave it out: every prediction is in the manifests",),
    "save_best_total_limit": ("--save_total_limit, with --load_best_model_at_end True",),
    "wandb_project": (WANDB,),
    "wandb_name": ("--run_name", WANDB),
    "wandb_dir": (WANDB,),
    "wandb_job_type": (WANDB,),
}


def unknown_options(names: list[str], known: Collection[str]) -> str:
    """Return a message that names every unknown option and its replacement.

    Args:
        names: the options that don't exist, without `--`.
        known: the options of the script, without `--`.
    """
    return "no option " + ", ".join(f"--{name}{_instead(name, known)}" for name in dict.fromkeys(names))


def _instead(name: str, known: Collection[str]) -> str:
    for advice in FORMER.get(name, ()):
        options = re.findall(r"^--(\w+)", advice)
        if all(option in known for option in options):
            return f" (here: {advice})" if options else f" ({advice})"
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
