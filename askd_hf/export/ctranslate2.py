"""A trained Whisper for other runtimes: CTranslate2, which faster-whisper runs."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.writable import check_writable
from ..data import SAMPLING_RATE
from ..errors import UserError, disk_errors
from ..evaluation.metrics import error_rates
from ..models.generation_config import existing_heads

FASTER_WHISPER_WINDOW = 30  # seconds; it takes no model with another one
EXAMPLES = 5  # of differing texts that a report shows


def check_output_dir(output_dir: str | Path) -> Path:
    """The directory to write. Raises `UserError` if something is there already: nothing is overwritten."""
    path = Path(output_dir)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"--output_dir {output_dir} is there already; name another, or remove it first")
    check_writable(path, "--output_dir")
    return path


def check_extra() -> None:
    """Raise `UserError` if what the export needs isn't installed."""
    try:
        import ctranslate2  # noqa: F401
        import faster_whisper  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the export needs ctranslate2 and faster-whisper ({error}): install them with "
            "pip install 'askd-hf[export]'"
        ) from error


# ---- to CTranslate2 ----


def alignment_heads(model: WhisperForConditionalGeneration) -> list[list[int]] | None:
    """The heads, (layer, head), that word timestamps are read from: those that the model names, if it has them all."""
    heads = getattr(model.generation_config, "alignment_heads", None)  # a generation config holds what its file held
    return existing_heads(heads, model.config.decoder_layers, model.config.decoder_attention_heads)


def export_ctranslate2(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    output_dir: str | Path,
    quantization: str | None = None,
) -> None:
    """Write `model` as a directory for `faster_whisper.WhisperModel`, weights by CTranslate2's own converter.

    The alignment heads are those of the model's generation config. Without any, or with some that the model doesn't
    have, the directory has none: faster-whisper then refuses `word_timestamps=True`, where the converter's guess (all
    heads of the last layers) would give times of unknown worth, and heads of missing layers would crash it.

    Args:
        quantization: type of the weights, as CTranslate2 names them: "float16", "int8", ...; None keeps the model's.

    Raises:
        UserError: `output_dir` isn't empty or can't be written.
    """
    from ctranslate2.converters import TransformersConverter

    class Loaded(TransformersConverter):
        """Converts what is loaded already."""

        def load_model(self, *args: Any, **kwargs: Any) -> WhisperForConditionalGeneration:
            return model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return processor.tokenizer

    output_dir = check_output_dir(output_dir)
    with disk_errors(f"--output_dir {output_dir}"):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        # an interrupted export leaves nothing that looks like a whole one
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as unfinished:
            directory, source = Path(unfinished) / "model", Path(unfinished) / "source"
            model.config.save_pretrained(source)  # which it reads again
            Loaded(str(source)).convert(str(directory), quantization=quantization)
            config_file = directory / "config.json"
            config = json.loads(config_file.read_text(encoding="utf-8"))
            config.pop("alignment_heads", None)
            if heads := alignment_heads(model):
                config["alignment_heads"] = heads
            config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            processor.tokenizer.save_pretrained(directory)
            processor.feature_extractor.save_pretrained(directory)
            directory.replace(output_dir)


# ---- the same clips through both ----


@torch.inference_mode()
def transcribe_transformers(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clips: Iterable[np.ndarray]
) -> list[str]:
    """Greedy, without timestamps, one clip at a time; the language and task are those of `set_language`.

    Args:
        clips: float32 mono at 16 kHz, `(samples,)` each, within the model's window.
    """
    greedy = copy.deepcopy(model.generation_config)
    greedy.update(num_beams=1, do_sample=False)
    greedy.return_timestamps = False
    # beside the prompt; CTranslate2 gives a text half of the decoder's positions at most
    greedy.max_length = model.config.max_target_positions // 2
    texts = []
    for clip in clips:
        features = input_features(processor, clip).to(model.device, model.dtype)
        mask = torch.ones_like(features[:, 0]).long()
        tokens = model.generate(features, attention_mask=mask, generation_config=greedy)
        texts += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def transcribe_ctranslate2(
    directory: str | Path, processor: WhisperProcessor, clips: Iterable[np.ndarray], positions: int
) -> list[str]:
    """The same with the converted model, given the same features: what differs is due to the conversion.

    Args:
        positions: of the decoder, `max_target_positions`.
    """
    import ctranslate2

    model = ctranslate2.models.Whisper(str(directory), device="cpu")
    prompt = processor.tokenizer.prefix_tokens
    texts = []
    for clip in clips:
        features = ctranslate2.StorageView.from_array(input_features(processor, clip).numpy())
        result = model.generate(features, [prompt], beam_size=1, max_length=positions)[0]
        texts.append(processor.tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True))
    return texts


def transcribe_faster_whisper(
    directory: str | Path, clips: Iterable[np.ndarray], language: str, task: str
) -> list[str]:
    """The same with the converted model in faster-whisper, which makes features of its own."""
    import faster_whisper

    model = faster_whisper.WhisperModel(str(directory), device="cpu")
    # its second thoughts (other temperatures, no speech after all) aren't the model's
    options = dict(beam_size=1, temperature=0.0, without_timestamps=True, condition_on_previous_text=False)
    options |= dict(no_speech_threshold=None, log_prob_threshold=None, compression_ratio_threshold=None)
    texts = []
    for clip in clips:
        segments, _ = model.transcribe(clip, language=language, task=task, **options)
        texts.append("".join(segment.text for segment in segments))
    return texts


def input_features(processor: WhisperProcessor, clip: np.ndarray) -> torch.Tensor:
    """`(1, mel bins, frames)`."""
    return processor.feature_extractor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features


@dataclass
class Agreement:
    """A runtime's texts beside those of transformers.

    Attributes:
        runtime: what the report calls it.
        texts: of each clip its name, what transformers heard, what the runtime heard.
        wer: of the runtime's texts with those of transformers as the references, percent, both normalized. None if
            transformers heard no word.
    """

    runtime: str
    texts: list[tuple[str, str, str]]
    wer: float | None

    @property
    def differing(self) -> list[tuple[str, str, str]]:
        return [texts for texts in self.texts if texts[1] != texts[2]]

    def __str__(self) -> str:
        count, differing = len(self.texts), self.differing
        if not differing:
            return f"{self.runtime}: the same text as transformers in all {count} clips"
        lines = [f"{self.runtime}: another text than transformers in {len(differing)} of {count} clips"]
        if self.wer is not None:
            lines[0] += f"; WER between the two {self.wer:.2f} %"
        width = max(len("transformers"), len(self.runtime)) + 1
        for clip, *heard in differing[:EXAMPLES]:
            lines.append(f"  {clip}")
            for runtime, text in zip(("transformers", self.runtime), heard, strict=True):
                lines.append(f"    {runtime + ':':<{width}} {text}")
        if len(differing) > EXAMPLES:
            lines.append(f"  ... and {len(differing) - EXAMPLES} more")
        return "\n".join(lines)


def agreement(
    runtime: str, names: list[str], expected: list[str], heard: list[str], normalize: Callable[[str], str]
) -> Agreement:
    """Compare a runtime's texts with those of transformers; blanks at either end of a text don't count."""
    texts = [(name, ours.strip(), theirs.strip()) for name, ours, theirs in zip(names, expected, heard, strict=True)]
    wer = None
    if any(normalize(ours).strip() for _, ours, _ in texts):
        wer = error_rates([theirs for _, _, theirs in texts], [ours for _, ours, _ in texts], normalize)["wer"]
    return Agreement(runtime, texts, wer)
