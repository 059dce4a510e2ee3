"""Publish a distilled student on the Hub, with a model card: the same as `askd-hf push`.

    python examples/push.py --model_dir runs/my-student --repo_id you/my-student

Log in with `hf auth login` first, or set HF_TOKEN. Run the same command again after a failed push.
"""

from askd_hf.arguments.parser import parse_args
from askd_hf.commands.push import OPTIONS, push
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse_args(OPTIONS)
    push(args)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
