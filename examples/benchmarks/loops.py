r"""Two ways against loops that askd-hf doesn't have: on-policy batches, and a larger weight of the end of a text.

    python examples/benchmarks/loops.py --on_policy_ratio 0.25 --teacher openai/whisper-tiny.en --dataset my_speech \
        --teacher_cache_dir cache/my_speech-by-tiny --encoder_cache_dir cache/encoder --output_dir runs/on-policy
    python examples/benchmarks/loops.py --end_of_text_weight 3 --teacher openai/whisper-tiny.en --dataset my_speech

In an on-policy batch the student samples a text for each clip, and learns the teacher's distribution at each of its
tokens (GKD, Agarwal et al. 2024, here with --divergence). The teacher takes the output of the student's encoder, which
is the teacher's own, cut to the student's window. The other options are those of `askd-hf distill`.
"""

import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from askd_hf.arguments.parser import parse_args
from askd_hf.commands import distill
from askd_hf.data import TEACHER_COLUMNS
from askd_hf.errors import exit_on_user_error
from askd_hf.hub.provenance import Provenance
from askd_hf.objective import TopK
from askd_hf.projection import at_positions, label_positions
from askd_hf.schedule import BlendWeights
from askd_hf.trainer import ASKDTrainer
from askd_hf.training import loss_sums

TOP_K = 32  # tokens of the teacher's distribution, as in the cached labels


@dataclass
class Arguments:
    """The two ways."""

    on_policy_ratio: float = field(default=0.0, metadata={"help": "Share of on-policy batches."})
    end_of_text_weight: int = field(default=1, metadata={"help": "Weight of the end of a text in the loss."})


class OnPolicyTrainer(ASKDTrainer):
    """Train on texts of the student in some batches of the teacher phase.

    Args:
        scorer: the teacher, which scores the texts. Its encoder isn't run.
        ratio: share of on-policy batches, from a fifth of the run on. Before that, a student of few layers writes
            random text.
        end_weight: weight of the end-of-text token in the loss, relative to other tokens.
    """

    def __init__(self, *args: Any, scorer: WhisperForConditionalGeneration, ratio: float, end_weight: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.scorer, self.ratio, self.end_weight = scorer.eval().requires_grad_(False), ratio, end_weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._is_on_policy():
            written = self._written(inputs)
            total, terms, _ = self.runner.run(model, written, BlendWeights(teacher=1.0), self.blend)
            self.train_sums += loss_sums.sums_by_clip(terms, written["labels"], written["label_positions"]).sum(0)
            # as if it had as many tokens as the labels that it replaces
            total = total * len(inputs["label_positions"]) / max(len(written["label_positions"]), 1)
            return loss_sums.mean_over_tokens(total, len(inputs["label_positions"]), num_items_in_batch)
        positions = inputs["label_positions"]
        ends = positions[at_positions(inputs["labels"], positions) == self.model.config.eos_token_id]
        weighted = torch.cat([positions, *[ends] * (self.end_weight - 1)])
        return super().compute_loss(model, inputs | {"label_positions": weighted}, return_outputs, num_items_in_batch)

    def _is_on_policy(self) -> bool:
        step = self.state.global_step
        in_phase = step >= self.state.max_steps / 5 and self.blend.weights.teacher > 0.0
        return in_phase and random.Random(f"{self.args.seed} {step}").random() < self.ratio

    @torch.no_grad()
    def _written(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with sampled texts as labels, and the teacher's distribution at their tokens."""
        inputs = {name: value for name, value in inputs.items() if name != "no_speech"}  # the teacher scores all texts
        batch = self.runner.model_inputs(inputs)
        with self.accelerator.autocast():
            self.runner.encode(self.model, batch, with_states=False)
        encoded = BaseModelOutput(batch["encoder_outputs"][0])
        last_of_prompt = self.model.generation_config.no_timestamps_token_id
        prompt = int((inputs["decoder_input_ids"][0] == last_of_prompt).long().argmax()) + 1
        longest = min(round(1.5 * inputs["labels"].shape[1]) + 8, self.model.config.max_target_positions)
        tokens = self._sample(encoded, inputs["decoder_input_ids"][:, :prompt], longest)
        labels, is_end = tokens[:, 1:].clone(), tokens[:, 1:] == self.model.config.eos_token_id
        labels[is_end.cumsum(1) - is_end.long() > 0] = -100  # after the first end of text
        labels[:, : prompt - 1] = -100
        with self.accelerator.autocast():
            logits = self.scorer(encoder_outputs=encoded, decoder_input_ids=tokens[:, :-1]).logits
        k = min(TOP_K, logits.shape[-1] - 1)
        target = TopK.from_logits(logits.flatten(0, 1), labels.flatten().clamp(min=0), k, self.args.temperature)
        columns = {
            name: column.unflatten(0, labels.shape) for name, column in zip(TEACHER_COLUMNS, target, strict=True)
        }
        columns |= {"labels": labels, "decoder_input_ids": tokens[:, :-1], "label_positions": label_positions(labels)}
        return inputs | columns

    def _sample(self, encoded: BaseModelOutput, tokens: Tensor, longest: int) -> Tensor:
        """Return the prompts `(batch, prompt)` with texts after them, `(batch, tokens)`."""
        generator = torch.Generator(tokens.device).manual_seed(self.args.seed * 100_003 + self.state.global_step)
        cache, step, end = EncoderDecoderCache(DynamicCache(), DynamicCache()), tokens, self.model.config.eos_token_id
        self.model.eval()
        while tokens.shape[1] < longest and not (tokens[:, -1] == end).all():
            outputs = self.model(
                encoder_outputs=encoded, decoder_input_ids=step, past_key_values=cache, use_cache=True
            )
            step = torch.multinomial(outputs.logits[:, -1].float().softmax(-1), 1, generator=generator)
            step[tokens[:, -1] == end] = end
            tokens = torch.cat([tokens, step], 1)
        self.model.train()
        return tokens


def main() -> None:
    prog = "python examples/benchmarks/loops.py"
    args, *parsed = parse_args((Arguments, *distill.OPTIONS), prog=prog, description=__doc__)
    options = distill.Options(*parsed)
    checkpoint = distill.prepare_run(options)
    models = distill.reduce_vocabulary(options, distill.load_models(options))
    teacher = models.teacher
    speech = distill.load_speech(options, models)
    options, models = distill.select_layers(options, models, speech, checkpoint)
    origin = Provenance.of(options.model, options.data, models.teacher, models.student)
    models, speech = distill.fill_caches(options, models, speech)
    trainer_class = partial(
        OnPolicyTrainer, scorer=teacher, ratio=args.on_policy_ratio, end_weight=args.end_of_text_weight
    )
    distill.train(distill.make_trainer(options, models, speech, origin, trainer_class), checkpoint)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
