"""Train and run GPT-2 and Llama on an ordinary CPU, on C kernels.

Text becomes token ids, a model learns them, and writes text again:

    Tokenizer                 text to token ids, and back
    GPT2, Llama               models: loss, gradients, logits, texts of token ids
    GPT2Config, LlamaConfig   their shapes; RopeScaling: a Llama whose texts have become longer
    from_pretrained           a model of any kind, from a directory or the hub
    AdamW, Schedule           the steps of training, and the learning rate of each
    Dropout, LoRA             training against learning by heart; training a small part
    Generator, Chat           a model and its tokenizer: text to text; a conversation
    GenerationConfig          how the next token is chosen
    Engine                    many requests that share one model
    Classifier                labels of texts
    gpt2c.scoring             how good a model is
    gpt2c.finetune            from a base model to one that does what is asked
    gpt2c.ops, backends       the kernels on NumPy arrays, and the sets of them that run here

Each has an example in its help, such as help(gpt2c.Tokenizer). Losses are in nats per token.
Letters of shapes: B batch, T time, C channels, V vocabulary, L layers, NH heads, HS head size, OC
output channels. The first file to read is gpt2c/plain.py, a GPT-2 in plain NumPy.

Examples
--------
>>> import gpt2c
>>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
>>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
>>> model, ids = gpt2c.GPT2(config, seed=1), tokenizer.encode("hello world")
>>> optimizer = gpt2c.AdamW(model, learning_rate=0.01)
>>> for step in range(50):
...     model.zero_grad()
...     loss = model.loss([ids[:-1]], [ids[1:]])
...     model.backward()
...     norm = optimizer.step()
>>> gpt2c.Generator(model, tokenizer).generate("hello", max_new_tokens=6, temperature=0)
' world'
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from gpt2c.kernels import (
    limits as limits,  # first: it reads this thread's cores before other libraries bind the thread
)

if TYPE_CHECKING:
    from gpt2c import ops
    from gpt2c.chat import Chat
    from gpt2c.evaluate.classifier import Classifier
    from gpt2c.generate.engine import Engine
    from gpt2c.generate.sampling import GenerationConfig
    from gpt2c.generator import Generator
    from gpt2c.gpt2 import GPT2, QuantizedGPT2
    from gpt2c.kernels.backend import backends
    from gpt2c.llama import Llama
    from gpt2c.model.block import Dropout
    from gpt2c.model.gpt2 import GPT2Config
    from gpt2c.model.llama import LlamaConfig
    from gpt2c.model.lora import LoRA
    from gpt2c.model.rope_scaling import RopeScaling
    from gpt2c.pretrained import from_pretrained
    from gpt2c.text.tokenizer import Tokenizer
    from gpt2c.train.optimizer import AdamW, Schedule

__all__ = [
    "GPT2",
    "AdamW",
    "Chat",
    "Classifier",
    "Dropout",
    "Engine",
    "GPT2Config",
    "GenerationConfig",
    "Generator",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "QuantizedGPT2",
    "RopeScaling",
    "Schedule",
    "Tokenizer",
    "backends",
    "from_pretrained",
    "ops",
]
__version__ = "0.1.0"

# The module of each name. It is imported at the first use, so the command line starts at once.
_HOMES = {
    "GPT2": "gpt2",
    "AdamW": "train.optimizer",
    "Chat": "chat",
    "Classifier": "evaluate.classifier",
    "Dropout": "model.block",
    "Engine": "generate.engine",
    "GPT2Config": "model.gpt2",
    "GenerationConfig": "generate.sampling",
    "Generator": "generator",
    "Llama": "llama",
    "LlamaConfig": "model.llama",
    "LoRA": "model.lora",
    "QuantizedGPT2": "gpt2",
    "RopeScaling": "model.rope_scaling",
    "Schedule": "train.optimizer",
    "Tokenizer": "text.tokenizer",
    "backends": "kernels.backend",
    "from_pretrained": "pretrained",
}


def __getattr__(name: str) -> Any:
    """Import a name of the package, or a module of it, at its first use."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"gpt2c.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"gpt2c.{name}"):
        return importlib.import_module(f"gpt2c.{name}")
    raise AttributeError(f"module 'gpt2c' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [name for name in __all__ if name != "QuantizedGPT2"]  # an old name, which warns
