"""Names of earlier versions: every option and every public import still works, and says what it is called now."""

import dataclasses
import importlib
import json
import logging

import pytest

import askd_hf
from askd_hf.arguments import CacheArguments, DataArguments, MixArguments, ModelArguments
from askd_hf.arguments.parser import parse_args
from askd_hf.arguments.renamed import current_name, rename_saved
from askd_hf.callbacks import BLEND_STATE_FILE, read_blend_state
from askd_hf.config import ASKDConfig

IMPORTS = [
    "ASKDConfig",
    "ASKDTrainer",
    "AdaptiveBlendCallback",
    "BlendSchedule",
    "SpeechCollator",
    "UserError",
    "blend",
    "check_clips",
    "init_student",
    "load_processor",
    "load_speech",
    "load_whisper",
]
MODELS = """teacher student decoder_layers encoder_layers layer_choice teacher_dtype teacher_offload
attn_implementation"""
DATA = """dataset unlabelled dataset_config train_split eval_dataset eval_dataset_config eval_splits audio_column
text_column language task eval_language text_case text_normalizer min_seconds max_seconds min_label_tokens
max_label_tokens normalizer on_bad_audio max_train_samples max_eval_samples preprocessing_num_workers compare"""
CACHES = "cache_encoder cache_teacher teacher_top_k"
DECODING = "device dtype attn_implementation batch_size generation_max_length num_workers"
DISTILL = f"""{MODELS} {DATA} {CACHES} dataset_weights streaming shuffle_buffer negatives negatives_share
timestamp_probability prompt_probability augment augment_probability noise_folder lora_rank lora_alpha lora_dropout
lora_target_modules use_dora keep_adapter preset teacher_weight teacher_weight_end teacher_phase teacher_schedule
adaptive_window self_weight self_schedule self_teacher self_ema_decay self_refresh temperature divergence
divergence_mix trust_label early_stopping_patience freeze_encoder hidden_weight eval_blend save_dtype
learning_rate output_dir resume_from_checkpoint push_to_hub"""
OPTIONS = {
    "distill": DISTILL,
    "finetune": DISTILL,
    "cache_teacher": f"{MODELS} {DATA} {CACHES} push_labels_to",
    "evaluate": f"""{DECODING} model teacher suite dataset no_speech dataset_config eval_splits audio_column
    text_column
    speaker_column language task max_eval_samples on_bad_audio output_dir overwrite score_only
    normalizer resamples num_beams timestamps long_form join_clips speed speculative speed_clips
    speed_batch_sizes repetitions""",
    "pseudo_label": f"""{DECODING} teacher dataset dataset_config split audio_column text_column speaker_column
    language
    task max_samples on_bad_audio output_dir overwrite timestamps text normalizer max_wer min_log_prob
    max_compression_ratio max_repetition pack pack_seconds push_to_hub""",
    "push": "model repo results private revision license",
    "export": "model to output_dir quantization dataset dataset_config split max_samples language task",
}


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.filterwarnings("ignore:askd_hf:FutureWarning")
def test_public_imports_of_before_still_work(name):
    assert callable(getattr(askd_hf, name))


def test_a_renamed_import_says_its_name_now():
    with pytest.warns(FutureWarning, match="load_speech is called load_speech_dataset now"):
        assert askd_hf.load_speech is askd_hf.load_speech_dataset
    with pytest.raises(AttributeError, match="no attribute 'load_sound'"):
        askd_hf.load_sound  # noqa: B018


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_before_still_work(command):
    module = importlib.import_module(f"askd_hf.commands.{command}")
    known = [field.name for kind in module.OPTIONS for field in dataclasses.fields(kind) if field.init]
    assert len(OPTIONS[command].split()) == len(set(OPTIONS[command].split()))
    gone = [name for name in OPTIONS[command].split() if current_name(name, known) not in known]
    assert not gone


def parse(*argv: str):
    return parse_args((ModelArguments, DataArguments, MixArguments, CacheArguments, ASKDConfig), list(argv))


def test_old_options_have_the_effect_of_the_new_ones(caplog):
    old = ["--text-column", "a", "b", "--layer_choice", "probe", "--self_refresh=epoch", "--self_teacher", "snapshot"]
    old += ["--self_weight", "0.3", "--cache_encoder=cache", "--eval_blend", "--dataset", "x", "y"]
    with caplog.at_level(logging.WARNING):
        models, data, _, caches, config = parse(*old)
    assert (data.text_column_name, models.layer_selection) == (["a", "b"], "greedy")
    assert (config.snapshot_strategy, caches.encoder_cache_dir, config.eval_teacher_losses) == ("epoch", "cache", True)
    assert "--text_column is called --text_column_name now" in caplog.text
    assert "--layer_selection probe is called --layer_selection greedy now" in caplog.text


def test_old_options_in_a_file(tmp_path, caplog):
    (tmp_path / "run.yaml").write_text(
        "text_column: [a, b]\nself_refresh: never\nteacher_model_name_or_path: x\ndataset: y\n"
    )
    models, data, *_, config = parse("--config", str(tmp_path / "run.yaml"))
    assert (models.teacher, data.text_column_name, config.snapshot_strategy) == ("x", ["a", "b"], "no")
    assert "--self_refresh is called --snapshot_strategy now" in caplog.text


def test_old_keywords_of_the_options_and_of_the_trainer(tmp_path, teacher, student, recwarn):
    config = ASKDConfig(
        output_dir=str(tmp_path), report_to="none", eval_strategy="no", trust_label=True, self_refresh="never"
    )
    assert config.weight_teacher_by_label_prob and config.snapshot_strategy == "no"
    trainer = askd_hf.ASKDTrainer(model=student, args=config, teacher=teacher)
    assert trainer.teacher is teacher
    told = [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    assert told == [
        "ASKDConfig(trust_label=) is called weight_teacher_by_label_prob= now",
        "ASKDConfig(self_refresh=) is called snapshot_strategy= now",
        "teacher= is called teacher_model= now",
    ]


def test_a_checkpoint_of_before_has_the_names_of_today(tmp_path):
    file = tmp_path / BLEND_STATE_FILE
    file.write_text(json.dumps({"options": {"trust_label": True, "self_refresh": "never", "seed": 1}}))
    assert read_blend_state(file).options == {
        "weight_teacher_by_label_prob": True,
        "snapshot_strategy": "no",
        "seed": 1,
    }
    assert rename_saved({"layer_choice": "probe"}) == {"layer_selection": "greedy"}
