"""transformers' way of reading a text, for the benchmark. Imported only where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
import transformers
from numpy.typing import NDArray

from gpt2c.checkpoint import TRANSPOSED
from gpt2c.config import GPT2Config


def transformers_reader(
    config: GPT2Config,
    parameters: Mapping[str, NDArray[Any]],
    what: str,
    texts: NDArray[Any],
    some: int,
) -> Callable[[], Any]:
    """Give a call as `gpt2c.worker`'s: it reads a prompt, or a token more of each text (B, T)."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict())).eval()
    state = {
        f"transformer.{name}": torch.from_numpy(p.T if name.endswith(TRANSPOSED) else p)
        for name, p in parameters.items()
    }
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    ids, T, calls = torch.from_numpy(texts).long(), texts.shape[1], count()

    def read(tokens: Any, cache: Any) -> Any:
        with torch.inference_mode():
            return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    if what == "prefill":
        return lambda: read(ids, None).logits[0, 0].numpy()
    cache = read(ids, None).past_key_values

    def step() -> Any:
        number = next(calls)
        if number and number % some == 0:
            cache.crop(-some)
        return read(ids[:, number % some % T, None], cache).logits[:, 0].numpy()

    return step
