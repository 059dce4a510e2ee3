"""`SavingTrainer`: how `ASKDTrainer` saves, loads and publishes its student."""

import contextlib
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..callbacks import AdaptiveBlendCallback
from ..data.shared_disk import of_main_process
from ..errors import UserError, saving_errors
from ..hub.publisher import HubPublisher
from ..models.lora import load_adapter
from .checkpoint_lookup import recovery_advice
from .checkpoint_saving import StudentSaver
from .model_runner import ModelRunner
from .node_disks import broadcast_weights, collect_files
from .resuming import make_due_evaluation
from .run_callbacks import StopGracefullyCallback
from .skipped_rows import SkippedRows


class SavingTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` whose checkpoints resume exactly, and whose finished student is a plain Whisper model.

    Attributes, which `ASKDTrainer` sets:
        saver: writes the student's files.
        publisher: pushes them.
        runner: the models of the run.
        blend: the loss weights and the self-teacher, which checkpoints contain.
        stop: stops the run on a signal.
        skipped: the rows of a stream that were left out.
    """

    model: WhisperForConditionalGeneration
    saver: StudentSaver
    publisher: HubPublisher
    runner: ModelRunner
    blend: AdaptiveBlendCallback
    stop: StopGracefullyCallback
    skipped: SkippedRows
    _resumed_from: str | None

    @property
    def adapter(self) -> PeftModel | None:
        return self.saver.adapter

    # ---- saving ----

    def _saving_errors(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        return saving_errors(directory, partial(recovery_advice, Path(self.args.output_dir)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student in `args.save_dtype`, for `from_pretrained`. Unlike Trainer's, it doesn't push."""
        directory = Path(output_dir or self.args.output_dir)
        with contextlib.nullcontext() if _internal_call else self._saving_errors(directory):
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.saver.save(self, Path(output_dir or self.args.output_dir), super()._save, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        skipped = self.skipped.counts(self.accelerator)
        directory = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._saving_errors(directory):
            # before Trainer writes trainer_state.json, which completes a checkpoint
            if self.args.should_save:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of a run that was resumed before this step
                self.blend.state.evaluation_due = self.stop.evaluation_due
                self.blend.save(directory)
                self.skipped.save(directory, skipped)
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json, which completes a checkpoint, is written next: wait for the files of all processes
        self.accelerator.wait_for_everyone()
        if self.args.world_size > 1:
            collect_files(Path(output_dir, f"rng_state_{self.args.process_index}.pth"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.blend.load(Path(resume_from_checkpoint))
        self.skipped.load(Path(resume_from_checkpoint), self.args.process_index)
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.adapter, Path(resume_from_checkpoint))
        self.runner.check_encoder()

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self.stop.is_due(self.blend.state, self.args):  # after the last step, without an epoch left to run
            make_due_evaluation(self, self._resumed_from, trial, None)
        # a process on another disk than the first may know none
        self.state.best_model_checkpoint = of_main_process(self.state.best_model_checkpoint)
        limit = self.args.save_total_limit
        if self.stop.stopped:  # with a limit of 1, Trainer would keep the best checkpoint, not the one to resume from
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        if self.is_world_process_zero():  # its disk has the checkpoint
            if self.adapter is None:
                super()._load_best_model()
            else:
                load_adapter(self.adapter, Path(self.state.best_model_checkpoint))
        broadcast_weights(self.model)

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before training. Raise `UserError` if it can't be pushed to."""
        if self.processing_class is None:
            raise UserError("--push_to_hub requires the student's WhisperProcessor: give it as processing_class")
        if self.is_world_process_zero():
            self.push_in_progress = None
            self.hub_model_id = self.publisher.create_repository(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future[str] | None:
        """Save the student and publish it by `askd_hf.hub.upload.publish`. Arguments default to `args.hub_*`.

        Returns:
            The commit's URL, or its future if `blocking` is False. None in all processes but the main one.

        Raises `UserError` if the upload failed. The student is saved, and the message says how to push it.
        """
        self.publisher.warn_of_ignored(kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.state.global_step > 0:  # keep the state of an earlier run in this directory
            self.save_state()
        self.save_model()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self.publisher.for_repository(self.hub_model_id or self.args.hub_model_id).publish(
            commit_message or "End of training", blocking, token, revision, private
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card and the figure into the run's directory. Trainer's arguments are ignored."""
        if self.is_world_process_zero():
            self.publisher.for_repository(self.hub_model_id or self.args.hub_model_id).write_card()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.push_in_progress = self.publisher.push_checkpoint(self, Path(checkpoint_folder))
