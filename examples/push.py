"""Publish a distilled student on the Hub, with a model card: the same as `askd-hf push`.

    python examples/push.py --model_dir runs/my-student --repo_id you/my-student

Log in with `hf auth login` first, or set HF_TOKEN. Run the same command again after a failed push.
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("push")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.push import push

    push(args)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
