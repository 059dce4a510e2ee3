"""`PublishingTrainer`: Seq2SeqTrainer whose pushes to the Hub are those of `askd_hf.publish`."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .errors import UserError
from .hub import hub_upload
from .publish import (
    CARD,
    FIGURE,
    create_repository,
    find_results,
    publish,
    published,
    resume_advice,
    upload,
    write_card,
)

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"  # the figure is drawn from it; it isn't published
COPY_PREFIX = "_push-"  # of a checkpoint's copy, by its step


class PublishingTrainer(Seq2SeqTrainer):
    """Publishes the student, its card and its figure, where Trainer would publish all that the directory holds.

    `hub_strategy=every_save` does so for every checkpoint, in the background, `end` only when `push_to_hub` is called.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before training, so that nobody learns only after it that nothing can be pushed.

        Raises `UserError` if it can't be made, has no branch `args.hub_revision`, or if there is no processor to push.
        """
        if self.processing_class is None:
            raise UserError("push_to_hub needs the student's WhisperProcessor: give it as processing_class")
        if not self.is_world_process_zero():
            return
        for leftover in Path(self.args.output_dir).glob(f"{COPY_PREFIX}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._background = HfApi()
        self.push_in_progress: PushInProgress | None = None
        private = self.args.hub_private_repo if private is None else private
        with hub_upload("nothing can be pushed: log in with `hf auth login`, or leave out --push_to_hub"):
            self.hub_model_id = create_repository(
                self._repository(), private, token or self.args.hub_token, self.args.hub_revision
            )

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def push_advice(self, directory: str | None = None) -> str:
        """How to publish a directory, the run's own by default, from the command line as this trainer would."""
        return resume_advice(
            Path(directory or self.args.output_dir),
            self._repository(),
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future[str] | None:
        """Save the student and publish it, as `askd_hf.publish.publish` does. Arguments default to `args.hub_*`.

        Args:
            blocking: False: publish in the background.
            kwargs: what Trainer would write into its card; ignored here.

        Returns the commit's address, or with `blocking=False` its future; in other than the main process None. Raises
        `UserError` if it fails: the student is on disk, and the message says how to go on.
        """
        if kwargs:
            logger.warning("the model card fills itself in: %s ignored", ", ".join(sorted(kwargs)))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.state.global_step > 0:  # or it would hide that of an earlier run
            self.save_state()
        self.save_model()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        options: dict[str, Any] = dict(
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
        )
        where = Path(self.args.output_dir), self._repository()
        return publish(*where, **options) if blocking else HfApi().run_as_future(publish, *where, **options)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card and the figure into the run's directory. Takes Trainer's arguments and needs none."""
        if self.is_world_process_zero():
            directory = Path(self.args.output_dir)
            write_card(directory, self._repository(), find_results(directory))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's student in the background; from a copy, as old checkpoints are deleted meanwhile."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step = self.state.global_step
        copy = Path(self.args.output_dir) / f"{COPY_PREFIX}{step}"
        with training_goes_on(step, copy):
            copy_student(Path(checkpoint_folder), copy)
            write_card(copy, self.hub_model_id, results=None)
            job = self._background.run_as_future(self._upload_copy, copy, checkpoint_folder, step)
            self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _upload_copy(self, copy: Path, checkpoint_folder: str, step: int) -> None:
        with training_goes_on(step, copy), hub_upload(self.push_advice(checkpoint_folder)):
            message = f"Training in progress, step {step}"
            upload(copy, self.hub_model_id, self.args.hub_token, self.args.hub_revision, message)
            shutil.rmtree(copy, ignore_errors=True)


@contextlib.contextmanager
def training_goes_on(step: int, copy: Path) -> Iterator[None]:
    """Around a push during training: whatever fails becomes a warning, and the copy of the checkpoint is removed."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(copy, ignore_errors=True)
        logger.warning("step %d wasn't published, training goes on: %s", step, error)


def copy_student(checkpoint: Path, copy: Path) -> None:
    """What is published of a checkpoint, without card and figure, which are made anew; hard links where possible."""
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name == TRAINER_STATE or (published(file.name) and file.name not in (CARD, FIGURE)):
            try:
                os.link(file, copy / file.name)
            except OSError:  # the file system has no hard links
                shutil.copy(file, copy)
