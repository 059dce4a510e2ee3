"""Models and training data of a run, for publication: names without local paths, and licenses."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.utils import HFValidationError, httpx, validate_repo_id
from transformers import WhisperConfig, WhisperForConditionalGeneration

from ..arguments import DataArguments, ModelArguments, SpeechSource
from ..data.json_files import from_json
from ..data.languages import language_code
from ..data.soft_labels import SETTINGS_COLUMN
from ..errors import UserError
from ..hub_access import expanded
from ..models.generation_config import is_multilingual
from ..models.layers import copied_decoder_layers, copied_encoder_layers, is_pruned_encoder
from ..models.lora import adapter_base, is_adapter
from ..models.student import same_encoder
from ..models.window import window_seconds

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
PSEUDO_LABELS = "pseudo_labels"  # key in the metadata of a dataset card: the `TrainingData` that a model transcribed
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass
class BaseModelInfo:
    """The teacher, or the model that training started from."""

    name: str  # its Hub id, or the last part of its path
    on_hub: bool  # whether `name` is a Hub id
    license: dict[str, str] = field(default_factory=dict)  # the `LICENSE_FIELDS` of its model card
    # encoder_layers, decoder_layers, parameters, vocabulary, mel_bins: its size; None if it wasn't loaded
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    parameters: int | None = None
    vocabulary: int | None = None
    mel_bins: int | None = None
    window: float = 30.0  # seconds of audio

    @classmethod
    def of(cls, name: str, model: WhisperForConditionalGeneration | None = None) -> "BaseModelInfo":
        """Return the info on a directory or Hub id, with the size of the model that was loaded from it."""
        info = cls(*public_name(name), license=stated_license(name))
        if model is not None:
            info.encoder_layers, info.decoder_layers = model.config.encoder_layers, model.config.decoder_layers
            info.mel_bins, info.vocabulary = (
                model.config.num_mel_bins,
                stored_vocabulary(name) or model.config.vocab_size,
            )
            info.window = float(window_seconds(model))
            # in memory the model may have the student's vocabulary; input and output embeddings are one matrix
            rows = info.vocabulary - model.config.vocab_size
            info.parameters = model.num_parameters() + rows * model.config.d_model
        return info


@dataclass
class TrainingData:
    """A dataset split that was trained on."""

    dataset: str  # Hub id of the dataset, or the last part of its path
    on_hub: bool  # whether `dataset` is a Hub id
    # config, split: None if the dataset has none
    config: str | None
    split: str | None
    # the model that transcribed it: its Hub id, or the last part of its path. None if the transcripts are part of the
    # dataset.
    transcribed_by: str | None = None
    license: str | None = None  # license in its dataset card; None if there is no card, or it states none

    @classmethod
    def of(cls, source: SpeechSource) -> "TrainingData":
        """Return the data of a source; for an output of `askd-hf pseudo-label` the dataset that it transcribed."""
        speech = cls(*public_name(source.dataset), source.config, source.split)
        speech.license = stated_data_license(source.dataset)
        if not Path(source.dataset).expanduser().exists():
            return speech
        try:
            transcribed = _card(DatasetCard, source.dataset).get(PSEUDO_LABELS)
            found = from_json(cls, transcribed) or speech
            found.license = found.license or speech.license
            return found
        except (TypeError, AttributeError) as error:
            logger.info("the card of %s doesn't say which model transcribed it: %s", source.dataset, error)
            return speech


@dataclass
class Provenance:
    """Models and training data of a run."""

    # the teacher, and the model whose layers were copied into the student; None if there is none
    teacher: BaseModelInfo | None = None
    # the model that training started from; None if it is unknown, or layers of the teacher were copied
    student: BaseModelInfo | None = None
    from_teacher: bool = False  # whether layers of the teacher were copied into the student
    teachers_encoder: bool = False  # whether the student had the teacher's encoder before training
    # copied_decoder_layers, copied_encoder_layers: teacher layers copied into the student; None if all were, or if it
    # didn't start from the teacher
    copied_decoder_layers: list[int] | None = None
    copied_encoder_layers: list[int] | None = None
    encoder_recovery_epochs: int = 0  # epochs of training a pruned encoder on audio alone, before the distillation
    speech: list[TrainingData] = field(default_factory=list)  # the training data; empty if unknown
    # languages of the speech, as codes such as `en`; empty if unknown
    languages: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["transcribe"])  # `transcribe`, `translate` or both

    @property
    def language(self) -> str | None:
        """The language, if there is exactly one."""
        return self.languages[0] if len(self.languages) == 1 else None

    @property
    def task(self) -> str:
        """`translate` if that is the only task, else `transcribe`."""
        return "translate" if self.tasks == ["translate"] else "transcribe"

    @classmethod
    def of(
        cls,
        models: ModelArguments,
        data: DataArguments,
        teacher: WhisperForConditionalGeneration | None,
        student: WhisperForConditionalGeneration,
    ) -> "Provenance":
        """Return the provenance for the options of `askd-hf distill` and its models before training."""
        sources = data.train_sources()
        provenance = cls(
            speech=[TrainingData.of(source) for source in sources],
            languages=languages_of([source.language for source in sources], student),
            tasks=sorted({source.task or "transcribe" for source in sources}),
        )
        if models.teacher:
            provenance.teacher = BaseModelInfo.of(models.teacher, teacher)
            provenance.teachers_encoder = teacher is not None and same_encoder(teacher, student)
        if models.student:
            provenance.student = BaseModelInfo.of(models.student)
        else:
            provenance.from_teacher = True
            provenance.copied_decoder_layers = copied_decoder_layers(student.config)
            provenance.copied_encoder_layers = copied_encoder_layers(student.config)
        return provenance

    @classmethod
    def of_models(
        cls, teacher: WhisperForConditionalGeneration | None, student: WhisperForConditionalGeneration
    ) -> "Provenance":
        """Return what is known from the models alone."""
        provenance = cls(languages=languages_of([], student))
        if is_pruned_encoder(student.config):
            provenance.copied_encoder_layers = copied_encoder_layers(student.config)
        started_from = student.name_or_path  # for a student of `init_student`, the teacher's
        if teacher is not None and teacher.name_or_path:
            provenance.teacher = BaseModelInfo.of(teacher.name_or_path, teacher)
            provenance.teachers_encoder = same_encoder(teacher, student)
            provenance.from_teacher = started_from == teacher.name_or_path
        if started_from and not provenance.from_teacher:
            provenance.student = BaseModelInfo.of(started_from)
        return provenance

    @property
    def base(self) -> BaseModelInfo | None:
        """The model whose weights training started from; None if unknown."""
        return self.teacher if self.from_teacher else self.student


def public_name(name: str | None) -> tuple[str | None, bool]:
    """Return a Hub id unchanged, or the last part of a path; and whether it is a Hub id."""
    if name is None:
        return None, False
    try:
        validate_repo_id(name)
        on_hub = not Path(name).expanduser().exists()
    except HFValidationError:
        on_hub = False
    return (name if on_hub else Path(name).expanduser().resolve().name), on_hub


def cached_teacher(dataset: Dataset) -> BaseModelInfo:
    """Return the teacher of a dataset's soft labels, never as a Hub id: a path elsewhere may look like one."""
    name = json.loads(dataset[SETTINGS_COLUMN][0])["teacher"]
    return BaseModelInfo(PureWindowsPath(name).name, on_hub=False)  # parses / and \\


def languages_of(names: list[str | None], student: WhisperForConditionalGeneration) -> list[str]:
    """Return the distinct language codes: `en` for an English-only student; empty if a language is unknown."""
    if not is_multilingual(student):
        return ["en"]
    return [] if None in names else list(dict.fromkeys(map(language_code, names)))


def stored_vocabulary(name: str) -> int | None:
    """Return the vocabulary size of the stored model; in memory `vocabulary.with_vocabulary_of` may change it."""
    try:
        stored = adapter_base(name) if is_adapter(name) else name
        return WhisperConfig.from_pretrained(expanded(stored)).vocab_size
    except (OSError, ValueError, UserError, httpx.HTTPError) as error:
        logger.info(
            "the config of %s can't be read, so its vocabulary size is that of the loaded model: %s", name, error
        )
        return None


def _card(kind: type[ModelCard] | type[DatasetCard], name: str) -> dict[str, Any]:
    """Return the metadata in the card of a directory or Hub id; empty if there is no card, or it can't be read."""
    path = Path(name).expanduser()
    card = path / "README.md"
    if path.exists() and not card.is_file():
        return {}
    try:
        return kind.load(card if path.exists() else name, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError, httpx.HTTPError) as error:
        logger.info("the card of %s can't be read, so its license is unknown: %s", name, error)
        return {}


def stated_data_license(name: str) -> str | None:
    """Return the license in the card of a dataset (a directory or Hub id); None if there is no card or license."""
    card = _card(DatasetCard, name)
    stated = card.get("license")
    stated = [stated] if isinstance(stated, str) else stated or []
    stated = [card.get("license_name") or each if each == "other" else each for each in stated]
    return ", ".join(str(each) for each in stated) or None


def stated_license(name: str) -> dict[str, str]:
    """Return the `LICENSE_FIELDS` in the card of a model (a directory or Hub id); empty if there is no card.

    A relative link is completed with the model's address on the Hub, or dropped for a local directory.
    """
    card = _card(ModelCard, name)
    stated = {key: card[key] for key in LICENSE_FIELDS if isinstance(card.get(key), str)}
    link = stated.get("license_link")
    if link is not None and "://" not in link:
        del stated["license_link"]
        if public_name(name)[1]:
            stated["license_link"] = f"{HUB}/{name}/blob/main/{link}"
    return stated
