"""What the export to every runtime needs: a new directory, and a comparison with the transcripts of transformers."""

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..arguments.writable import check_writable
from ..data import SAMPLING_RATE, Limits, filter_invalid_clips, load_speech_dataset
from ..data.audio import waveform
from ..data.text import without_times
from ..errors import UserError, disk_errors
from ..evaluation.metrics import error_rates
from ..models.generation_config import no_timestamps
from ..progress import progress

MAX_EXAMPLES = 5  # differing texts shown in a report
Transcriber = Callable[[np.ndarray], str]  # from a waveform at 16 kHz, float32, `(samples,)`, to its text


def check_output_dir(output_dir: str | Path) -> Path:
    """Return the path of the output directory. Raises `UserError` if it exists and isn't empty, or isn't writable."""
    path = Path(output_dir)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"--output_dir {output_dir} already exists. Use another directory, or remove it first")
    check_writable(path, "--output_dir")
    return path


@contextlib.contextmanager
def atomic_output_dir(output_dir: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield an empty directory, renamed to `output_dir` when the block ends, and one for temporary files.

    If the block fails, both are removed. Raises `UserError` as `check_output_dir` does, and if the disk is full.
    """
    path = check_output_dir(output_dir)
    with disk_errors(f"--output_dir {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as unfinished:
            directory, parts = Path(unfinished) / "model", Path(unfinished) / "parts"
            directory.mkdir()
            parts.mkdir()
            yield directory, parts
            directory.replace(path)


class Clip(NamedTuple):
    """A clip to compare transcripts on."""

    name: str
    wave: np.ndarray  # 16 kHz, float32, `(samples,)`
    text: str  # the transcript of the dataset


def load_clips(dataset: str, config: str | None, split: str, max_samples: int, window: float) -> list[Clip]:
    """Return up to `max_samples` clips, the first of the split.

    Clips that are invalid, or longer than `window` seconds, are left out with a warning that names them. Raises
    `UserError` if none is left.
    """
    speech = without_times(load_speech_dataset(dataset, config, split), None)
    first, limits = speech.select(range(min(max_samples, len(speech)))), Limits(window, skip_long=True)
    rows = filter_invalid_clips(first, None, limits, on_bad_audio="skip", split=split)
    return [Clip(row["clip"], waveform(row), row["text"] or "") for row in rows]


class Transcripts(NamedTuple):
    """What the texts of a runtime are compared with."""

    clips: list[Clip]
    texts: list[str]  # of transformers
    language: str  # the code
    normalize: Callable[[str], str]  # for the WER
    seconds: float  # that transformers took

    def compare(self, runtime: str, transcribe: Transcriber) -> str:
        """Transcribe the clips, and return the texts that differ, the WER and the time of both.

        Args:
            transcribe: has loaded its model, which isn't timed, and uses as many threads as torch.
        """
        start = time.perf_counter()
        texts = [transcribe(wave) for wave in progress([clip.wave for clip in self.clips], runtime)]
        seconds = {"transformers": self.seconds, runtime: time.perf_counter() - start}
        names, references = ([getattr(clip, name) for clip in self.clips] for name in ("name", "text"))
        lines = [str(agreement(runtime, names, self.texts, texts, self.normalize))]
        lines.append(word_errors({"transformers": self.texts, runtime: texts}, references, self.normalize))
        taken = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        threads = torch.get_num_threads()
        lines.append(
            f"{len(names)} clips, one at a time, {threads} thread{'s' * (threads > 1)}, without loading: {taken}"
        )
        return "\n".join(filter(None, lines))


def transformers_transcriber(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> Transcriber:
    """Return a function that transcribes a clip of at most one window: greedy, without timestamps.

    Language and task are those of `set_language`.
    """
    greedy = copy.deepcopy(model.generation_config)
    greedy.update(num_beams=1, do_sample=False, **no_timestamps(model))
    greedy.return_timestamps = False
    # without the prompt; CTranslate2 limits the text to half of the decoder's positions
    greedy.max_length = model.config.max_target_positions // 2

    @torch.inference_mode()
    def transcribe(clip: np.ndarray) -> str:
        features = input_features(processor, clip).to(model.device, model.dtype)
        mask = torch.ones_like(features[:, 0]).long()
        tokens = model.generate(features, attention_mask=mask, generation_config=greedy)
        return processor.tokenizer.decode(tokens[0], skip_special_tokens=True)

    return transcribe


def input_features(processor: WhisperProcessor, clip: np.ndarray) -> torch.Tensor:
    """Return the features of a clip, `(1, mel bins, frames)`."""
    return processor.feature_extractor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features


@dataclass
class Agreement:
    """Comparison of the texts of a runtime with those of transformers.

    Attributes:
        texts: for each clip its name, the text of transformers and the text of the runtime.
        wer: WER of the runtime with the texts of transformers as references, in percent, both normalized. None if all
            texts of transformers are empty.
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
            return f"{self.runtime}: same text as transformers for all {count} clips"
        lines = [f"{self.runtime}: different text than transformers for {len(differing)} of {count} clips"]
        if self.wer is not None:
            lines[0] += f"; WER against transformers {self.wer:.2f} %"
        width = max(len("transformers"), len(self.runtime)) + 1
        for clip, *texts in differing[:MAX_EXAMPLES]:
            lines.append(f"  {clip}")
            for runtime, text in zip(("transformers", self.runtime), texts, strict=True):
                lines.append(f"    {runtime + ':':<{width}} {text}")
        if len(differing) > MAX_EXAMPLES:
            lines.append(f"  ... and {len(differing) - MAX_EXAMPLES} more")
        return "\n".join(lines)


def agreement(
    runtime: str, names: list[str], expected: list[str], predicted: list[str], normalize: Callable[[str], str]
) -> Agreement:
    """Compare the texts of a runtime with those of transformers, without leading and trailing spaces.

    Args:
        expected, predicted: texts of transformers and of the runtime.
        normalize: text normalizer for the WER.
    """
    texts = [(name, one.strip(), other.strip()) for name, one, other in zip(names, expected, predicted, strict=True)]
    wer = None
    if any(normalize(reference).strip() for _, reference, _ in texts):
        wer = error_rates([text for _, _, text in texts], [reference for _, reference, _ in texts], normalize)["wer"]
    return Agreement(runtime, texts, wer)


def word_errors(texts: dict[str, list[str]], references: list[str], normalize: Callable[[str], str]) -> str | None:
    """Return a line with the WER of each runtime against the dataset's transcripts. None if all are empty.

    Args:
        texts: the transcripts of the clips by the name of the runtime.
    """
    if not any(normalize(reference).strip() for reference in references):
        return None
    rates = {runtime: error_rates(found, references, normalize)["wer"] for runtime, found in texts.items()}
    listed = ", ".join(f"{runtime} {rate:.2f} %" for runtime, rate in rates.items())
    return f"WER against the transcripts of the dataset, {len(references)} clips: {listed}"
