"""The models and the prompts: shapes of Llama 3.1 with random weights whose answers depend on every KV cell."""

from __future__ import annotations

import json
import random
from pathlib import Path

CONTEXTS = (50, 1000, 2000, 8000, 16_000, 24_000, 32_000, 64_000, 96_000, 128_000)
CHUNK = 256
COMPILATION = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}  # vLLM's, when it is not eager
TAIL = 20  # new tokens behind a context that was seen before
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    rope_theta=500000.0,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    bos_token_id=128000,
    eos_token_id=128001,
)
SIZE_8B = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)
SIZE_70B = dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)
FP8_WEIGHTS = dict(quantization_config=dict(quant_method="fp8", activation_scheme="dynamic"))
MODELS = {"llama-3.1-8b": LLAMA | SIZE_8B, "llama-3.1-70b-fp8": LLAMA | SIZE_70B | FP8_WEIGHTS}


def token_bytes(model: str) -> int:
    """K and V of one token in bfloat16, all layers."""
    shape = MODELS[model]
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2


def write_model(directory: Path, model: str) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[model]))
    return str(directory)


def write_vocabulary(directory: Path, size: int) -> None:
    """A tokenizer.json of `size` tokens, each of them text: common words are one token, whatever else goes byte by byte,
    and no text makes the others, but a model may answer with them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tokendepot.bench.ttft.words import WORDS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([" " + word for word in WORDS], trainer)
    whole = json.loads(tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    for number in range(len(vocabulary), size):
        vocabulary[f"token{number}"] = number
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def repetitions(context: int) -> int:
    """What is over in 50 ms takes one engine twice as long as the next: several, so that a median says something."""
    return 9 if context <= 1000 else 3 if context <= 16_000 else 1


def prompt(context: int, repetition: int | str) -> list[int]:
    return random.Random(f"prompt {context} {repetition}").choices(range(1000, 127_000), k=context)


def tail(context: int, repetition: int, which: int) -> list[int]:
    return random.Random(f"tail {context} {repetition} {which}").choices(range(1000, 127_000), k=TAIL)


def spread_weights(model) -> int:
    """Runs in the worker: dummy weights of vLLM answer the same whatever the KV cache holds; these do not."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(20261124)
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            if "norm" in name or "scale" in name:
                weights.fill_(1.0)
            elif weights.dim() == 2:
                spread = 1.0 if "embed" in name else (2.0 if "qkv" in name else 1.0) / weights.shape[1] ** 0.5
                values = torch.empty_like(weights, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)
                weights.copy_(values)  # 8-bit types cannot be filled at random themselves
    torch.cuda.synchronize()
    return sum(1 for _ in model.parameters())
