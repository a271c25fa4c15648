"""gpt2c: train and run GPT-2 on an ordinary CPU, on C kernels.

text -> Tokenizer -> token files -> Batches -> GPT2: forward, loss, backward -> AdamW -> checkpoint
-> generate -> text

Letters, everywhere: B batch, T time, C channels, V vocabulary, L layers, NH heads, HS head size, OC
output channels. Losses are in nats per token.
"""

from gpt2c import ops
from gpt2c.backend import backends
from gpt2c.config import GPT2Config
from gpt2c.engine import Engine
from gpt2c.generator import Generator
from gpt2c.model import GPT2
from gpt2c.optimizer import AdamW, Schedule
from gpt2c.quantized import QuantizedGPT2
from gpt2c.sampling import GenerationConfig
from gpt2c.tokenizer import Tokenizer

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
    "ops",
]
__version__ = "0.1.0"
