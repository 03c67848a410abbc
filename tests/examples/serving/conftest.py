"""A flow map and a GPT-2 to serve."""

import pytest
import torch
from small_models import build_model
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_flm.trainers import train_tokenizer


LENGTH = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A flow map and a GPT-2 with random weights, the same tokenizer, and their folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["the cat sat on a mat and saw dogs run far away by day or night"], "word", 40)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fmlm = build_model("fmlm", vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ends)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=LENGTH, **sizes, **ends)).eval()
    for name, model in {"fmlm": fmlm, "gpt2": gpt2}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"fmlm": fmlm, "gpt2": gpt2, "tokenizer": tokenizer, "folder": folder}
