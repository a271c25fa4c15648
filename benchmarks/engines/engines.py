"""The engines of the race: each continues GPT-2 124M greedily, at its best setting on few threads.

    decode(prompts, n) -> (rows of n + 1 tokens, seconds of the last n)
    prefill(tokens) -> seconds until the logits of the last position are there, the cache filled

Prompts of a call are of one length. The files that they read are made by models.py.
"""

import os
import pathlib
import time

MODELS = pathlib.Path(os.environ.get("ENGINES_MODELS", "engines-models"))
THREADS = int(os.environ.get("ENGINES_THREADS", "2"))
VOCAB, POSITIONS, LAYERS, HEADS, HEAD = 50257, 1024, 12, 12, 64
LONG = 512  # tokens of the long prompt


class Transformers:
    """transformers, eager, fp32: the loop of generate() without its bookkeeping."""

    def __init__(self):
        import torch
        from transformers import GPT2LMHeadModel

        self.torch, self.guard = torch, torch.inference_mode
        torch.set_num_threads(THREADS)
        self.model = GPT2LMHeadModel.from_pretrained(
            MODELS / "gpt2", dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def cache(self, rows, room):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def forward(self, ids, cache):
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    prompt = step = forward

    def decode(self, prompts, n):
        torch = self.torch
        with self.guard():
            ids = torch.tensor(prompts)
            cache = self.cache(len(ids), ids.shape[1] + n)
            tokens = [self.prompt(ids, cache)]
            start = time.perf_counter()
            for _ in range(n):
                tokens.append(self.step(tokens[-1], cache))
            seconds = time.perf_counter() - start
        return torch.cat(tokens, 1).tolist(), seconds

    def prefill(self, tokens):
        torch = self.torch
        with self.guard():
            ids = torch.tensor([tokens])
            cache = self.cache(1, len(tokens))
            start = time.perf_counter()
            self.prompt(ids, cache)
            return time.perf_counter() - start


class TransformersCompiled(Transformers):
    """The same with torch.compile over a decode step on a static cache, weights frozen and packed.

    Autotuning matters: MKL, which torch calls otherwise, is slow on an AMD, and Inductor's own C++
    kernels are not. A prompt is eager, as in generate(), but the long one is compiled too.
    """

    ROOM = 128  # the cache's length is a multiple of this

    def __init__(self):
        super().__init__()
        import torch._inductor.config

        torch = self.torch
        torch._inductor.config.freezing = True
        self.step = torch.compile(
            self.forward, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs"
        )
        self.guard = torch.no_grad  # freezing wants this rather than inference_mode
        self.caches = {}

    def cache(self, rows, room):
        from transformers import StaticCache

        room = -(-room // self.ROOM) * self.ROOM
        if (rows, room) not in self.caches:
            made = StaticCache(config=self.model.config, max_cache_len=room)
            made.early_initialization(
                rows, HEADS, HEAD, self.torch.float32, self.torch.device("cpu")
            )
            self.caches[rows, room] = made
        self.caches[rows, room].reset()
        return self.caches[rows, room]

    def prompt(self, ids, cache):
        return (self.step if ids.shape[1] == LONG else self.forward)(ids, cache)


class OnnxRuntime:
    """ONNX Runtime on the graph of models.py: the cache is bound once, and written in place."""

    def __init__(self, kind):
        import numpy as np
        import onnxruntime as ort

        self.np = np
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = str(MODELS / f"onnx/gpt2-{kind}.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.caches = {}

    def cache(self, rows, room):
        np = self.np
        room = -(-room // 128) * 128
        if (rows, room) not in self.caches:
            shape = rows, HEADS, room, HEAD
            names = [f"{what}_{i}" for i in range(LAYERS) for what in ("key", "value")]
            self.caches[rows, room] = {name: np.zeros(shape, np.float32) for name in names}
        return self.caches[rows, room]

    def bind(self, rows, length, cache):
        """A call of one shape: arrays to write to, the array of logits, and the call."""
        np = self.np
        binding = self.session.io_binding()
        arrays = {
            "input_ids": np.zeros((rows, length), np.int64),
            "position_ids": np.zeros(length, np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_length": np.zeros(1, np.int32),
        }
        logits = np.zeros((rows, VOCAB), np.float32)
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in cache.items():
            binding.bind_input(
                "past_" + name, "cpu", 0, array.dtype, array.shape, array.ctypes.data
            )
            binding.bind_output(
                "present_" + name, "cpu", 0, array.dtype, array.shape, array.ctypes.data
            )
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

        def call(ids, past):
            arrays["input_ids"][:] = ids
            arrays["position_ids"][:] = range(past, past + length)
            arrays["seqlens_k"][:] = past + length - 1
            arrays["total_length"][:] = past + length
            self.session.run_with_iobinding(binding)
            return logits

        return call

    def decode(self, prompts, n):
        np = self.np
        ids = np.array(prompts)
        rows, length = ids.shape
        cache = self.cache(rows, length + n)
        tokens = [self.bind(rows, length, cache)(ids, 0).argmax(1)]
        step = self.bind(rows, 1, cache)
        start = time.perf_counter()
        for i in range(n):
            tokens.append(step(tokens[-1][:, None], length + i).argmax(1))
        seconds = time.perf_counter() - start
        return np.stack(tokens, 1).tolist(), seconds

    def prefill(self, tokens):
        ids = self.np.array([tokens])
        call = self.bind(1, len(tokens), self.cache(1, len(tokens)))
        start = time.perf_counter()
        call(ids, 0).argmax(1)
        return time.perf_counter() - start


class CTranslate2:
    """CTranslate2's Generator, whose loop is inside: the callback for each new token is timed.

    Prefill is a generation of one token, which computes the logits of the last position only.
    """

    def __init__(self, kind):
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(MODELS / "ct2" / kind),
            device="cpu",
            compute_type=kind,
            inter_threads=1,
            intra_threads=THREADS,
        )

    def generate(self, prompts, n, callback=None):
        found = self.generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts],
            min_length=n,
            max_length=n,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=callback,
        )
        return [row.sequences_ids[0] for row in found]

    def decode(self, prompts, n):
        times = {}

        def callback(result):
            times[result.step] = time.perf_counter()
            return False

        rows = self.generate(prompts, n + 1, callback)
        assert all(len(row) == n + 1 for row in rows), "stopped early"
        return rows, max(times.values()) - times[min(times)]

    def prefill(self, tokens):
        start = time.perf_counter()
        self.generate([tokens], 1)
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp's C API by llama-cpp-python: a context for each batch size, a batch a step."""

    def __init__(self, kind):
        import ctypes

        import llama_cpp
        import numpy as np

        self.c, self.np = llama_cpp, np
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        path = MODELS / f"gguf/gpt2-{kind}.gguf"
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"cannot load {path}"
        self.contexts = {}
        self.context(1)

    def context(self, rows):
        c = self.c
        if rows not in self.contexts:
            parameters = c.llama_context_default_params()
            parameters.n_ctx = POSITIONS if rows == 1 else rows * 128
            parameters.n_batch = parameters.n_ubatch = LONG
            parameters.n_seq_max = rows
            parameters.n_threads = parameters.n_threads_batch = THREADS
            parameters.flash_attn_type = (
                1  # faster with all three types of weights, most at batch 8
            )
            parameters.no_perf = True
            context = c.llama_init_from_model(self.model, parameters)
            assert context, "no context"
            self.contexts[rows] = context, c.llama_batch_init(LONG, 0, 1)
        context, batch = self.contexts[rows]
        c.llama_memory_clear(c.llama_get_memory(context), False)
        return context, batch

    def call(self, context, batch, rows, past):
        """Read rows of tokens, row r as sequence r; give the likeliest token after each."""
        c, np, i, last = self.c, self.np, 0, []
        for r, row in enumerate(rows):
            for j, token in enumerate(row):
                batch.token[i], batch.pos[i] = token, past + j
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, r
                batch.logits[i] = j == len(row) - 1
                i += 1
            last.append(i - 1)
        batch.n_tokens = i
        code = c.llama_decode(context, batch)
        assert code == 0, f"llama_decode: {code}"
        logits = (c.llama_get_logits_ith(context, i) for i in last)
        return [int(np.ctypeslib.as_array(row, (VOCAB,)).argmax()) for row in logits]

    def decode(self, prompts, n):
        context, batch = self.context(len(prompts))
        length = len(prompts[0])
        tokens = [self.call(context, batch, prompts, 0)]
        start = time.perf_counter()
        for i in range(n):
            tokens.append(self.call(context, batch, [[token] for token in tokens[-1]], length + i))
        seconds = time.perf_counter() - start
        return [list(row) for row in zip(*tokens, strict=True)], seconds

    def prefill(self, tokens):
        context, batch = self.context(1)
        start = time.perf_counter()
        self.call(context, batch, [tokens], 0)
        return time.perf_counter() - start


class Gpt2c:
    """gpt2c, on the fastest backend."""

    def __init__(self, kind):
        import numpy as np

        import gpt2c

        self.np = np
        quantize = {} if kind == "fp32" else {"quantize": kind}
        self.model = gpt2c.GPT2.from_pretrained(MODELS / f"gpt2c-{kind}", **quantize)
        self.decoder = None

    def decode(self, prompts, n):
        steps = self.model.stream(prompts, max_new_tokens=n + 1, temperature=0)
        tokens = [next(steps)]
        start = time.perf_counter()
        tokens += steps
        seconds = time.perf_counter() - start
        return self.np.stack(tokens, 1).tolist(), seconds

    def prefill(self, tokens):
        self.decoder = self.decoder or self.model.decoder(
            1, LONG
        )  # as the others keep their caches
        start = time.perf_counter()
        self.decoder.read(self.np.array(tokens, self.np.int32), 0, 0)
        return time.perf_counter() - start


# CTranslate2 computes in a thread of its own, so libgomp counts three threads on two CPUs and
# hardly spins between parallel regions; "active" makes that ten times longer, which is worth a
# factor of 1.5 to 2 with int8. The second keeps it from spinning at rest.
CT2 = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}

# name -> what makes it, the environment of its process
ENGINES = {
    "gpt2c-fp32": (lambda: Gpt2c("fp32"), {}),
    "gpt2c-fp16": (lambda: Gpt2c("fp16"), {}),
    "gpt2c-int8": (lambda: Gpt2c("int8"), {}),
    "transformers": (Transformers, {}),
    "transformers-compile": (TransformersCompiled, {}),
    "ort-fp32": (lambda: OnnxRuntime("fp32"), {}),
    "ort-int8": (lambda: OnnxRuntime("int8"), {}),
    "ct2-fp32": (lambda: CTranslate2("float32"), CT2),
    "ct2-int8": (lambda: CTranslate2("int8"), CT2),
    "llama-f32": (lambda: LlamaCpp("f32"), {}),
    "llama-f16": (lambda: LlamaCpp("f16"), {}),
    "llama-q8_0": (lambda: LlamaCpp("q8_0"), {}),
}
EXACT = {"gpt2c-fp32", "transformers", "transformers-compile", "ort-fp32", "ct2-fp32", "llama-f32"}
