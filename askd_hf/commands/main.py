"""Entry point of `askd-hf`: run a subcommand.

Only the module of the chosen subcommand is imported, so that `askd-hf --help` doesn't wait for torch.
"""

import contextlib
import importlib
import sys

from .. import __version__

# subcommand -> what it does
COMMANDS = {
    "prepare": "make a dataset of a CSV file and audio files, split by speaker",
    "distill": "distill a Whisper model into a smaller one",
    "finetune": "fine-tune a Whisper model, with or without a teacher, whole or with LoRA",
    "plan": "propose window, vocabulary and layers of a student for a speed or a size",
    "evaluate": "measure error rates and speed, and compare with the teacher",
    "pseudo-label": "transcribe speech with a teacher and keep the good transcripts",
    "cache-teacher": "save the teacher's most probable tokens with the speech",
    "select-heads": "select a student's alignment heads, for word timestamps",
    "push": "publish a student on the Hub with a model card",
    "export": "convert a model to CTranslate2, ONNX, ggml or sherpa-onnx and compare the transcripts",
    "env": "print versions, devices and settings, to paste into a bug report",
}
ALIASES = {"distil": "distill"}

HELP = """usage: askd-hf [-h] [--version] COMMAND [OPTIONS]

Distill Whisper models with Adaptive Self-Knowledge Distillation.

commands:
{commands}

The options of a command: askd-hf COMMAND --help
On several GPUs: accelerate launch -m askd_hf.commands.main COMMAND [OPTIONS]
"""


def main(argv: list[str] | None = None) -> None:
    """Run the subcommand `argv[0]` with the options after it. Default: the process's command line.

    A `UserError` and an unknown command end the process with one line and status 2, Ctrl-C with status 130.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or [""]
    name = ALIASES.get(name, name)
    if name in ("-h", "--help"):
        print(help_text(), end="")
    elif name == "--version":
        print(f"askd-hf {__version__}")
    elif name in COMMANDS:
        run(name, options)
    else:
        problem = f"unknown command {name!r}" if name else "a command is missing"
        print(f"error: {problem}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def run(name: str, options: list[str]) -> None:
    from ..errors import exit_on_user_error
    from .options import HELP, show_help
    from .terminal import readable_terminal

    # env works without any package
    with exit_on_user_error(), contextlib.nullcontext() if name == "env" else readable_terminal():
        asked = [option for option in options if option in HELP]
        if name != "env" and asked:
            show_help(name, asked[0])
        importlib.import_module(f"askd_hf.commands.{name.replace('-', '_')}").main(options)


def help_text() -> str:
    width = max(map(len, COMMANDS)) + 2
    return HELP.format(commands="\n".join(f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()))


if __name__ == "__main__":
    main()
