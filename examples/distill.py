r"""Distill a Whisper model into a smaller one: the steps of `askd-hf distill`, to read and to change.

    python examples/distill.py --teacher openai/whisper-large-v3
    python examples/distill.py --teacher openai/whisper-small --language fr \
        --dataset my_speech --eval_splits validation --num_train_epochs 10

All options: --help. On several GPUs: accelerate launch examples/distill.py ...
"""

from askd_hf.commands.options import parse
from askd_hf.commands.terminal import readable_terminal
from askd_hf.errors import exit_on_user_error


def main() -> None:
    # the options of the command line, of the YAML file given by --config, and the defaults, in this order
    parsed = parse("distill")

    # imported after the options, as --help needs none of it
    from askd_hf.commands.distill import (
        Options,
        fill_caches,
        load_models,
        load_speech,
        make_trainer,
        prepare_run,
        recover_pruned_encoder,
        reduce_vocabulary,
        select_layers,
        train,
    )
    from askd_hf.commands.dry_run import dry_run
    from askd_hf.commands.report import report
    from askd_hf.commands.select_heads import select_heads_after_training
    from askd_hf.hub.provenance import Provenance

    options = Options(*parsed)

    # with --dry_run, the steps up to training, a few measured ones, and the plan of the run
    if options.run.dry_run:
        return dry_run(options)

    # mistakes in the options are found before anything is loaded
    checkpoint = prepare_run(options)

    # the teacher, the student made of its encoder and some of its decoder layers, and the processor
    models = load_models(options)

    # with --vocabulary, only the tokens that the training transcripts need
    models = reduce_vocabulary(options, models)

    # training and evaluation speech, every clip checked, and the collator that makes batches of it
    speech = load_speech(options, models)

    # with --layer_selection greedy the teacher's loss on training clips decides which layers the student has
    options, models = select_layers(options, models, speech, checkpoint)
    origin = Provenance.of(options.model, options.data, models.teacher, models.student)  # for the model card

    # an encoder that lost layers is first trained to give the outputs of the whole encoder, on audio alone
    recover_pruned_encoder(options, models, speech, origin)

    # outputs of the frozen encoder and the teacher's most probable tokens are computed once
    models, speech = fill_caches(options, models, speech)

    # first teacher and labels, then labels alone, or with --self_weight also the self-teacher
    trainer = make_trainer(options, models, speech, origin)
    del models  # the trainer frees the teacher after its phase
    train(trainer, checkpoint)

    # the attention heads that give the times of words are those whose times are nearest to the teacher's
    if options.run.select_alignment_heads:
        select_heads_after_training(trainer, options.model, speech.splits, speech.train)

    # WER of student, student before training and teacher; a transcript; the model card; the push to the Hub
    report(trainer, options.model, options.data, speech.splits, speech.train)


if __name__ == "__main__":
    with exit_on_user_error(), readable_terminal():
        main()
