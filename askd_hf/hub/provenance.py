"""Where a run's models and speech come from, as far as it may be published: names without paths, licenses."""

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
from ..data.languages import language_code
from ..data.soft_labels import SETTINGS_COLUMN
from ..models.generation_config import is_multilingual
from ..models.layers import copied_decoder_layers, copied_encoder_layers, is_pruned_encoder
from ..models.student import same_encoder

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
PSEUDO_LABELS = "pseudo_labels"  # in the metadata of a dataset's card: the `TrainingData` that a model transcribed
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass
class BaseModelInfo:
    """A model that the student comes from.

    Attributes:
        name: its Hub id, or the last part of its path.
        on_hub: whether it is a Hub id.
        license: what its card states of `LICENSE_FIELDS`.
        encoder_layers, decoder_layers, parameters, vocabulary, mel_bins: None if it wasn't loaded.
    """

    name: str
    on_hub: bool
    license: dict[str, str] = field(default_factory=dict)
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    parameters: int | None = None
    vocabulary: int | None = None
    mel_bins: int | None = None

    @classmethod
    def of(cls, name: str, model: WhisperForConditionalGeneration | None = None) -> "BaseModelInfo":
        """Of a directory or Hub id, as `from_pretrained` takes it, and the model loaded from there."""
        ancestor = cls(*public_name(name), license=stated_license(name))
        if model is not None:
            ancestor.encoder_layers, ancestor.decoder_layers = model.config.encoder_layers, model.config.decoder_layers
            ancestor.parameters, ancestor.mel_bins = model.num_parameters(), model.config.num_mel_bins
            ancestor.vocabulary = stored_vocabulary(name) or model.config.vocab_size
        return ancestor


@dataclass
class TrainingData:
    """A split of a dataset.

    Attributes:
        dataset, on_hub: its name, as in `BaseModelInfo`.
        config, split: None: it has none.
        transcribed_by: name of the model that transcribed it; None if the transcripts are those of the dataset.
        license: what its card states; None: nothing, or it has no card to be had.
    """

    dataset: str
    on_hub: bool
    config: str | None
    split: str | None
    transcribed_by: str | None = None
    license: str | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TrainingData":
        """From the JSON of this or an earlier version."""
        return cls(**{"transcribed_by" if name == "labelled_by" else name: value for name, value in data.items()})

    @classmethod
    def of(cls, source: SpeechSource) -> "TrainingData":
        """What is loaded from there; of a result of `askd-hf pseudo-label` what was transcribed for it."""
        speech = cls(*public_name(source.dataset), source.config, source.split)
        speech.license = stated_data_license(source.dataset)
        card = Path(source.dataset).expanduser() / "README.md"
        if not card.is_file():
            return speech
        try:
            transcribed = DatasetCard.load(card, ignore_metadata_errors=True).data.get(PSEUDO_LABELS)
            return cls.from_dict(transcribed) if transcribed else speech
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            logger.info("the card %s doesn't say whose transcripts these are: %s", card, error)
            return speech


@dataclass
class Provenance:
    """Where a run's models and speech come from.

    Attributes:
        teacher: whose distribution the student learns, and the model that its layers are from; None if there is none.
        student: what training started from; None: from layers of the teacher, or it isn't known.
        from_teacher: whether training started from layers of the teacher.
        teachers_encoder: whether the student had the teacher's encoder before training.
        copied_decoder_layers, copied_encoder_layers: the teacher's layers that it started from; None: all, or no such.
        speech: what was trained on; empty if that isn't known.
        languages: spoken, as codes such as `en`; empty if they aren't known.
        tasks: of transcribe and translate.
    """

    teacher: BaseModelInfo | None = None
    student: BaseModelInfo | None = None
    from_teacher: bool = False
    teachers_encoder: bool = False
    copied_decoder_layers: list[int] | None = None
    copied_encoder_layers: list[int] | None = None
    speech: list[TrainingData] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["transcribe"])

    @property
    def language(self) -> str | None:
        """The only one, if there is only one."""
        return self.languages[0] if len(self.languages) == 1 else None

    @property
    def task(self) -> str:
        return "translate" if self.tasks == ["translate"] else "transcribe"

    @classmethod
    def of(
        cls,
        models: ModelArguments,
        data: DataArguments,
        teacher: WhisperForConditionalGeneration | None,
        student: WhisperForConditionalGeneration,
    ) -> "Provenance":
        """From the options of `askd-hf distill`, and its models before training."""
        sources = data.train_sources()
        origin = cls(
            speech=[TrainingData.of(source) for source in sources],
            languages=languages_of([source.language for source in sources], student),
            tasks=sorted({source.task or "transcribe" for source in sources}),
        )
        if models.teacher:
            origin.teacher = BaseModelInfo.of(models.teacher, teacher)
            origin.teachers_encoder = teacher is not None and same_encoder(teacher, student)
        if models.student:
            origin.student = BaseModelInfo.of(models.student)
        else:
            origin.from_teacher = True
            origin.copied_decoder_layers = copied_decoder_layers(student.config)
            origin.copied_encoder_layers = copied_encoder_layers(student.config)
        return origin

    @classmethod
    def of_models(
        cls, teacher: WhisperForConditionalGeneration | None, student: WhisperForConditionalGeneration
    ) -> "Provenance":
        """As far as the models tell by themselves."""
        origin = cls(languages=languages_of([], student))
        if is_pruned_encoder(student.config):
            origin.copied_encoder_layers = copied_encoder_layers(student.config)
        started_from = student.name_or_path  # of a student made by `init_student` it is the teacher's
        if teacher is not None and teacher.name_or_path:
            origin.teacher = BaseModelInfo.of(teacher.name_or_path, teacher)
            origin.teachers_encoder = same_encoder(teacher, student)
            origin.from_teacher = started_from == teacher.name_or_path
        if started_from and not origin.from_teacher:
            origin.student = BaseModelInfo.of(started_from)
        return origin

    @property
    def base(self) -> BaseModelInfo | None:
        """The model whose weights training started from, as far as that is known."""
        return self.teacher if self.from_teacher else self.student


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


def cached_teacher(dataset: Dataset) -> BaseModelInfo:
    """Return the teacher of a dataset's soft labels, never as a Hub id: a path elsewhere may look like one."""
    name = json.loads(dataset[SETTINGS_COLUMN][0])["teacher"]
    return BaseModelInfo(PureWindowsPath(name).name, on_hub=False)  # parses / and \\


def languages_of(names: list[str | None], student: WhisperForConditionalGeneration) -> list[str]:
    """The codes of languages, each once; without any that of the student, if it has only one."""
    if not is_multilingual(student):
        return ["en"]
    return [] if None in names else list(dict.fromkeys(map(language_code, names)))


def stored_vocabulary(name: str) -> int | None:
    """Of a model as it is stored: in memory a teacher may have the student's (`vocabulary.with_vocabulary_of`)."""
    try:
        return WhisperConfig.from_pretrained(name).vocab_size
    except (OSError, ValueError, httpx.HTTPError) as error:
        logger.info("no config of %s, so its vocabulary is taken for that in memory: %s", name, error)
        return None


def stated_data_license(name: str) -> str | None:
    """What the card of a dataset, a directory or Hub id, says of its license; None without a card to be had."""
    path = Path(name).expanduser()
    card = path / "README.md"
    if path.exists() and not card.is_file():
        return None
    try:
        data = DatasetCard.load(card if path.exists() else name, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError, httpx.HTTPError) as error:
        logger.info("no card of the dataset %s, so its license isn't known: %s", name, error)
        return None
    stated = data.get("license")
    stated = [stated] if isinstance(stated, str) else stated or []
    stated = [data.get("license_name") or each if each == "other" else each for each in stated]
    return ", ".join(str(each) for each in stated) or None


def stated_license(name: str) -> dict[str, str]:
    """What the card of a model, a directory or Hub id, says of its license; nothing without a card to be had.

    A link into the model's own repository is made whole, or dropped where that isn't on the Hub.
    """
    card = Path(name).expanduser() / "README.md"
    try:
        if Path(name).expanduser().exists():
            if not card.is_file():
                return {}
            data = ModelCard.load(card, ignore_metadata_errors=True).data
        else:
            data = ModelCard.load(name, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError, httpx.HTTPError) as error:
        logger.info("no model card of %s, so its license isn't known: %s", name, error)
        return {}
    stated = {key: data.get(key) for key in LICENSE_FIELDS}
    stated = {key: value for key, value in stated.items() if isinstance(value, str)}
    link = stated.get("license_link")
    if link is not None and "://" not in link:
        del stated["license_link"]
        if public_name(name)[1]:
            stated["license_link"] = f"{HUB}/{name}/blob/main/{link}"
    return stated
