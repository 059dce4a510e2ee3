"""`PublishingTrainer`: Seq2SeqTrainer whose pushes to the Hub are those of `askd_hf.publish`."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .errors import UserError
from .hub import hub_upload
from .publish import create_repository, publish, published, resume_advice, upload, write_card

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"  # the figure is drawn from it; it isn't published


class PublishingTrainer(Seq2SeqTrainer):
    """Publishes the student, its card and its figure, where Trainer would publish all that the directory holds.

    `hub_strategy=every_save` does so for every checkpoint, in the background, `end` only when `push_to_hub` is called.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before training, so that nobody learns only after it that it can't be made."""
        if not self.is_world_process_zero():
            return
        self._background = HfApi()
        self.push_in_progress = None
        private = self.args.hub_private_repo if private is None else private
        with hub_upload("nothing can be pushed: log in with `hf auth login`, or leave out --push_to_hub"):
            self.hub_model_id = create_repository(self._repository(), private, token or self.args.hub_token)

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """Save the student and publish it, as `askd_hf.publish.publish` does. Arguments default to `args.hub_*`.

        Returns the commit's address, in other than the main process None. Raises `UserError` if it fails: the student
        is on disk, and the message says how to go on.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_state()
        self.save_model()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return publish(
            Path(self.args.output_dir),
            self._repository(),
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card and the figure into the run's directory. Takes Trainer's arguments and needs none."""
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir), self._repository())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's student in the background; from a copy, as old checkpoints are deleted meanwhile."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copy = Path(tempfile.mkdtemp(prefix="_push-", dir=self.args.output_dir))
        for file in Path(checkpoint_folder).iterdir():
            if published(file.name) or file.name == TRAINER_STATE:
                shutil.copy(file, copy)
        write_card(copy, self.hub_model_id)
        job = self._background.run_as_future(self._upload_copy, copy, checkpoint_folder, self.state.global_step)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _upload_copy(self, copy: Path, checkpoint_folder: str, step: int) -> None:
        """Training goes on whatever becomes of it."""
        try:
            with hub_upload(resume_advice(Path(checkpoint_folder), self.hub_model_id)):
                message = f"Training in progress, step {step}"
                upload(copy, self.hub_model_id, self.args.hub_token, self.args.hub_revision, message)
        except UserError as error:
            logger.warning("step %d wasn't published, training goes on: %s", step, error)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
