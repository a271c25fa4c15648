"""Kinds of models beside each other on the demo's text: loss, speed, and the cache of a token.

    python benchmarks/kinds.py             # about 5 minutes each
    python benchmarks/kinds.py --steps 200

All have the demo's recipe, layers, channels and text. The loss is of the held-out text, the speed
the median over the steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from gpt2c.cli.demo import VOCABULARY
from gpt2c.files.names import METRICS_FILE
from gpt2c.text.corpus import python_documentation
from gpt2c.text.prepare import prepare
from gpt2c.text.tokenizer import Tokenizer
from gpt2c.train.metrics import read_metrics
from gpt2c.train.pretrain import train
from gpt2c.train.settings import TrainSettings, recipe_settings

ROWS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"arch": "llama"},
    "llama, 1 head of keys and values": {"arch": "llama", "n_kv_head": 1},
}


def main() -> None:
    """Train each kind and print a table in Markdown."""
    parser = argparse.ArgumentParser(description="kinds of models beside each other")
    parser.add_argument("--steps", type=int, help="steps of each (the demo's 4,000)")
    steps = parser.parse_args().steps
    given = {} if steps is None else {"max_iters": steps}
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "data")
        prepare(python_documentation(), data, f"bpe:{VOCABULARY}")
        vocab_size = Tokenizer.from_pretrained(data).vocab_size
        for name, kind in ROWS.items():
            settings = recipe_settings("demo", kind | given)
            run = Path(directory, name.replace(" ", "-"))
            result = train(data, run, settings)
            entries = read_metrics(run / METRICS_FILE)
            speed = statistics.median(entry["tokens_per_second"] for entry in entries)
            config = TrainSettings(**settings).model_config(vocab_size)
            lines.append(
                f"| {name} | {config.num_parameters():,} | {result.val_loss:.3f} | {speed:,.0f}"
                f" | {4 * config.cache_floats():,} |"
            )
    print("\n| | parameters | loss, nats/token | tokens/s | bytes of cache a token |")
    print("|---|---:|---:|---:|---:|", *lines, sep="\n")


if __name__ == "__main__":
    main()
