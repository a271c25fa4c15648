"""What an installed gpt2c must do anywhere: learn, write, save, load; without pytest or sources.

    python tests/smoke.py [FILE.npz]    the arrays that it computed go to FILE, to be compared

`make wheel` runs it on the wheel, cibuildwheel on each of its wheels, and tests/test_installs.py
on emulated CPUs.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np

import gpt2c
from gpt2c.cli import main as cli
from gpt2c.kernels.backend import get_backend


def main() -> None:
    print("smoke: gpt2c", gpt2c.__version__, "from", gpt2c.__path__[0])
    tokenizer = gpt2c.Tokenizer.train(["hello world, hello again"], vocab_size=260)
    config = gpt2c.GPT2Config(
        n_layer=2, n_head=2, n_embd=48, n_positions=32, vocab_size=tokenizer.vocab_size
    )
    model = gpt2c.GPT2(config, seed=1337, backend=get_backend(threads=2))
    optimizer = gpt2c.AdamW(model, learning_rate=1e-2, weight_decay=0.1)
    ids = np.array(tokenizer.encode("hello world, hello again"))
    logits = model(ids[None])
    losses = []
    for _ in range(20):
        model.zero_grad()
        losses.append(model.loss(ids[None, :-1], ids[None, 1:]))
        model.backward()
        optimizer.step(grad_clip=1.0)
    assert losses[-1] < losses[0] / 4, losses
    new = model.generate([ids[:4]], max_new_tokens=8, temperature=0)[0]
    assert tokenizer.decode(new).startswith(tokenizer.decode(ids[:4]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = gpt2c.GPT2.from_pretrained(folder, backend=model.backend)
        assert all((again.parameters[n] == p).all() for n, p in model.parameters.items())
        assert (again.generate([ids[:4]], max_new_tokens=8, temperature=0)[0] == new).all()
        small = gpt2c.GPT2.from_pretrained(folder, quantize="int8")
        small.generate([ids[:4]], max_new_tokens=8, temperature=0)
    assert cli.main(["info", "--verbose"]) == 0
    if len(sys.argv) > 1:
        arrays = {"logits": logits, "losses": np.array(losses), "new": np.array(new)}
        np.savez(sys.argv[1], backend=model.backend.name, **arrays, **model.gradients)
    print(f"smoke: python {sys.version.split()[0]}, backend {model.backend.name}: it works")


if __name__ == "__main__":
    main()
