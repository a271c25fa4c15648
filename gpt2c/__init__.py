"""gpt2c: train and run GPT-2 on an ordinary CPU, on C kernels.

text -> Tokenizer -> token files -> Batches -> GPT2: forward, loss, backward -> AdamW -> checkpoint
-> generate -> text

Letters, everywhere: B batch, T time, C channels, V vocabulary, L layers, NH heads, HS head size, OC
output channels. Losses are in nats per token.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from gpt2c.kernels import (
    limits as limits,  # now: the cores are those from before others bind this thread
)

if TYPE_CHECKING:
    from gpt2c import ops
    from gpt2c.generate.engine import Engine
    from gpt2c.generate.sampling import GenerationConfig
    from gpt2c.generator import Generator
    from gpt2c.gpt2 import GPT2, QuantizedGPT2, from_pretrained
    from gpt2c.kernels.backend import backends
    from gpt2c.model.config import GPT2Config
    from gpt2c.text.tokenizer import Tokenizer
    from gpt2c.train.optimizer import AdamW, Schedule

__all__ = [
    "GPT2",
    "AdamW",
    "Engine",
    "GPT2Config",
    "GenerationConfig",
    "Generator",
    "QuantizedGPT2",
    "Schedule",
    "Tokenizer",
    "backends",
    "from_pretrained",
    "ops",
]
__version__ = "0.1.0"

# Where each name is from; what is not used is not imported, and the command line begins at once.
_HOMES = {
    "GPT2": "gpt2",
    "AdamW": "train.optimizer",
    "Engine": "generate.engine",
    "GPT2Config": "model.config",
    "GenerationConfig": "generate.sampling",
    "Generator": "generator",
    "QuantizedGPT2": "gpt2",
    "Schedule": "train.optimizer",
    "Tokenizer": "text.tokenizer",
    "backends": "kernels.backend",
    "from_pretrained": "gpt2",
}


def __getattr__(name: str) -> Any:
    """Import a name of the package, or a module of it, when it is asked for."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"gpt2c.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"gpt2c.{name}"):
        return importlib.import_module(f"gpt2c.{name}")
    raise AttributeError(f"module 'gpt2c' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
