"""Names of files, each defined only here: of a model, a tokenizer, token files and a run."""

import os
from pathlib import Path

__all__ = [
    "ADAPTER_FILES",
    "ADDED_FILE",
    "CHAT_TEMPLATE_FILE",
    "CHECKPOINTS",
    "CONFIG_FILE",
    "CONFUSION_FILE",
    "DAMAGED_FILE",
    "EVENTS",
    "GENERATION_FILE",
    "INDEX_FILE",
    "LOSS_FILE",
    "MANIFEST_FILE",
    "MERGES_FILE",
    "METRICS_FILE",
    "MODEL_FILES",
    "MODEL_OTHERS",
    "MOMENTS_FILE",
    "REFERENCE_FILE",
    "RESULT_FILE",
    "ROLES_FILE",
    "ROLLOUTS",
    "RUNS_FILE",
    "RUN_FILE",
    "STATE_FILE",
    "TOKENIZER_CONFIG_FILE",
    "TOKENIZER_FILE",
    "TOKENIZER_FILES",
    "TOKENIZER_OTHERS",
    "VOCAB_FILE",
    "WEIGHTS_FILE",
    "check_named",
    "meant",
    "token_file",
]

# the adapters of a model, as in PEFT
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# a model, as in transformers
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The files that a save writes, and patterns of others that it removes: a reader may prefer those.
MODEL_FILES = (CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE)
MODEL_OTHERS = (INDEX_FILE, "model-[0-9]*-of-[0-9]*.safetensors", *ADAPTER_FILES)

# a tokenizer, as in transformers
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
ROLES_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (VOCAB_FILE, MERGES_FILE, TOKENIZER_CONFIG_FILE)  # see MODEL_FILES
TOKENIZER_OTHERS = (TOKENIZER_FILE, ADDED_FILE, CHAT_TEMPLATE_FILE)

# a directory of token files
MANIFEST_FILE = "manifest.json"

# a run
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = f"{METRICS_FILE}.damaged"
CHECKPOINTS = "checkpoints"  # a directory of models, without a tokenizer of their own
STATE_FILE = "state.json"  # of a checkpoint; it lists the files beside it with their checksums
MOMENTS_FILE = "trainer.safetensors"
EVENTS = "tensorboard"
LOSS_FILE = "loss.png"
RUNS_FILE = "plot.png"
RESULT_FILE = "result.json"
REFERENCE_FILE = "reference.jsonl"  # of dpo: log-probabilities by the base
ROLLOUTS = "rollouts"  # of grpo: a directory of completions that a run learns from
CONFUSION_FILE = "confusion.png"  # of a classifier


def token_file(split: str, shard: int = 0) -> str:
    """Return the name of the token file of a split, train or val, or of its n-th shard."""
    return f"{split}_{shard:06d}.bin" if shard else f"{split}.bin"


def check_named(what: str, name: str | os.PathLike[str]) -> None:
    """Refuse an empty name, which as a path would be the current directory.

    Raises
    ------
    ValueError : `name` is empty; `what` names it in the error
    """
    if not os.fspath(name):
        raise ValueError(f"{what} is empty: is a variable of the shell not set?")


def meant(path: Path, file: str) -> str:
    """Return a question for an error if `path` lacks a file that directories in it have, else "".

    It names those written last.
    """
    if not path.is_dir() or (path / file).exists():
        return ""
    found = [(each.stat().st_mtime, str(each.parent)) for each in path.glob(f"*/{file}")]
    names = [name for _, name in sorted(found, reverse=True)[:3]]
    return f"; did you mean {' or '.join(names)}?" if names else ""
