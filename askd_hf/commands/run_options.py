"""The options of a training run, and the checks that need neither models nor speech."""

from typing import NamedTuple

from accelerate import PartialState

from ..arguments import CacheArguments, DataArguments, MixArguments, ModelArguments, RunArguments
from ..config import ASKDConfig
from ..data.augment import AugmentArguments
from ..data.sources import check_exist
from ..errors import UserError
from ..hub.publisher import HubPublisher
from ..models.from_arguments import check_student_options
from ..models.lora import LoraArguments, check_adapter_options, loadable_base
from ..models.teacher_memory import check_int8
from ..models.window import shortest_context
from ..training.checks import PERSISTENT_WORKERS, check_processes
from ..training.dataset_checks import check_mix
from ..training.datasets import SYNTHETIC
from ..training.node_disks import find_checkpoint
from ..training.run_dir import check_directories, prepare_evaluation, set_default_output_dir
from ..training.run_settings import check_options


class Options(NamedTuple):
    """Instances of the classes of `options_of("distill")`."""

    model: ModelArguments
    data: DataArguments
    mix: MixArguments
    augment: AugmentArguments
    caches: CacheArguments
    lora: LoraArguments
    run: RunArguments
    config: ASKDConfig


def prepare_run(options: Options) -> str | None:
    """Check the options and name the output directory. Return the checkpoint to resume from, None if there is none.

    Raises `UserError` for every mistake that can be found before a model is loaded.
    """
    model_args, data_args, config = options.model, options.data, options.config
    if not (model_args.teacher or model_args.student):
        raise UserError("--teacher is required: a Whisper model to distill, such as openai/whisper-large-v3")
    check_student_options(model_args)
    set_default_output_dir(config, model_args)
    check_processes(config)
    check_workers(options)
    if options.lora.lora_r:
        check_adapter_options(config, options.lora.keep_adapter)
    check_mix(data_args, options.mix, config)
    check_directories(config, options.caches)
    if not data_args.eval_sources():
        prepare_evaluation(config, [])
    checkpoint = find_checkpoint(config)
    if checkpoint is not None:
        check_options(config, checkpoint)
    if options.lora.keep_adapter:
        loadable_base(model_args.student, config.push_to_hub)
    if model_args.teacher_dtype == "int8":
        check_int8()
    if model_args.teacher_offload and config.torch_compile:
        raise UserError("--teacher_offload is not supported with --torch_compile, which compiles the teacher too")
    sounds = options.mix.no_speech_dataset
    sounds = None if sounds == SYNTHETIC else sounds
    audio = [data_args.unlabeled_dataset, sounds, *model_args.encoder_recovery_dataset]
    check_exist([*data_args.dataset, *data_args.eval_dataset, *audio])
    if config.push_to_hub and PartialState().is_main_process:
        HubPublisher(config).find_repository()
    return checkpoint


def check_workers(options: Options) -> None:
    """Raise `UserError` for persistent workers if the clips are changed at random."""
    mix, augmentations = options.mix, options.augment.augmentations
    is_random = bool(augmentations or mix.timestamp_probability or mix.condition_on_prev_probability)
    if options.config.dataloader_persistent_workers and (is_random or shortest_context(options.model) is not None):
        raise UserError(PERSISTENT_WORKERS)
