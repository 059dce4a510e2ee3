r"""Propose a student that is as fast or as small as required: the steps of `askd-hf plan`, to read and to change.

python examples/plan.py --teacher openai/whisper-base --speedup 5 --dataset my_speech
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    (args,) = parse("plan")

    # imported after the options, as --help needs none of it
    import torch

    from askd_hf.commands.plan import command, confirm, describe_domain, measure, print_plan, verdict
    from askd_hf.evaluation.planning import candidates, reaching, teacher_is_estimated
    from askd_hf.models.loading import load_config, load_processor

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config, processor = load_config(args.teacher), load_processor(args.teacher)

    # durations of the clips, the tokens of their transcripts
    domain = describe_domain(args, config, processor)

    # seconds of features, encoder, decoder layers and projection at each size, with random weights
    costs = measure(args, config, processor, domain)

    # every student that can be made, and those that reach the target, the ones that lose least first
    found = candidates(config, costs, domain.durations, domain.vocabularies)
    good = reaching(found, args.speedup, args.max_parameters)
    print_plan(args, good, costs)

    # the first of them that also reaches it as a whole
    best, speedup = confirm(args, config, processor, good, costs)
    estimated = teacher_is_estimated(config, costs)
    print(verdict(args, best, speedup, estimated), command(args, domain, best), sep="\n\n")


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
