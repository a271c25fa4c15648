"""Conversion between the files of Hugging Face, llm.c, llama2.c, nanoGPT and llama.cpp.

    a model             directory or .bin           ->   directory, .bin or .gguf
    a tokenizer         directory, .bin or a name   ->   directory or .bin
    token files         llm.c's, with a header     <->   nanoGPT's, without: format="nanogpt"

The first bytes of a file, or the names in a directory, tell what SRC is. The name of DST tells what
to write; the .bin of a GPT-2 is llm.c's, that of a Llama llama2.c's. Knows nothing about the
formats themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2c.files.atomic import check_apart, check_directory, claim_directory, matching, places
from gpt2c.files.names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    MODEL_OTHERS,
    TOKENIZER_FILES,
    TOKENIZER_OTHERS,
    check_named,
    token_file,
)
from gpt2c.formats import huggingface, llama2c, llmc
from gpt2c.formats.gguf import DTYPES as GGUF_DTYPES
from gpt2c.formats.gguf import write_gguf
from gpt2c.formats.load import config_of, find_model, model_kind
from gpt2c.formats.nanogpt import open_nanogpt, write_nanogpt
from gpt2c.model.config import ModelConfig
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.text.shards import (
    MAGIC,
    SplitName,
    StoredTokens,
    alone,
    find_shards,
    has_header,
    open_tokens,
    remove_shards,
    shard_names,
    write_shards,
    write_tokens,
)
from gpt2c.text.splits import GPT2
from gpt2c.text.tokenizer import NAMES, Tokenizer
from gpt2c.text.vocabulary import has_tokenizer

__all__ = ["DTYPES", "FORMATS", "convert"]

FORMATS = ("nanogpt",)
DTYPES = (*llmc.DTYPES, *GGUF_DTYPES)
# Suffixes of files that convert cannot write. A DST with one of them is refused: without this check
# it would become a directory.
OTHERS = {
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".safetensors",
    ".onnx",
    ".h5",
    ".msgpack",
    ".npz",
    ".npy",
}
OTHERS |= {
    ".ggml",
    ".txt",
    ".json",
    ".jsonl",
    ".toml",
    ".model",
    ".tiktoken",
    ".zip",
    ".tar",
    ".gz",
}
SHARD_TOKENS = 10**8  # as karpathy/llm.c:dev/data/fineweb.py
_KINDS = {MAGIC: "tokens", llmc.MODEL_MAGIC: "model", llmc.TOKENIZER_MAGIC: "tokenizer"}


def convert(
    src: str,
    dst: str | os.PathLike[str],
    format: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> str:
    """Convert SRC into the format that DST's name says.

    Parameters
    ----------
    src : a file, a directory, or a tokenizer's name
    dst : FILE.bin, FILE.gguf, or a directory: an existing one, a name that ends in a slash, or a
        name without the suffix of another kind of file
    format : "nanogpt" converts token files: llm.c's, with a header, to nanoGPT's, or the reverse
    dtype : of the weights in DST: fp32 (default) or bf16 for llm.c; fp32 for llama2.c; f32
        (default), f16 or q8_0 for GGUF
    overwrite : replace existing files

    Returns
    -------
    a line that says what was written; weights that are not finite cause a warning on standard error

    Raises
    ------
    OSError : a file is missing, cannot be read or written, or exists already
    ValueError : SRC is damaged, or cannot be converted to DST
    """
    check_named("SRC", src)
    check_named("DST", dst)
    directory = os.fspath(dst).endswith("/")
    source, dst = Path(src), Path(dst)
    if source.exists() and dst.exists() and source.samefile(dst):
        raise ValueError(f"{src} and {dst} are the same: name another place to write to")
    suffix = "" if directory or dst.is_dir() else dst.suffix
    if suffix.lower() in OTHERS:
        raise ValueError(
            f"{dst}: its name must say what to write, FILE.bin (llm.c's or llama2.c's), FILE.gguf"
            f" or a directory ({dst}/ is one)"
        )
    if suffix not in (".bin", ".gguf"):  # the dot of a directory's name, as in model-0.1
        suffix = ""
    if format == "nanogpt":
        _refuse_dtype(dtype, dst, "token files")
        return _convert_tokens(source, dst, suffix, overwrite)
    kinds = _kinds(src)
    if source.is_dir() and suffix == "":
        raise ValueError(
            f"{src} is a directory in Hugging Face's layout, and so would {dst} be: name a FILE.bin"
            " or FILE.gguf, or pass --format nanogpt for the token files in it"
        )
    if kinds == {"tokens"}:
        raise ValueError(
            f"{src} has only llm.c's token files: --format nanogpt writes them without a header"
        )
    if suffix == ".gguf":
        kind = "model"
    else:
        kind = _kind_of_bin(src, dst, kinds) if suffix else next(iter(kinds))
    if kind == "tokenizer":
        _refuse_dtype(dtype, dst, "a tokenizer")
        with alone(dst):
            return _convert_tokenizer(src, dst, suffix, overwrite)
    if "model" not in kinds:
        raise ValueError(f"{src} holds no model to convert into {dst}")
    with alone(dst):  # a run that trains there would continue with another model's files
        return _convert_model(source, dst, suffix, dtype, overwrite)


def _kinds(src: str) -> set[str]:
    """Return which of "model", "tokenizer" and "tokens" SRC holds."""
    path = Path(src)
    if not path.exists():
        if src in NAMES:
            return {"tokenizer"}
        raise FileNotFoundError(f"{src} does not exist, nor is it one of {', '.join(NAMES)}")
    kind = model_kind(path)
    if kind == "adapters":
        raise ValueError(f"{src} holds adapters: make one model of them with gpt2c merge")
    if path.is_dir():
        held = {
            "model": kind is not None,
            "tokenizer": has_tokenizer(path),
            "tokens": bool(find_shards(path, "train") or find_shards(path, "val")),
        }
        kinds = {kind for kind, there in held.items() if there}
        for pickle in sorted(path.glob("*.pt")) if not kinds else []:
            llmc.read_header(pickle)  # its error says what to do instead
        if not kinds:
            hidden = f"; the directory {src} here hides the tokenizer" if src in NAMES else ""
            raise ValueError(
                f"{src} holds no {CONFIG_FILE}, vocab.json or token files to convert{hidden}"
            )
        return kinds
    if kind in ("huggingface", "llama2.c"):
        return {"model"}
    start = llmc.read_header(path)[0][:4]  # which tells llm.c's files from each other
    if start == b"GGUF":
        raise ValueError(f"{src} is a GGUF file, which gpt2c can write but not read")
    magic = int.from_bytes(start, "little")
    if magic not in _KINDS:
        raise ValueError(
            f"{src} starts with none of llm.c's magic numbers: if it is a token file of nanoGPT,"
            " which has no header, pass --format nanogpt"
        )
    return {_KINDS[magic]}


def _kind_of_bin(src: str, dst: Path, kinds: set[str]) -> str:
    """Return what to write into a .bin: all that SRC holds or, of two, what DST's name says."""
    if kinds == {"tokenizer", "tokens"} and "tokenizer" not in dst.name:
        raise ValueError(
            f"{src} has a tokenizer and token files, and {dst} could be either: name it"
            " tokenizer.bin, or name a directory and pass --format nanogpt"
        )
    if "tokenizer" in dst.name and "tokenizer" not in kinds:
        raise ValueError(f"{src} has no tokenizer to convert into {dst}")
    if "tokenizer" in kinds and ("tokenizer" in dst.name or "model" not in kinds):
        return "tokenizer"
    return "model"


def _refuse_dtype(dtype: str | None, dst: Path, what: str) -> None:
    if dtype is not None:
        raise ValueError(f"--dtype {dtype} is for weights, but {dst} will hold {what}")


def _claim(
    src: str | Path, dst: Path, names: Sequence[str], overwrite: bool, others: Sequence[str] = ()
) -> None:
    """Refuse to replace DST, or the files `names` in it, unless `overwrite`; SRC stays anyhow.

    `others` are patterns of files that the later write removes from that directory.
    """
    if names:
        check_directory(dst, overwrite=True)
    paths = [dst / name for name in names] or [dst]
    there = [path for path in paths if path.exists()] + matching(dst, others)
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} exists; name another place or pass --overwrite")
    for path in there:
        check_apart(path, src)
    places(*paths)
    claim_directory(dst.parent, overwrite=True)


# ---- models --------------------------------------------------------------------------------------


def _convert_model(src: Path, dst: Path, suffix: str, dtype: str | None, overwrite: bool) -> str:
    found = find_model(src)
    if found.weights != "fp32":
        raise ValueError(
            f"{src} holds {found.weights} weights: convert the model that was quantized"
        )
    dtype = _dtype(dtype, dst, suffix, found.config)
    if suffix:
        found.config.require_language_head(f"{dst}, a file of llm.c, llama2.c or llama.cpp,")
    if suffix == ".gguf" and not has_tokenizer(src):
        mend = f"put one beside it, with gpt2c convert TOKENIZER {src}"
        if not src.is_dir():
            mend = (
                f"make a directory of both first, with gpt2c convert {src} DIR and gpt2c convert"
                " TOKENIZER DIR"
            )
        raise ValueError(f"{src} has no tokenizer, which a GGUF file needs too: {mend}")
    _claim(src, dst, () if suffix else MODEL_FILES, overwrite, () if suffix else MODEL_OTHERS)
    if not suffix and has_tokenizer(dst):
        _check_sizes(dst, Tokenizer.from_pretrained(dst), found.config)
    model = Model(found.config, seed=None)
    model.load_parameters(found.tensors, found.source)
    if suffix == ".bin":
        if isinstance(found.config, LlamaConfig):
            llama2c.write_model(dst, found.config, model.parameters)
            what = "llama2.c's model"
        else:
            llmc.write_model(dst, found.config, model.parameters, dtype)
            what = "llm.c's model"
    elif suffix == ".gguf":
        tokenizer = Tokenizer.from_pretrained(src)
        write_gguf(dst, found.config, model.parameters, tokenizer, dtype)
        what = "GGUF"
    else:
        huggingface.save_weights(dst, found.config.to_dict(), model.parameters)
        what = "Hugging Face's model"
    _warn(src, dst, model)
    more = "" if suffix else _missing_tokenizer(dst)
    return f"{dst}: {what}, {model.config.num_parameters():,} parameters, {dtype}{more}"


def _dtype(dtype: str | None, dst: Path, suffix: str, config: ModelConfig) -> str:
    """Return the dtype to write, by default the first that the format has."""
    if suffix == ".bin":
        known = ["fp32"] if isinstance(config, LlamaConfig) else [*llmc.DTYPES]
    else:
        known = [*GGUF_DTYPES] if suffix == ".gguf" else []
    if dtype is not None and dtype not in known:
        takes = f"takes {', '.join(known)}" if known else "is float32"
        raise ValueError(f"{dst} {takes}, not --dtype {dtype}")
    return dtype or (known[0] if known else "float32")


def _warn(src: Path, dst: Path, model: Model) -> None:
    """Warn about weights that are not finite; a user may still want to inspect them in DST."""
    lost = [name for name, tensor in model.parameters.items() if not np.isfinite(tensor).all()]
    if lost:
        others = f" and {len(lost) - 1} more" if lost[1:] else ""
        print(
            f"gpt2c: warning: {src} and {dst} have nan or infinity in {lost[0]}{others}: the model"
            " has diverged or is damaged",
            file=sys.stderr,
        )


def _check_sizes(dst: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a directory whose tokenizer would have more tokens than its model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{dst} would have a tokenizer of {tokenizer.vocab_size:,} tokens and a model of"
            f" {config.vocab_size:,}, which do not belong together: name another directory"
        )


def _missing_tokenizer(dst: Path) -> str:
    """Return a hint for a directory without a tokenizer, else ""."""
    return "" if has_tokenizer(dst) else f"; no tokenizer yet: gpt2c convert TOKENIZER {dst}"


# ---- tokenizers ----------------------------------------------------------------------------------


def _convert_tokenizer(src: str, dst: Path, suffix: str, overwrite: bool) -> str:
    others = () if suffix else TOKENIZER_OTHERS
    _claim(src, dst, () if suffix else TOKENIZER_FILES, overwrite, others)
    if Path(src).is_file():
        tokenizer = Tokenizer(*llmc.read_tokenizer(src))
    elif Path(src).is_dir():
        tokenizer = Tokenizer.from_pretrained(src)
    else:
        tokenizer = Tokenizer.from_name(src)
    if suffix:
        if tokenizer.split != GPT2:
            raise ValueError(
                f"{src} cuts texts as {tokenizer.split.name} does, and llm.c's tokenizer only as"
                " GPT-2: name a directory"
            )
        unused = set(tokenizer.unused_ids(tokenizer.vocab_size))  # the file names every id
        tokens = [
            f"[PAD{token_id}]".encode() if token_id in unused else tokenizer.token_bytes(token_id)
            for token_id in range(tokenizer.vocab_size)
        ]
        llmc.write_tokenizer(dst, tokens, tokenizer.eot)
        return f"{dst}: llm.c's tokenizer, {len(tokens):,} tokens"
    if (dst / CONFIG_FILE).exists():
        with huggingface.naming_config(dst):
            config = config_of(huggingface.read_config(dst)[0])
        _check_sizes(dst, tokenizer, config)
    try:
        tokenizer.save_pretrained(dst)
    except ValueError as error:
        raise ValueError(
            f"{src}: its ids are not in the order of BPE merges, so the merges that Hugging Face's"
            f" files need are unknown: {error}"
        ) from None
    return f"{dst}: Hugging Face's tokenizer, {tokenizer.vocab_size:,} tokens"


# ---- token files ---------------------------------------------------------------------------------


def _convert_tokens(src: Path, dst: Path, suffix: str, overwrite: bool) -> str:
    """Add llm.c's header to nanoGPT's token files, or write llm.c's without it."""
    if src.suffix in llmc.PICKLES:
        llmc.read_header(src)
    if src.is_dir() == (suffix == ".bin") or suffix == ".gguf":
        raise ValueError(
            f"{src} and {dst}: name two directories of token files, or a FILE.bin for each"
        )
    if not src.is_dir():
        headed, shards = _open_tokens([src])
        _claim(src, dst, (), overwrite)
        if headed:
            write_nanogpt(dst, shards)
        else:
            write_tokens(dst, shards[0])
        return f"{dst}: {_describe(headed, shards)}"
    splits: tuple[SplitName, ...] = ("train", "val")
    found = {split: _open_tokens(paths) for split in splits if (paths := find_shards(src, split))}
    if not found:
        raise FileNotFoundError(f"{src} has no token files {' or '.join(map(token_file, splits))}")
    there = [path for split in splits for path in find_shards(dst, split)]
    names = [path.name for path in there] or [token_file("val")]
    _claim(src, dst, names, overwrite, [MANIFEST_FILE])
    dst.mkdir(exist_ok=True)
    coming = [
        name
        for split, (headed, shards) in found.items()
        for name in shard_names(split, len(shards[0]), 0 if headed else SHARD_TOKENS)
    ]
    with alone(dst):
        remove_shards(dst, coming)
        for split, (headed, shards) in found.items():  # val is last, as in `gpt2c prepare`
            if headed:
                write_nanogpt(dst / token_file(split), shards)
            else:
                write_shards(dst, split, shards[0], SHARD_TOKENS)
    written = "; ".join(f"{split}: {_describe(*found[split])}" for split in found)
    return f"{dst}: {written}{_missing_tokenizer(dst)}"


def _open_tokens(paths: list[Path]) -> tuple[bool, list[StoredTokens]]:
    """Open the files of a split; return whether they have llm.c's header, and their tokens."""
    headed = has_header(paths[0])
    if not headed and len(paths) > 1:
        raise ValueError(
            f"{paths[0]} and {paths[1]}: nanoGPT has one file for train and one for val, not more"
        )
    return headed, [open_tokens(path) if headed else open_nanogpt(path) for path in paths]


def _describe(headed: bool, shards: list[StoredTokens]) -> str:
    layout = "nanoGPT's, without a header" if headed else "llm.c's"
    return f"{sum(map(len, shards)):,} tokens, {layout}"
