r"""Cache a teacher's soft labels with the speech: the steps of `askd-hf cache-teacher`.

    python examples/cache_teacher.py --teacher openai/whisper-large-v3 --teacher_cache_dir speech-by-large-v3
    python examples/distill.py --student my-student --dataset speech-by-large-v3

To resume an interrupted run, repeat the command. All options: --help. On several GPUs:
accelerate launch examples/cache_teacher.py ...
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    model_args, data_args, cache_args, push_args, config = parse("cache-teacher")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.cache_teacher import check_run, label, load_models, push_labels
    from askd_hf.training.caches import check_caches

    # mistakes in the options are found before anything is loaded
    check_run(model_args, data_args, cache_args, push_args, config)

    # the teacher; with --student it is mapped to the student's vocabulary
    teacher, processor = load_models(model_args, data_args)
    check_caches(cache_args, model_args, config, teacher.config.vocab_size)

    # the speech with the teacher's most probable tokens at every label token
    labeled = label(teacher, processor, model_args, data_args, cache_args, config)
    push_labels(labeled, cache_args, push_args)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
