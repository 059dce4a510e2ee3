"""Runs that end with their best checkpoint, without and with LoRA, on a disk of each process.

Each process writes into PROCESS.json what it has at the end: its best checkpoint, its step and its trained weights.
"""

import faulthandler
import json
from pathlib import Path

import torch
from models import make_processor, make_whisper
from peft import LoraConfig
from training import Clips, collate, options

from askd_hf import ASKDConfig, ASKDTrainer
from askd_hf.training.run_dir import exit_non_main_processes

SAVING = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=None)
BEST = dict(load_best_model_at_end=True, metric_for_best_model="loss", predict_with_generate=False)

if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where it is
    seen = {}
    for name in ("whole", "lora"):
        student = make_whisper(make_processor(), decoder_layers=2)
        adapter = LoraConfig(r=2, target_modules=r".*decoder.*(q_proj|v_proj)") if name == "lora" else None
        torch.manual_seed(0)
        trainer = ASKDTrainer(
            model=student,
            args=ASKDConfig(**options(name, preset="ce", learning_rate=0.5, **SAVING, **BEST)),
            train_dataset=Clips(student.config),
            eval_dataset=Clips(student.config, 8, seed=5),
            data_collator=collate,
            peft_config=adapter,
        )
        trainer.train()
        weights = {n: p.flatten().tolist() for n, p in trainer.model.named_parameters() if p.requires_grad}
        seen[name] = {"best": trainer.state.best_model_checkpoint, "weights": weights}
    Path(f"{trainer.args.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    exit_non_main_processes()
