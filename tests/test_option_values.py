"""Values that an option can't have, and options of other scripts: one line before anything is loaded."""

import dataclasses
import errno
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import transformers.integrations.integration_utils as integrations
from processes import run_there
from safetensors import SafetensorError
from scripts import ROOT, run_here
from training import make_trainer

from askd_hf.arguments import CacheArguments, DataArguments, MixArguments, ModelArguments, packages, renamed
from askd_hf.arguments.packages import check_optimizer
from askd_hf.arguments.parser import parse_args
from askd_hf.arguments.ranges import Range
from askd_hf.arguments.writable import check_writable
from askd_hf.commands.push import PushArguments
from askd_hf.config import RANGES, ASKDConfig
from askd_hf.data.augment import AugmentArguments
from askd_hf.errors import UserError, exit_on_user_error, saving_errors
from askd_hf.evaluation import EvaluationArguments
from askd_hf.models.from_arguments import check_student_options
from askd_hf.models.loading import check_max_length, load_whisper
from askd_hf.models.lora import LoraArguments
from askd_hf.pseudo_labels import PseudoLabelArguments
from askd_hf.training.run_dir import prepare_evaluation

DISTILL = (ModelArguments, DataArguments, MixArguments, AugmentArguments, CacheArguments, LoraArguments, ASKDConfig)
NAN, INF = "nan", "inf"

# of our own options, the values that none can have
IMPOSSIBLE = {
    ModelArguments: {
        "decoder_layers": ["0", "-1", "abc", "1.5", "0,0", "-1,2", ",", "nan"],
        "encoder_layers": ["0", "-3", "two", "1,1"],
    },
    DataArguments: {
        "max_train_samples": [0, -1],
        "max_eval_samples": [0, -1],
        "min_duration_in_seconds": [-1, NAN, INF],
        "max_duration_in_seconds": [0, -1, NAN],
        "min_label_length": [-1],
        "max_label_length": [0, -1, NAN],
        "preprocessing_num_workers": [0, -1],
    },
    MixArguments: {
        "dataset_probabilities": [0, -1, NAN, INF],
        "shuffle_buffer_size": [0, -1],
        "no_speech_probability": [0, 1, -0.1, NAN],
        "timestamp_probability": [-0.1, 1.1, NAN, INF],
        "condition_on_prev_probability": [-0.1, 1.1, NAN],
    },
    AugmentArguments: {"augment_probability": [0, 1.5, NAN], "snr_db": [5, NAN, INF]},
    CacheArguments: {"teacher_top_k": [0, -1]},
    LoraArguments: {"lora_r": [0, -1], "lora_alpha": [0, -1, NAN, INF], "lora_dropout": [-0.1, 1, NAN]},
    ASKDConfig: {
        "teacher_weight": [-0.1, 1.1, NAN],
        "teacher_weight_end": [1.1, NAN],
        "teacher_phase_ratio": [-1, 2, NAN],
        "self_weight": [2, NAN],
        "self_ema_decay": [1, -0.1, NAN],
        "temperature": [0, -1, NAN, INF],
        "hidden_weight": [-1, NAN, INF],
        "adaptive_window": [0, -1],
        "early_stopping_patience": [0],
        "learning_rate": [0, "-0.001", NAN, INF],
        "num_train_epochs": [0, -1, NAN, INF],
        "max_steps": [0, -2],
        "warmup_steps": [-1, NAN, INF],
        "logging_steps": [0, -1, NAN],
        "eval_steps": [0, -1, NAN],
        "save_steps": [0, -1, NAN],
        "save_total_limit": [-1],
        "per_device_train_batch_size": [0, -1],
        "per_device_eval_batch_size": [0, -1],
        "gradient_accumulation_steps": [0, -1],
        "weight_decay": [-1, NAN, INF],
        "max_grad_norm": [-1, NAN],
        "adam_beta1": [1, -0.1, NAN],
        "generation_max_length": [0, -1],
        "generation_num_beams": [0, -1],
        "dataloader_num_workers": [-1],
        "seed": [-1, 2**32],
        "data_seed": [-1],
    },
}
OTHER_SCRIPTS = {
    EvaluationArguments: (
        "--model m --dataset d",
        {
            "max_eval_samples": [0, -1],
            "batch_size": [0, -1],
            "num_workers": [-1],
            "num_beams": [0],
            "generation_max_length": [0],
            "n_resamples": [0],
            "concatenate_seconds": [0, -1, NAN, INF],
            "speed_clips": [0],
            "speed_batch_sizes": [0],
            "repetitions": [0],
            "device": ["nowhere", "cuda:99", "gpu"],
        },
    ),
    PseudoLabelArguments: (
        "--teacher t --dataset d",
        {
            "max_samples": [0, -1],
            "batch_size": [0],
            "wer_threshold": [-1, NAN],
            "logprob_threshold": [0.1, NAN],
            "compression_ratio_threshold": [0, -1, NAN],
            "repeated_5gram_threshold": [-1, NAN],
            "concatenate_seconds": [0, -1, NAN],
        },
    ),
}


def refused(types, arguments: list[str]) -> str:
    """The one line with which the options end."""
    try:
        parse_args(types, arguments)
    except UserError as error:
        message = str(error)
    else:
        pytest.fail(f"{arguments} are accepted")
    assert "\n" not in message
    return message


CASES = [(kind, name) for kind, names in IMPOSSIBLE.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_impossible_values_of_training_are_refused(kind, name, tmp_path):
    for value in IMPOSSIBLE[kind][name]:
        more = ["--load_best_model_at_end", "True"] if name == "early_stopping_patience" else []
        assert name in refused((kind,), [f"--{name}={value}", *more])


def test_impossible_values_of_other_scripts_are_refused():
    for kind, (needed, values) in OTHER_SCRIPTS.items():
        for name, impossible in values.items():
            for value in impossible:
                assert name in refused((kind,), [*needed.split(), f"--{name}={value}"]), (name, value)


def test_values_at_the_bounds_are_accepted(tmp_path):
    accepted = "--max_train_samples 1 --min_duration_in_seconds 0 --max_duration_in_seconds inf"
    accepted += " --timestamp_probability 1 --teacher_cache_dir t --teacher_top_k 1"
    accepted += " --warmup_steps 0 --max_grad_norm 0 --logging_steps 0.5 --save_total_limit 0 --weight_decay 0"
    accepted += f" --decoder_layers 31, --seed 0 --output_dir {tmp_path}"
    assert parse_args(DISTILL, accepted.split())[1].max_train_samples == 1
    filters = "--teacher t --dataset d --wer_threshold inf --logprob_threshold=-inf --compression_ratio_threshold inf"
    assert parse_args((PseudoLabelArguments,), filters.split())[0].wer_threshold == float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--min_duration_in_seconds 5 --max_duration_in_seconds 4",
            "--min_duration_in_seconds must be at most --max_duration_in_seconds, got 5.0 and 4.0",
        ),
        (
            "--min_label_length 9 --max_label_length 4",
            "--min_label_length must be at most --max_label_length, got 9 and 4",
        ),
        ("--max_steps 10 --warmup_steps 11", "--warmup_steps must be at most --max_steps, got 11 and 10"),
        ("--max_train_samples 0", "--max_train_samples must be at least 1, got 0; leave it out for all clips"),
        ("--learning_rate abc", "argument --learning_rate"),
        ("--max_steps 1.5", "argument --max_steps"),
        ("some.json", "value without an option: some.json; give a file of options by --config"),
        ("--no_speech_probability 0.1", "--no_speech_probability requires --no_speech_dataset"),
        ("--layer_selection merged", "--layer_selection merged requires --encoder_layers"),
        ("--lora_alpha 8", "--lora_alpha requires --lora_r"),
        ("--lora_dropout 0.1", "--lora_dropout requires --lora_r"),
        ("--lora_target_modules fc1", "--lora_target_modules requires --lora_r"),
        ("--shuffle_buffer_size 50", "--shuffle_buffer_size requires --streaming"),
        ("--teacher_top_k 8", "--teacher_top_k requires --teacher_cache_dir"),
        ("--encoder_cache_dtype int8", "--encoder_cache_dtype requires --encoder_cache_dir"),
    ],
)
def test_what_can_not_be_together_is_refused(arguments, message):
    line = refused(DISTILL, arguments.split())
    assert re.search(message, line), line


def test_ranges_cover_what_transformers_takes_without_a_word():
    """Every number of Seq2SeqTrainingArguments is in RANGES or checked by a rule of its own."""
    numbers = {
        f.name for f in dataclasses.fields(ASKDConfig) if {"int", "float"} & set(re.findall(r"\w+", str(f.type)))
    }
    ours = set(IMPOSSIBLE[ASKDConfig]) | {"divergence_beta"}
    elsewhere = {"max_steps", "label_smoothing_factor", "local_rank", "save_total_limit"}
    assert not [n for n in numbers - RANGES.keys() - ours - elsewhere if not n.startswith(("hub", "push", "include"))]


def test_nan_is_in_no_range():
    for allowed in (
        Range(),
        Range(low=0),
        Range(above=0, below=1),
        Range(infinite=True),
        Range(high=0, infinite=True),
    ):
        assert float("nan") not in allowed
    assert float("inf") in Range(above=0, infinite=True) and float("inf") not in Range(above=0)
    assert 0 not in Range(above=0, below=1) and 1 not in Range(above=0, below=1) and 0.5 in Range(above=0, below=1)


# ---- options of other scripts ----


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("group_by_length", "--train_sampling_strategy group_by_length"),
        ("evaluation_strategy", "--eval_strategy"),
        ("warmup_ratio", "--warmup_steps, which below 1 is a fraction"),
        ("overwrite_output_dir", "--output_dir"),
        ("teacher_checkpoint", "--teacher MODEL"),
        ("train_dataset_name", "--dataset NAME"),
        ("train_split_name", "--train_split SPLIT"),
        ("eval_text_column_name", "--text_column_name NAME"),
        ("kl_weight", "--teacher_weight"),
        ("wer_threshold", "askd-hf pseudo-label --wer_threshold"),
        ("cache_dir", "HF_HOME"),
        ("token", "hf auth login"),
        ("dtype", "--bf16 or --fp16"),
        ("no_cuda", "--use_cpu True"),
        ("teecher", "did you mean 'teacher'?"),
    ],
)
def test_an_old_name_points_to_todays(old, new):
    line = refused(DISTILL, [f"--{old}", "x"])
    assert line.startswith(f"no option --{old} (") and new in line


def test_every_unknown_option_is_named_at_once(tmp_path):
    arguments = "--group_by_length --fp16 True --evaluation_strategy=steps --max_stesp 3 --warmup_ratio 0.1"
    line = refused(DISTILL, arguments.split())
    for name in (
        "--group_by_length",
        "--evaluation_strategy",
        "--max_stesp (did you mean 'max_steps'?)",
        "--warmup_ratio",
    ):
        assert name in line
    assert "fp16" not in line
    (tmp_path / "run.yaml").write_text("group_by_length: true\nmax_stesp: 3\nteacher: t\n")
    line = refused(DISTILL, ["--config", str(tmp_path / "run.yaml")])
    assert "--group_by_length" in line and "--max_stesp" in line and "run.yaml" in line


def test_advice_fits_the_script():
    for kind, expected in ((EvaluationArguments, "--model MODEL"), (PseudoLabelArguments, "--teacher MODEL")):
        assert expected in refused((kind,), ["--model_name_or_path", "x"])
    assert "--split SPLIT" in refused((PseudoLabelArguments,), ["--dataset_split_name", "train"])


def test_no_advice_names_an_option_that_no_script_has():
    kinds = (
        *DISTILL,
        EvaluationArguments,
        PseudoLabelArguments,
        PushArguments,
    )
    known = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    for name, advice in renamed.FORMER.items():
        assert renamed._instead(name, known) or name in known, name
        named = {word.removeprefix("--") for text in advice for word in text.split() if word.startswith("--")}
        assert {word.strip(",;`") for word in named} <= known | {"revision"}, name


def test_values_of_yaml_may_begin_with_a_minus_sign(tmp_path):
    (tmp_path / "labels.yaml").write_text("teacher: t\ndataset: d\nmin_log_prob: -5e-1\n")
    (args,) = parse_args((PseudoLabelArguments,), ["--config", str(tmp_path / "labels.yaml")])
    assert args.logprob_threshold == -0.5


def test_the_home_directory_is_expanded_where_no_shell_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("teacher_cache_dir: ~/labels\ndataset: [~/a, b~/c]\n")
    _, data, _, _, caches, *_ = parse_args(DISTILL, ["--config", "~/run.yaml", "--encoder_cache_dir=~/states"])
    assert (caches.teacher_cache_dir, caches.encoder_cache_dir) == (f"{tmp_path}/labels", f"{tmp_path}/states")
    assert data.dataset == [f"{tmp_path}/a", "b~/c"]


@pytest.mark.parametrize("option", ["dataset_config de", "eval_splits dev", "speaker_column who", "no_speech"])
def test_options_of_a_dataset_are_refused_for_suites(option):
    suite = ["--model", "m", "--suite", "fleurs", "--language", "fr"]
    line = refused((EvaluationArguments,), [*suite, *f"--{option}".split()])
    assert line == f"--{option.split()[0]} requires --dataset"
    assert refused((EvaluationArguments,), [*suite, "--task", "translate"]) == "--task translate requires --dataset"
    parse_args((EvaluationArguments,), [*suite, "--dataset", "d", *f"--{option}".split()])


def test_the_layers_of_a_given_student_are_its_own():
    given = ModelArguments(student="s", decoder_layers="1")
    with pytest.raises(
        UserError, match="--decoder_layers 1 is not supported with --student, which has its own layers"
    ):
        check_student_options(given)


def test_no_worker_is_no_worker_for_the_check_of_the_clips_too():
    given = dict(model="m", dataset="d")
    assert EvaluationArguments(**given).check_workers is None
    assert EvaluationArguments(**given, num_workers=0).check_workers == 0


def test_a_switch_is_no_hub_id():
    line = refused((PseudoLabelArguments,), ["--teacher", "t", "--dataset", "d", "--push_to_hub", "True"])
    assert line == "--hub_dataset_id requires the Hub id to push to, such as you/my-speech, got True"


# ---- evaluation without speech ----


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_that_was_asked_for_needs_speech(tmp_path, strategy):
    with pytest.raises(UserError, match=f"--eval_strategy {strategy} requires --eval_splits or --eval_dataset"):
        prepare_evaluation(ASKDConfig(output_dir=str(tmp_path), eval_strategy=strategy), [])
    config = ASKDConfig(output_dir=str(tmp_path))
    assert config.eval_strategy == "epoch"
    prepare_evaluation(config, [])  # by default it is silently not done
    assert config.eval_strategy == "no"


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_learning_rate_that_follows_evaluations_needs_speech(tmp_path, scheduler):
    config = ASKDConfig(output_dir=str(tmp_path), lr_scheduler_type=scheduler)
    prepare_evaluation(config, ["validation"])
    with pytest.raises(UserError, match=f"--lr_scheduler_type {scheduler} requires --eval_splits or --eval_dataset"):
        prepare_evaluation(config, [])


def test_it_is_said_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    run = f"--teacher nobody/nothing --dataset {tmp_path} --eval_strategy steps --output_dir {tmp_path / 'run'}"
    ended = run_here(monkeypatch, capsys, *run.split())
    assert (
        ended.returncode == 2
        and "--eval_strategy steps requires --eval_splits" in ended.stderr.strip().splitlines()[-1]
    )


# ---- directories that can't be written ----


@pytest.fixture
def unwritable(tmp_path, monkeypatch) -> Path:
    """A directory in which no file can be made, whoever asks."""
    (tmp_path / "disk").mkdir()

    def refuse(dir, **kwargs):
        if Path(dir) == tmp_path / "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dir))
        return original(dir=dir, **kwargs)

    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    return tmp_path / "disk"


def test_a_directory_that_can_not_be_written_is_named(tmp_path, unwritable):
    (tmp_path / "file.sh").write_text("x")
    for directory, message in {
        tmp_path / "file.sh": "file.sh is not a directory",
        tmp_path / "file.sh" / "run": "can't be created: .*file.sh is not a directory",
        unwritable: "is not writable: No space left on device",
        unwritable / "a" / "b": "is not writable: No space left on device",
        "/proc/nothing/run": "(is not writable|can't be created)",
    }.items():
        with pytest.raises(UserError, match=f"--output_dir .*{message}"):
            check_writable(directory, "--output_dir")
    check_writable(tmp_path / "new" / "run", "--output_dir")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".askd*"))


@pytest.mark.parametrize(
    ("script", "arguments", "option"),
    [
        ("distill", "--teacher x --dataset d --output_dir OUT", "--output_dir"),
        ("distill", "--teacher x --dataset d --encoder_cache_dir OUT --output_dir NEW", "--encoder_cache_dir"),
        ("distill", "--teacher x --dataset d --teacher_cache_dir OUT --output_dir NEW", "--teacher_cache_dir"),
        ("cache_teacher", "--teacher x --dataset d --teacher_cache_dir OUT", "--teacher_cache_dir"),
        ("evaluate", "--model x --dataset d --output_dir OUT", "--output_dir"),
        ("pseudo_label", "--teacher x --dataset d --output_dir OUT", "--output_dir"),
    ],
)
def test_scripts_look_before_anything_is_loaded(monkeypatch, capsys, tmp_path, unwritable, script, arguments, option):
    arguments = arguments.replace("OUT", str(unwritable / "run")).replace("NEW", str(tmp_path / "new"))
    ended = run_here(monkeypatch, capsys, *arguments.split(), file=ROOT / "examples" / f"{script}.py")
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {option} {unwritable}") and "No space left on device" in last


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
    ],
    ids=["OSError", "safetensors", "torch"],
)
def test_a_disk_that_fills_up_while_saving_is_one_line(tmp_path, teacher, student, monkeypatch, error):
    trainer = make_trainer(tmp_path, teacher, student, save_strategy="steps", save_steps=2)
    saved = type(trainer)._save_optimizer_and_scheduler

    def fill(self, output_dir):
        if output_dir.endswith("checkpoint-4"):
            raise error
        saved(self, output_dir)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fill)
    message = r"checkpoint-4 couldn't be saved: .*Complete in .*: checkpoint-2\. .*--resume_from_checkpoint last$"
    with pytest.raises(UserError, match=message):
        trainer.train()


def test_other_errors_of_saving_keep_their_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), saving_errors(tmp_path, lambda: ""):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_anywhere_ends_in_one_line(capsys, code):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise OSError(code, os.strerror(code), "/cache/file.arrow")
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: {os.strerror(code)} (/cache/file.arrow)") and "\n" not in line


# ---- packages that aren't there ----


def test_a_missing_reporter_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "get_available_reporting_integrations", lambda: [])
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet_ml", "comet-ml")):
        with pytest.raises(UserError, match=f"--report_to {name} requires a package: pip install {package}$"):
            ASKDConfig(output_dir=str(tmp_path), report_to=name)
    with pytest.raises(UserError, match="--report_to must be one of none, all"):
        ASKDConfig(output_dir=str(tmp_path), report_to="nobody")
    assert set(packages.PACKAGES) <= set(integrations.INTEGRATION_TO_CALLBACK)


def test_an_optimizer_or_schedule_that_can_not_be_made_is_named(tmp_path, student, monkeypatch):
    options = dict(output_dir=str(tmp_path))
    check_optimizer(ASKDConfig(**options), student)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"--optim adamw_bnb_8bit"):
        check_optimizer(ASKDConfig(optim="adamw_bnb_8bit", **options), student)
    with pytest.raises(UserError, match=r"--lr_scheduler_type cosine_with_min_lr.*min_lr"):
        check_optimizer(ASKDConfig(lr_scheduler_type="cosine_with_min_lr", **options), student)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "pip install flash-attn"),
        ("fast", "must be one of sdpa, eager, flash_attention_2, got .fast."),
    ],
)
def test_an_attention_that_is_not_there_is_named(name, message, monkeypatch):
    with pytest.raises(UserError, match=f"--attn_implementation .*{message}"):
        load_whisper("nobody/nothing", attn_implementation=name)


def test_more_tokens_than_the_decoder_has_positions_are_refused(student):
    check_max_length(student, 32)
    with pytest.raises(UserError, match="--generation_max_length must be at most 32, the decoder's positions, got 33"):
        check_max_length(student, 33)


# ---- what is printed before our own first line ----


@pytest.mark.slow
def test_nothing_is_printed_when_a_worker_imports_us(tmp_path):
    script = tmp_path / "script.py"
    code = "import askd_hf, torch.utils.data as d\n"
    code += "if __name__ == '__main__': list(d.DataLoader([1], num_workers=1, multiprocessing_context='spawn'))\n"
    script.write_text(code)
    assert run_there(script) == (0, "", "")


@pytest.mark.slow
def test_help_of_a_script_has_an_empty_stderr():
    """This one is named like a library, which Python must not mistake it for."""
    script = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "" and "--score_only" in done.stdout
