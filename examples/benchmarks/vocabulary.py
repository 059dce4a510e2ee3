r"""What a smaller vocabulary costs before any training, on speech with other words than the training transcripts.

    python examples/benchmarks/vocabulary.py --model openai/whisper-tiny.en --dataset my_speech \
        --eval_dataset other_speech --sizes 6000 10000 20000

The model is reduced as by `--vocabulary N` and not trained. It writes words that are no longer tokens in pieces, which
it has rarely seen. Training transcripts have no such words, so training doesn't teach it either.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from askd_hf.arguments.parser import as_arguments, parse_args
from askd_hf.errors import exit_on_user_error


@dataclass
class Arguments:
    """The model, the training transcripts, and the speech to transcribe."""

    model: str = field(metadata={"help": "Directory or Hub id of a Whisper model."})
    dataset: list[str] = field(metadata={"help": "Directories whose transcripts decide which tokens are kept."})
    eval_dataset: str = field(metadata={"help": "Directory with the speech to transcribe."})
    eval_splits: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    language: str = field(default="english", metadata={"help": "Language of the speech."})
    sizes: list[int] = field(
        default_factory=lambda: [6_000, 10_000, 20_000], metadata={"help": "Numbers of tokens. All tokens come last."}
    )
    min_count: int = field(default=1, metadata={"help": "As --vocabulary_min_count of askd-hf distill."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Transcribe only that many clips."})
    max_duration_in_seconds: float = field(default=30.0, metadata={"help": "Leave out longer clips."})


def main() -> None:
    (args,) = parse_args((Arguments,), prog="python examples/benchmarks/vocabulary.py", description=__doc__)

    from askd_hf.commands import evaluate
    from askd_hf.data.json_files import read_json
    from askd_hf.models.loading import load_processor, load_whisper
    from askd_hf.training.student_vocabulary import reduce_student

    rows = list(transcripts(args.dataset, args.language))
    options = {
        "dataset": args.eval_dataset,
        "eval_splits": args.eval_splits,
        "language": args.language,
        "max_duration_in_seconds": str(args.max_duration_in_seconds),
        "max_eval_samples": "null" if args.max_eval_samples is None else str(args.max_eval_samples),
    }
    table = ["tokens  set                     WER, %  capped, %  words"]
    with tempfile.TemporaryDirectory() as directory:
        for size in [*args.sizes, None]:
            model, processor = load_whisper(args.model), load_processor(args.model)
            if size is not None:
                model, processor.tokenizer = reduce_student(
                    str(size), model, processor.tokenizer, rows, args.min_count
                )
            folder = Path(directory) / str(size)
            model.save_pretrained(folder / "model")
            processor.save_pretrained(folder / "model")
            evaluate.main(as_arguments({**options, "model": str(folder / "model"), "output_dir": str(folder)}))
            for one in read_json(folder / "results.json")["sets"]:
                scores = one["scores"]["student"]
                rates = f"{scores['wer']:6.1f}  {scores['capped_wer']:9.1f}"
                table.append(f"{model.config.vocab_size:6,}  {one['name']:22}  {rates}  {one['reference_words']:5,}")
    print(*table, sep="\n")


def transcripts(datasets: list[str], language: str) -> Iterator[dict[str, str]]:
    """Yield the training transcripts as they are trained on: `text`, `language` and `task`."""
    from askd_hf.data import clean_texts, load_speech_dataset
    from askd_hf.data.languages import with_language

    for name in datasets:
        speech = with_language(load_speech_dataset(name, None, "train"), language, None, name)
        yield from clean_texts(speech, "auto", name).select_columns(["text", "language", "task"])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
