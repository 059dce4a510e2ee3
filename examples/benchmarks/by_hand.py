r"""The error rate of a student without this package: jiwer on the texts of `pipeline`.

    python examples/benchmarks/by_hand.py --model runs/my-english-student --folder my_speech/test --max_seconds 6

It is that of `askd-hf evaluate`, up to clips in which Whisper's own normalizer takes a punctuation mark for a word, or
leaves nothing of the reference.
"""

import argparse
import csv
from pathlib import Path

import jiwer
import librosa
from tqdm.auto import tqdm
from transformers import AutoTokenizer, pipeline
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Directory or Hub id of an English-only model.")
    parser.add_argument("--folder", type=Path, required=True, help="Folder with metadata.csv: file_name, transcripts.")
    parser.add_argument("--text_column_name", default="transcription", help="Column of the transcripts.")
    parser.add_argument("--max_seconds", type=float, default=30.0, help="Leave out longer clips.")
    parser.add_argument("--num_beams", type=int, default=1, help="1 for greedy decoding. Default of pipeline: 5.")
    args = parser.parse_args()
    transcribe = pipeline("automatic-speech-recognition", model=args.model)
    normalize = EnglishTextNormalizer(AutoTokenizer.from_pretrained(args.model).english_spelling_normalizer or {})
    with (args.folder / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    references, texts = [], []
    for row in tqdm(rows):
        wave, rate = librosa.load(args.folder / row["file_name"], sr=16_000)
        if len(wave) <= args.max_seconds * rate:
            texts.append(normalize(transcribe(wave, generate_kwargs={"num_beams": args.num_beams})["text"]))
            references.append(normalize(row[args.text_column_name]))
    if not references:
        parser.error(f"--max_seconds {args.max_seconds:g}: all {len(rows)} clips are longer")
    aligned = [jiwer.process_words(*pair) for pair in zip(references, texts, strict=True)]
    errors = [clip.substitutions + clip.deletions + clip.insertions for clip in aligned]
    words = [len(reference.split()) for reference in references]
    capped = sum(map(min, errors, words))
    print(f"{len(words)} clips, {sum(words):,} words")
    print(f"WER {100 * jiwer.wer(references, texts):.2f} %, capped per clip {100 * capped / sum(words):.2f} %")


if __name__ == "__main__":
    main()
