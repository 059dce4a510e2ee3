"""Publish the student of a run on the Hub: at the end, or at every checkpoint in the background."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..config import ASKDConfig
from ..hub_access import hub_upload
from .upload import (
    CARD,
    FIGURE,
    Repository,
    create_repository,
    find_repository,
    find_results,
    publish,
    published,
    resume_advice,
    upload,
    write_card,
)

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"  # source of the figure; not published
ACCESS_ADVICE = "log in with `hf auth login`, or remove --push_to_hub"
COPY_PREFIX = "_push-"  # of the directory with the copy of a checkpoint, before its step


class HubPublisher:
    """Publishes student, card and figure of a run. Trainer itself would publish all files of the directory.

    Attributes:
        repo_id: id of the repository; without a namespace until `create_repository`, if none is given.
    """

    def __init__(self, args: ASKDConfig):
        self.args = args
        self.directory = Path(args.output_dir)
        self.repo_id: str = args.hub_model_id or self.directory.absolute().name

    def for_repository(self, repo_id: str | None) -> "HubPublisher":
        """Set the repository unless `repo_id` is None, and return this publisher."""
        self.repo_id = repo_id or self.repo_id
        return self

    def create_repository(self, token: str | None, private: bool | None) -> str:
        """Create the repository and return its id.

        Raises `UserError` if it can't be created, or the branch `args.hub_revision` doesn't exist.
        """
        for leftover in self.directory.glob(f"{COPY_PREFIX}*"):  # of an interrupted process
            shutil.rmtree(leftover, ignore_errors=True)
        self._background = HfApi()
        private = self.args.hub_private_repo if private is None else private
        with hub_upload(ACCESS_ADVICE):
            self.repo_id = create_repository(
                self.repo_id, private, token or self.args.hub_token, self.args.hub_revision
            )
        return self.repo_id

    def find_repository(self) -> Repository:
        """Look up the repository that `create_repository` would create or find. Only reads.

        Raises `UserError` as `create_repository`.
        """
        with hub_upload(ACCESS_ADVICE):
            return find_repository(
                self.repo_id, self.args.hub_private_repo, self.args.hub_token, self.args.hub_revision
            )

    def advice(self, directory: str | None = None) -> str:
        """Return how to resume publishing a directory from the command line. Default: that of the run."""
        return resume_advice(
            self.directory if directory is None else Path(directory),
            self.repo_id,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
        )

    def publish(
        self,
        commit_message: str,
        blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None,
    ) -> str | Future[str]:
        """Publish the directory of the run; see `askd_hf.hub.upload.publish`. Returns a Future if not `blocking`."""
        options: dict[str, Any] = dict(
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )
        if blocking:
            return publish(self.directory, self.repo_id, **options)
        return HfApi().run_as_future(publish, self.directory, self.repo_id, **options)

    def warn_of_ignored(self, card_arguments: dict[str, Any]) -> None:
        """Log a warning for arguments of Trainer's own model card."""
        if card_arguments:
            logger.warning("the model card is generated: %s ignored", ", ".join(sorted(card_arguments)))

    def write_card(self) -> None:
        """Write the card and the figure to the directory of the run."""
        write_card(self.directory, self.repo_id, find_results(self.directory))

    def push_checkpoint(self, trainer: Trainer, checkpoint: Path) -> PushInProgress | None:
        """Publish the student of a checkpoint in the background, and return the pushes in progress.

        Publishes a copy, because old checkpoints may be deleted during the upload. Logs a warning on failure.
        """
        pending, step = trainer.push_in_progress, trainer.state.global_step
        busy = pending is not None and not pending.is_done()
        if self.args.hub_strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return pending
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        copy = self.directory / f"{COPY_PREFIX}{step}"
        with _continue_on_failure(step, copy):
            _copy_student(checkpoint, copy)
            write_card(copy, self.repo_id, results=None)
            job = self._background.run_as_future(self._upload_copy, copy, checkpoint, step)
            return PushInProgress([*(pending.jobs if busy else []), job])
        return pending

    def _upload_copy(self, copy: Path, checkpoint: Path, step: int) -> None:
        with _continue_on_failure(step, copy), hub_upload(self.advice(str(checkpoint))):
            message = f"Training in progress, step {step}"
            upload(copy, self.repo_id, self.args.hub_token, self.args.hub_revision, message)
            shutil.rmtree(copy, ignore_errors=True)


@contextlib.contextmanager
def _continue_on_failure(step: int, copy: Path) -> Iterator[None]:
    """Log a warning instead of raising if a push during training fails, and remove the copy of the checkpoint."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(copy, ignore_errors=True)
        logger.warning("step %d wasn't published, training continues: %s", step, error)


def _copy_student(checkpoint: Path, copy: Path) -> None:
    """Copy the published files of a checkpoint except card and figure, by hard links if possible."""
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name == TRAINER_STATE or (published(file.name) and file.name not in (CARD, FIGURE)):
            try:
                os.link(file, copy / file.name)
            except OSError:  # the file system has no hard links
                shutil.copy(file, copy)
