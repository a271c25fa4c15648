"""GGUF: a trained model and its tokenizer in one file, for llama.cpp and the tools built on it.

Names and values are those of llama.cpp's architectures "gpt2" and "llama". A tied lm_head is not
written: without it llama.cpp uses the embedding. Needs the package gguf. Knows
nothing about directories or weights on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.files.atomic import atomic_path
from gpt2c.formats.rotary import to_adjacent
from gpt2c.kernels.memory import Array
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.rope import Rope
from gpt2c.text.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["DTYPES", "write_gguf"]

# dtype -> (file type, type of the matrices), as the `gguf` package names them
DTYPES = {"f32": ("ALL_F32", "F32"), "f16": ("MOSTLY_F16", "F16"), "q8_0": ("MOSTLY_Q8_0", "Q8_0")}
BLOCK = 32  # weights of a row that share a factor in q8_0
_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}


def write_gguf(
    path: Path,
    config: GPT2Config | LlamaConfig,
    tensors: Mapping[str, Array],
    tokenizer: Tokenizer,
    dtype: str = "f32",
) -> None:
    """Write a GGUF file that llama.cpp runs.

    Parameters
    ----------
    path : the file
    config : of the model
    tensors : name -> float32 array, names and shapes of `config.parameter_shapes()`
    tokenizer : of the model; it may have fewer tokens: the file marks the model's others as unused
    dtype : of the matrices: "f32", "f16", or "q8_0" (8 bits, and one factor per 32 weights);
        vectors and positions stay float32

    Raises
    ------
    OSError : the gguf package is missing, or the file cannot be written; an existing file is
        unchanged
    ValueError : an unknown dtype, or weights or a tokenizer that the file cannot hold
    """
    try:
        import gguf
    except ImportError:
        raise OSError(f"{path}: writing GGUF needs the gguf package: pip install gguf") from None
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of a GGUF file is one of {', '.join(DTYPES)}, not {dtype}")
    for name, width in _row_lengths(config).items():
        if dtype == "q8_0" and width % BLOCK:
            raise ValueError(
                f"{path}: q8_0 needs a multiple of {BLOCK} weights in each row, and {name} is"
                f" {width}; take f16"
            )
    file_type, matrix_type = DTYPES[dtype]
    tokens, types, merges = _vocabulary(tokenizer, config.vocab_size, gguf.TokenType)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama" if isinstance(config, LlamaConfig) else "gpt2")
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, config)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer.split.name)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        start = config.start_token_id
        if start is None or tokenizer.add_bos_token:  # fine-tuned: examples begin with the end
            start = tokenizer.eot
        writer.add_bos_token_id(start)
        writer.add_eos_token_id(tokenizer.eot)
        writer.add_add_bos_token(tokenizer.add_bos_token)
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)
        for name, stored_name, tensor in _stored_tensors(config, tensors):
            is_matrix = tensor.ndim == 2 and name != "wpe.weight"
            kind = gguf.GGMLQuantizationType[matrix_type if is_matrix else "F32"]
            stored = gguf.quants.quantize(_checked(tensor, kind.name, f"{path}: {name}"), kind)
            writer.add_tensor(stored_name, stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _row_lengths(config: GPT2Config | LlamaConfig) -> dict[str, int]:
    """Return the lengths of the matrices' rows: name in the config -> numbers."""
    if isinstance(config, GPT2Config):
        return {"n_embd": config.n_embd, "n_inner": config.inner}
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.HS,
    }


def _add_shape(writer: Any, config: GPT2Config | LlamaConfig) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner)
    writer.add_block_count(config.n_layer)
    if isinstance(config, GPT2Config):
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.KV)
    writer.add_key_length(config.HS)
    writer.add_value_length(config.HS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.HS)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _stored_tensors(
    config: GPT2Config | LlamaConfig, tensors: Mapping[str, Array]
) -> Iterator[tuple[str, str, Array]]:
    """Yield name, llama.cpp's name, tensor; of a Llama parts, with adjacent pairs in q and k.

    llama.cpp has "linear" in the header and "llama3" as numbers that divide the frequencies.
    "dynamic" changes nothing in texts of up to n_positions tokens.
    """
    for name, tensor in tensors.items():
        stored = _gguf_name(name)
        if isinstance(config, LlamaConfig) and name.endswith("attn.c_attn.weight"):
            HS, NH = config.HS, config.num_attention_heads
            q, k = HS * NH, HS * (NH + config.KV)
            yield name, stored.replace("qkv", "q"), to_adjacent(tensor[:q], HS)
            yield name, stored.replace("qkv", "k"), to_adjacent(tensor[q:k], HS)
            yield name, stored.replace("qkv", "v"), tensor[k:]
        elif isinstance(config, LlamaConfig) and name.endswith("mlp.c_fc.weight"):
            gate, up = tensor[: config.inner], tensor[config.inner :]
            yield name, stored.replace("ffn_up", "ffn_gate"), gate
            yield name, stored, up
        else:
            yield name, stored, tensor
    if isinstance(config, LlamaConfig):
        scaling, shape = config.rope_scaling, (config.n_positions, config.HS, config.rope_theta)
        if scaling is not None and scaling.rope_type == "llama3":
            factors = Rope(*shape).frequencies / Rope(*shape, scaling).frequencies
            yield "rope_scaling", "rope_freqs.weight", factors.astype(np.float32)


def _gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor: h.0.ln_1.weight is blk.0.attn_norm.weight."""
    module, _, kind = name.rpartition(".")
    block = ""
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        block = f"blk.{layer}."
    return f"{block}{_NAMES[module]}.{kind}"


def _checked(tensor: Array, kind: str, source: str) -> Array:
    """Return the tensor, contiguous; refuse numbers that `kind` cannot hold."""
    largest = {"F32": np.inf, "F16": 65504.0, "Q8_0": 65504.0 * 127}[kind]
    if kind != "F32" and not (np.abs(tensor) <= largest).all():
        raise ValueError(
            f"{source} holds nan or numbers beyond {largest:g}, which {kind} cannot hold"
        )
    return np.ascontiguousarray(tensor)


def _vocabulary(
    tokenizer: Tokenizer, vocab_size: int, token_type: Any
) -> tuple[list[str], list[Any], list[str]]:
    """Return the tokens and their types, padded to the model's vocabulary, and the merges."""
    unused = tokenizer.unused_ids(vocab_size)
    vocabulary, merges = tokenizer.vocab_and_merges()
    names = {token_id: name for name, token_id in vocabulary.items()}
    tokens = [names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    types = [token_type.NORMAL] * vocab_size
    for token_id in unused:
        types[token_id] = token_type.UNUSED
    for token_id in tokenizer.special_tokens.values():
        types[token_id] = token_type.CONTROL
    # llama.cpp needs at least one merge. For a tokenizer of bytes, which has none, this one never
    # applies to a text.
    return tokens, types, merges or [f"{END_OF_TEXT} {END_OF_TEXT}"]
