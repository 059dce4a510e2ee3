r"""Convert a Whisper model to CTranslate2, ONNX, ggml or sherpa-onnx, and compare its transcripts.

The steps of `askd-hf export`:

    pip install 'askd-hf[export]'
    python examples/export.py --model runs/student --output_dir student-ct2 --dataset my_speech

All options: --help.
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("export")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.export import compare, convert, load_clips, load_model

    model, processor = load_model(args)
    clips = load_clips(args, processor)  # None without --dataset

    # the directory that faster_whisper.WhisperModel loads, transformers.js with --to onnx, whisper.cpp with --to ggml,
    # sherpa-onnx with --to sherpa-onnx
    convert(args, model, processor)

    # transcripts of transformers and of the other runtime on the same clips
    if clips is not None:
        compare(args, model, processor, clips)
    else:
        print("Not compared with transformers: give speech with --dataset")


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
