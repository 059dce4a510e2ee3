"""The demo's teacher in a shape that whisper.cpp runs, and so all runtimes."""

import copy
import json
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

ENGLISH = 51864  # tokens of OpenAI's English-only models
SPECIAL = {  # of them
    "<|endoftext|>": 50256,
    "<|startoftranscript|>": 50257,
    "<|en|>": 50258,
    "<|translate|>": 50357,
    "<|transcribe|>": 50358,
    "<|startoflm|>": 50359,
    "<|startofprev|>": 50360,
    "<|nospeech|>": 50361,
    "<|notimestamps|>": 50362,
}


def with_english_ids(tokenizer: WhisperTokenizer, directory: Path) -> WhisperTokenizer:
    """The same text tokens, the special tokens at the ids of OpenAI's English-only models, and fillers between."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    text = {token: i for token, i in state["model"]["vocab"].items() if token not in SPECIAL}
    taken = {*text.values(), *SPECIAL.values()}
    fillers = {f"<{i}>": i for i in range(SPECIAL["<|notimestamps|>"]) if i not in taken}
    state["model"]["vocab"] = text | SPECIAL | fillers
    for token in state["added_tokens"]:
        token["id"] = SPECIAL[token["content"]]
    for name, token in state["post_processor"]["special_tokens"].items():
        token["ids"] = [SPECIAL[name]]
    file.write_text(json.dumps(state), encoding="utf-8")
    return WhisperTokenizer.from_pretrained(directory)


def with_english_shape(teacher: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """The same model with wide feed-forward layers and 51,864 tokens. What the teacher lacks is zero."""
    config = copy.deepcopy(teacher.config)
    config.vocab_size, wide = ENGLISH, 4 * config.d_model
    config.encoder_ffn_dim = config.decoder_ffn_dim = wide
    config.eos_token_id = config.bos_token_id = config.pad_token_id = SPECIAL["<|endoftext|>"]
    config.decoder_start_token_id = SPECIAL["<|startoftranscript|>"]
    model = WhisperForConditionalGeneration(config)
    padded = {}
    for name, weight in teacher.state_dict().items():
        size = model.state_dict()[name].shape
        padded[name] = torch.zeros(size)
        padded[name][tuple(slice(length) for length in weight.shape)] = weight
    rows = teacher.model.decoder.embed_tokens.weight
    for old, new in zip(range(296, 305), SPECIAL.values(), strict=True):
        padded["model.decoder.embed_tokens.weight"][old] = 0
        padded["model.decoder.embed_tokens.weight"][new] = rows[old]
    padded["proj_out.weight"] = padded["model.decoder.embed_tokens.weight"]
    model.load_state_dict(padded)
    generation = model.generation_config = copy.deepcopy(teacher.generation_config)
    generation.eos_token_id = generation.bos_token_id = generation.pad_token_id = SPECIAL["<|endoftext|>"]
    generation.decoder_start_token_id = SPECIAL["<|startoftranscript|>"]
    generation.no_timestamps_token_id = SPECIAL["<|notimestamps|>"]
    return model.eval()
