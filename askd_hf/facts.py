"""What a run leaves for its model card: `training.json`, written while everything is still known.

It is published, so it holds no secret and no path of this machine: of the run's arguments only those in `ARGUMENTS`,
of models and datasets that aren't on the Hub only the last part of their paths.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, httpx, validate_repo_id
from safetensors import safe_open
from transformers import TrainerState, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from .callbacks import AdaptiveBlendCallback
from .config import ASKDConfig, DataArguments, ModelArguments
from .errors import UserError
from .schedule import BlendState
from .student import MULTILINGUAL_VOCABULARY, layers_to_copy
from .teacher_cache import SETTINGS

logger = logging.getLogger(__name__)

FACTS_FILE = "training.json"
FRAMES_A_SECOND = 100
LICENSE_FIELDS = ("license", "license_name", "license_link")
PACKAGES = ("askd-hf", "torch", "transformers", "datasets", "tokenizers", "accelerate")

# What a run's result depends on. Nothing else is published: neither tokens nor paths are among them.
ARGUMENTS = (
    "preset",
    "teacher_weight",
    "teacher_weight_end",
    "teacher_phase",
    "teacher_schedule",
    "adaptive_window",
    "self_weight",
    "self_schedule",
    "self_teacher",
    "self_ema_decay",
    "self_refresh",
    "temperature",
    "divergence",
    "divergence_mix",
    "trust_label",
    "freeze_encoder",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "tf32",
    "load_best_model_at_end",
    "metric_for_best_model",
    "save_dtype",
)


@dataclass
class Ancestor:
    """A model that the student comes from.

    Attributes:
        name: its Hub id, or the last part of its path.
        on_hub: whether it is a Hub id.
        license: what its card states of `LICENSE_FIELDS`.
        encoder_layers, decoder_layers, parameters: None if it wasn't loaded.
    """

    name: str
    on_hub: bool
    license: dict[str, str] = field(default_factory=dict)
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    parameters: int | None = None

    @classmethod
    def of(cls, name: str, model: WhisperForConditionalGeneration | None = None) -> "Ancestor":
        """Of a directory or Hub id, as `from_pretrained` takes it, and the model loaded from there."""
        ancestor = cls(*public_name(name), license=stated_license(name))
        if model is not None:
            ancestor.encoder_layers, ancestor.decoder_layers = model.config.encoder_layers, model.config.decoder_layers
            ancestor.parameters = model.num_parameters()
        return ancestor


@dataclass
class Origin:
    """Where a run's models and speech come from.

    Attributes:
        teacher: whose distribution the student learns; None if only from labels and itself.
        student: what training started from; None: from layers of the teacher.
        copied_decoder_layers, copied_encoder_layers: the teacher's layers that it started from; None: all, or no such.
        dataset, on_hub, config, split: what was trained on, the name as in `Ancestor`; None if that isn't known.
        language: spoken, as a code such as `en`; None if that isn't known.
        task: transcribe or translate.
    """

    teacher: Ancestor | None = None
    student: Ancestor | None = None
    copied_decoder_layers: list[int] | None = None
    copied_encoder_layers: list[int] | None = None
    dataset: str | None = None
    on_hub: bool = False
    config: str | None = None
    split: str | None = None
    language: str | None = None
    task: str = "transcribe"

    @classmethod
    def of(
        cls,
        models: ModelArguments,
        data: DataArguments,
        teacher: WhisperForConditionalGeneration | None,
        student: WhisperForConditionalGeneration,
    ) -> "Origin":
        """From the options of `examples/distill.py`, and its models before training."""
        origin = cls(config=data.dataset_config, split=data.train_split, task=data.task)
        origin.dataset, origin.on_hub = public_name(data.dataset)
        origin.language = language_code(data.language, student)
        if models.teacher:
            origin.teacher = Ancestor.of(models.teacher, teacher)
        if models.student:
            origin.student = Ancestor.of(models.student)
        else:
            available = teacher.config
            origin.copied_decoder_layers = layers_to_copy(models.decoder_layers, available.decoder_layers)
            if models.encoder_layers:
                origin.copied_encoder_layers = layers_to_copy(
                    models.encoder_layers, available.encoder_layers, "encoder"
                )
        return origin

    @classmethod
    def of_models(
        cls, teacher: WhisperForConditionalGeneration | None, student: WhisperForConditionalGeneration
    ) -> "Origin":
        """As far as the models tell by themselves."""
        origin = cls(language=language_code(None, student))
        started_from = student.name_or_path  # of a student made by `init_student` it is the teacher's
        if teacher is not None and teacher.name_or_path:
            origin.teacher = Ancestor.of(teacher.name_or_path, teacher)
        if started_from and (origin.teacher is None or started_from != teacher.name_or_path):
            origin.student = Ancestor.of(started_from)
        return origin


@dataclass
class Student:
    """What the published files themselves say.

    Attributes:
        parameters: stored weights, the tied ones once.
        dtype: of the weights, as in float32.
        multilingual: whether it takes a language.
        timestamps, word_timestamps: whether `pipeline` can give them.
        window: seconds of audio that it hears at once.
    """

    parameters: int
    dtype: str
    encoder_layers: int
    decoder_layers: int
    multilingual: bool
    timestamps: bool
    word_timestamps: bool
    window: float

    @classmethod
    def of(cls, directory: Path) -> "Student":
        config = json.loads((directory / "config.json").read_text())
        generation = json.loads((directory / "generation_config.json").read_text())
        parameters = 0
        for file in sorted(directory.glob("model*.safetensors")):
            with safe_open(file, "pt") as weights:
                parameters += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
        # the timestamp tokens come after <|notimestamps|>, if there are any
        last_text_token = generation.get("no_timestamps_token_id", config["vocab_size"])
        timestamps = config["vocab_size"] > last_text_token + 1
        return cls(
            parameters=parameters,
            dtype=config["dtype"],
            encoder_layers=config["encoder_layers"],
            decoder_layers=config["decoder_layers"],
            multilingual=generation.get("is_multilingual", config["vocab_size"] >= MULTILINGUAL_VOCABULARY),
            timestamps=timestamps,
            word_timestamps=timestamps and bool(generation.get("alignment_heads")),
            window=2 * config["max_source_positions"] / FRAMES_A_SECOND,
        )


@dataclass
class Facts:
    """A run as its card tells it.

    Attributes:
        clips, hours: of the training set; None if that isn't known.
        step, total_steps, epochs: how far training was; unfinished where `step` is less.
        batch_size: clips an update, over all processes and accumulation steps.
        phases: of the schedule, one each: `phase`, `first_step`, `last_step`, `teacher_weight` and `self_weight`, both
            at the first and the last step. Under an adaptive schedule the teacher's are the most that it may have.
        weights: on `labels`, `teacher` and `self` in the last update.
        arguments: those in `ARGUMENTS`.
        versions: of `PACKAGES`.
        hardware: `device`, `processes`.
    """

    origin: Origin
    student: Student
    clips: int | None
    hours: float | None
    step: int
    total_steps: int
    epochs: float
    batch_size: int
    phases: list[dict[str, Any]]
    weights: dict[str, float]
    arguments: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    def save(self, directory: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (directory / FACTS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Facts":
        """Read what `save` wrote; what the model's files say is read from them, as they may have changed since.

        Raises `UserError` if there is none.
        """
        file = directory / FACTS_FILE
        if not file.is_file():
            raise UserError(f"{directory} has no {FACTS_FILE}: it isn't the directory of a run of examples/distill.py")
        facts = cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        facts.student = Student.of(directory)
        return facts

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Facts":
        origin = dict(data["origin"])
        for name in ("teacher", "student"):
            origin[name] = origin[name] and Ancestor(**origin[name])
        return cls(**{**data, "origin": Origin(**origin), "student": Student(**data["student"])})


def gather_facts(
    directory: Path,
    origin: Origin,
    config: ASKDConfig,
    state: TrainerState,
    blend: AdaptiveBlendCallback,
    train_dataset: Any,
) -> Facts:
    """Of the run whose student was just saved in `directory`."""
    # an adaptive teacher had what its advantage allowed then; known is what it could have had, and until when
    planned = blend.schedule.phases(BlendState(release_step=blend.state.release_step))
    weights = blend.weights  # of the last update
    phases = [
        dict(
            phase=phase.name,
            first_step=phase.start,
            last_step=phase.end - 1,
            teacher_weight=[phase.first.teacher, phase.last.teacher],
            self_weight=[phase.first.self, phase.last.self],
        )
        for phase in planned
    ]
    device = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else config.device.type
    hours = None
    if isinstance(train_dataset, Dataset) and "seconds" in train_dataset.column_names:
        hours = sum(train_dataset["seconds"]) / 3600
    arguments = config.to_dict()
    return Facts(
        origin=origin,
        student=Student.of(directory),
        clips=None if train_dataset is None else len(train_dataset),
        hours=hours,
        step=state.global_step,
        total_steps=state.max_steps,
        epochs=state.epoch or 0.0,
        batch_size=config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        phases=phases,
        weights=dict(labels=1.0 - weights.teacher - weights.self, teacher=weights.teacher, self=weights.self),
        arguments={name: arguments[name] for name in ARGUMENTS},
        versions={name: version(name) for name in PACKAGES},
        hardware=dict(device=device, processes=config.world_size),
    )


def public_name(name: str | None) -> tuple[str | None, bool]:
    """A Hub id as it is, of anything else the last part of its path; and whether it is a Hub id."""
    if name is None:
        return None, False
    try:
        validate_repo_id(name)
        on_hub = not Path(name).expanduser().exists()
    except HFValidationError:
        on_hub = False
    return (name if on_hub else Path(name).expanduser().resolve().name), on_hub


def cached_teacher(dataset: Dataset) -> Ancestor:
    """Who labelled a dataset of `teacher_cache`. What was a path elsewhere can look like a Hub id: none is claimed."""
    return Ancestor(public_name(json.loads(dataset[SETTINGS][0])["teacher"])[0], on_hub=False)


def language_code(language: str | None, student: WhisperForConditionalGeneration) -> str | None:
    """`fr` for `French`; without a language that of the student, if it has only one."""
    if language is not None:
        return TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    multilingual = getattr(
        student.generation_config, "is_multilingual", student.config.vocab_size >= MULTILINGUAL_VOCABULARY
    )
    return None if multilingual else "en"


def stated_license(name: str) -> dict[str, str]:
    """What the card of a model, a directory or Hub id, says of its licence; nothing without a card to be had."""
    card = Path(name).expanduser() / "README.md"
    try:
        if Path(name).expanduser().exists():
            if not card.is_file():
                return {}
            data = ModelCard.load(card, ignore_metadata_errors=True).data
        else:
            data = ModelCard.load(name, ignore_metadata_errors=True).data
    except (OSError, ValueError, httpx.HTTPError) as error:
        logger.info("no model card of %s, so its licence isn't known: %s", name, error)
        return {}
    stated = {key: data.get(key) for key in LICENSE_FIELDS}
    return {key: value for key, value in stated.items() if isinstance(value, str)}
