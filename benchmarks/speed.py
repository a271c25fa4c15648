"""The picture of training speed in the README: rows of `gpt2c bench train`, and llm.c beside them.

gpt2c bench train --shape 4x64 --shape 1x1024 --backends avx512,torch,torch-tuned --json a.json
OMP_NUM_THREADS=2 ./llmc 4 64 3 | tail -1 >> llmc.txt       # see llmc.c; a line for each shape
python benchmarks/speed.py a.json llmc.txt benchmarks/results/speed.png

A row that lacks a shape is drawn as "not measured".
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from gpt2c.train.plot import plot_speed


def main() -> None:
    measured, peer, picture = map(Path, sys.argv[1:])
    content = json.loads(measured.read_text())
    groups: dict[str, dict[str, float]] = {}
    for result in content["results"]:
        if "median" in result:
            tokens = result["facts"]["tokens"] / result["median"]
            groups.setdefault(result["group"], {})[result["row"]] = tokens
    for shape, tokens in re.findall(r"(\d+ x \d+): .* ([\d.]+) tokens/s", peer.read_text()):
        groups.setdefault(f"train {shape}", {})["llm.c"] = float(tokens)
    title = "GPT-2 124M, fp32, AdamW included\n" + content["machine"][0].split(";")[0]
    title += f", {content['date'][:10]}"
    plot_speed(groups, "tokens a second", picture, title)


if __name__ == "__main__":
    main()
