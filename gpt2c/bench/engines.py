"""The other engines of the inference benchmark, each with its fastest settings for few threads.

They are transformers, ONNX Runtime, CTranslate2, llama.cpp and OpenVINO; each is imported where it
is measured. They get gpt2c's random weights. An engine that reads files gets them from a temporary
directory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2c.formats.gguf import write_gguf
from gpt2c.formats.huggingface import save_weights
from gpt2c.formats.load import AnyConfig
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.text.tokenizer import Tokenizer

__all__ = ["PEERS", "Peer"]

Parameters = Mapping[str, NDArray[Any]]
BATCH = 512  # llama.cpp's n_batch, at least
ROOM = 128  # the length of a cache is a multiple of this
GGUF = {"fp32": "f32", "fp16": "f16", "int8": "q8_0"}  # llama.cpp's names of the kinds of weights


class Peer:
    """A model that another engine runs, with the texts that it is timed on.

    Parameters
    ----------
    config, parameters : of the model, names and shapes of `config.parameter_shapes()`
    kind : of the weights: "fp32", "fp16", "bf16" or "int8"
    what : "prefill" times reading the texts, "decode" one token more of each
    texts : (B, T) int32
    some : decoding steps that are timed together
    threads : number of threads
    """

    def __init__(
        self,
        config: AnyConfig,
        parameters: Parameters,
        kind: str,
        what: str,
        texts: NDArray[np.int32],
        some: int,
        threads: int,
    ) -> None:
        self.config, self.kind, self.texts = config, kind, texts
        self.what, self.some, self.threads = what, some, threads
        self.room = -(-(texts.shape[1] + some + 1) // ROOM) * ROOM
        with tempfile.TemporaryDirectory() as directory:
            self.load(parameters, Path(directory))

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Make the model; files may be written to `directory`, which is removed afterwards."""
        raise NotImplementedError

    def prompt(self) -> Any:
        """Read the texts into an empty cache; return the last position's logits, (B, V) float32."""
        raise NotImplementedError

    def step(self, ids: NDArray[np.int32], past: int) -> Any:
        """Read one token more of each text, (B,), after `past`; return logits, (B, V) float32."""
        raise NotImplementedError

    def __call__(self) -> Any:
        """Run the work once; return its logits, (V,) of a prefill, (B, V) of decoding."""
        logits = self.prompt()
        if self.what == "prefill":
            return logits[0]
        return self.step(self.texts[:, 0], self.texts.shape[1])

    def seconds(self) -> float:
        """Return the seconds of a prefill, or of a decoding step, the mean of `some` steps."""
        if self.what == "prefill":
            return _seconds(self.prompt)
        self.prompt()
        T = self.texts.shape[1]
        self.step(self.texts[:, 0], T)  # warm-up: it makes buffers and threads
        more = range(1, self.some + 1)
        return _seconds(lambda: [self.step(self.texts[:, n % T], T + n) for n in more]) / self.some


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Transformers(Peer):
    """transformers, eager, fp32: the loop of its generate() without the bookkeeping."""

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Make the model."""
        import torch
        import transformers

        torch.set_num_threads(self.threads)
        self.torch, self.transformers, self.guard = torch, transformers, torch.inference_mode
        self.read_texts = self.read_one = self.forward
        save_weights(directory, self.config.to_dict(), parameters)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

    def new_cache(self) -> Any:
        """Return an empty cache."""
        return self.transformers.DynamicCache(config=self.model.config)

    def forward(self, ids: Any, cache: Any) -> Any:
        """Read ids; return logits of the last position."""
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def prompt(self) -> Any:
        """See `Peer.prompt`."""
        with self.guard():
            self.cache = self.new_cache()
            logits = self.read_texts(self.torch.from_numpy(self.texts).long(), self.cache)
            return logits.numpy()

    def step(self, ids: NDArray[np.int32], past: int) -> Any:
        """See `Peer.step`."""
        with self.guard():
            logits = self.read_one(self.torch.from_numpy(ids).long()[:, None], self.cache)
            return logits.numpy()


class TransformersCompiled(Transformers):
    """transformers with torch.compile over a step on a static cache, weights frozen and packed.

    Autotuning matters on AMD: MKL, which torch calls otherwise, is slow there, and Inductor's own
    C++ kernels are not. The prompt of a decoding is eager, as in generate(); a prefill is compiled.
    """

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Make the model."""
        super().load(parameters, directory)
        import torch._inductor.config

        torch._inductor.config.freezing = True
        self.read_one = torch.compile(
            self.forward, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs"
        )
        if self.what == "prefill":
            self.read_texts = self.read_one
        self.guard = torch.no_grad  # freezing needs this, not inference_mode
        self.static = self.transformers.StaticCache(
            config=self.model.config, max_cache_len=self.room
        )
        attention = self.config.stack().layers[0].attention
        shape = len(self.texts), attention.KV, attention.HS
        self.static.early_initialization(*shape, torch.float32, torch.device("cpu"))

    def new_cache(self) -> Any:
        """Empty the cache that the step was compiled for; return it."""
        self.static.reset()
        return self.static


class OnnxRuntime(Peer):
    """ONNX Runtime on the graph of `write_onnx`: the cache is bound once, and written in place."""

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Write the graph and load it."""
        import onnxruntime as ort  # type: ignore[import-not-found,unused-ignore]

        path, config = directory / "fp32.onnx", self.config
        assert isinstance(config, GPT2Config)
        write_onnx(path, config, parameters)
        if self.kind == "int8":
            from onnxruntime import quantization as q  # type: ignore[import-not-found,unused-ignore]

            path = directory / "int8.onnx"
            q.quantize_dynamic(
                directory / "fp32.onnx",
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=q.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        NH = config.n_head
        shape = len(self.texts), NH, self.room, config.n_embd // NH
        self.cache = {
            f"{part}_{i}": np.zeros(shape, np.float32)
            for i in range(self.config.n_layer)
            for part in ("key", "value")
        }
        self.read_texts, self.read_one = self.bind(self.texts.shape[1]), self.bind(1)

    def bind(self, length: int) -> Callable[[NDArray[np.int32], int], NDArray[np.float32]]:
        """Return a call that reads `length` tokens of each text, after `past` others."""
        rows, binding = len(self.texts), self.session.io_binding()
        arrays: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((rows, length), np.int64),
            "position_ids": np.zeros(length, np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_length": np.zeros(1, np.int32),
        }
        logits = np.zeros((rows, self.config.vocab_size), np.float32)

        def place(name: str, array: NDArray[Any]) -> tuple[Any, ...]:
            return name, "cpu", 0, array.dtype, array.shape, array.ctypes.data

        for name, array in arrays.items():
            binding.bind_input(*place(name, array))
        for name, array in self.cache.items():
            binding.bind_input(*place(f"past_{name}", array))
            binding.bind_output(*place(f"present_{name}", array))
        binding.bind_output(*place("logits", logits))

        def call(ids: NDArray[np.int32], past: int) -> NDArray[np.float32]:
            arrays["input_ids"][:] = ids
            arrays["position_ids"][:] = range(past, past + length)
            arrays["seqlens_k"][:] = past + length - 1
            arrays["total_length"][:] = past + length
            self.session.run_with_iobinding(binding)
            return logits

        return call

    def prompt(self) -> Any:
        """See `Peer.prompt`."""
        return self.read_texts(self.texts, 0)

    def step(self, ids: NDArray[np.int32], past: int) -> Any:
        """See `Peer.step`."""
        return self.read_one(ids[:, None], past)


def write_onnx(path: Path, config: GPT2Config, w: Parameters) -> None:
    """Write the graph as ONNX Runtime's own optimiser would leave it.

    It has fused attention over a cache that is written in place (GroupQueryAttention with as many
    key heads as query heads), fused residual + LayerNorm, fused bias + tanh GELU, and the head for
    the last position only.
    """
    import onnx  # type: ignore[import-not-found,unused-ignore]
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, array: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0] + "_op", **attributes))
        return outputs[0]

    def product(x: str, name: str) -> str:
        return op("MatMul", [x, constant(f"{name}.weight", w[f"{name}.weight"].T)], [f"{name}.mm"])

    def bias(name: str) -> str:
        return constant(f"{name}.bias", w[f"{name}.bias"])

    def norm(name: str) -> list[str]:
        return [constant(f"{name}.weight", w[f"{name}.weight"]), bias(name)]

    microsoft, eps = {"domain": "com.microsoft"}, config.layer_norm_epsilon
    x = op("Gather", [constant("wte", w["wte.weight"]), "input_ids"], ["tok"])
    p = op("Gather", [constant("wpe", w["wpe.weight"]), "position_ids"], ["pos"])
    residual = op("Add", [x, p], ["embedded"])
    normed = op(
        "LayerNormalization", [residual, *norm("h.0.ln_1")], ["h.0.ln_1"], axis=-1, epsilon=eps
    )
    for i in range(config.n_layer):
        h = f"h.{i}"
        qkv = product(normed, f"{h}.attn.c_attn")
        qkv = op("Add", [qkv, bias(f"{h}.attn.c_attn")], [f"{h}.qkv"])
        op(
            "GroupQueryAttention",
            [qkv, "", "", f"past_key_{i}", f"past_value_{i}", "seqlens_k", "total_length"],
            [f"{h}.attn", f"present_key_{i}", f"present_value_{i}"],
            num_heads=config.n_head,
            kv_num_heads=config.n_head,
            **microsoft,
        )
        projected = product(f"{h}.attn", f"{h}.attn.c_proj")
        op(
            "SkipLayerNormalization",
            [projected, residual, *norm(f"{h}.ln_2"), bias(f"{h}.attn.c_proj")],
            [f"{h}.ln_2", "", "", f"{h}.mid"],
            epsilon=eps,
            **microsoft,
        )
        up = product(f"{h}.ln_2", f"{h}.mlp.c_fc")
        up = op("FastGelu", [up, bias(f"{h}.mlp.c_fc")], [f"{h}.gelu"], **microsoft)
        down = product(up, f"{h}.mlp.c_proj")
        after = f"h.{i + 1}.ln_1" if i + 1 < config.n_layer else "ln_f"
        op(
            "SkipLayerNormalization",
            [down, f"{h}.mid", *norm(after), bias(f"{h}.mlp.c_proj")],
            [after, "", "", f"{h}.end"],
            epsilon=eps,
            **microsoft,
        )
        normed, residual = after, f"{h}.end"
    # a scalar, so that Gather drops the axis
    constants.append(numpy_helper.from_array(np.array(-1, np.int64), "minus_one"))
    op("Gather", [normed, "minus_one"], ["last"], axis=1)
    op("MatMul", ["last", constant("head", w["wte.weight"].T)], ["logits"])

    def value(name: str, kind: Any, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = ["batch", config.n_head, "room", config.n_embd // config.n_head]
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "length"]),
        value("position_ids", TensorProto.INT64, ["length"]),
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_length", TensorProto.INT32, [1]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", config.vocab_size])]
    for i in range(config.n_layer):
        for part in ("key", "value"):
            inputs.append(value(f"past_{part}_{i}", TensorProto.FLOAT, cache))
            outputs.append(value(f"present_{part}_{i}", TensorProto.FLOAT, cache))
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


class CTranslate2(Peer):
    """CTranslate2's Generator. Its loop is internal: the callback for each new token is timed.

    A prefill is a generation of one token, which computes logits of the last position only.
    """

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Write the model as its converter would, and load it; token i is written "i"."""
        import ctranslate2  # type: ignore[import-not-found,unused-ignore]
        from ctranslate2 import specs

        assert isinstance(self.config, GPT2Config)
        spec = specs.TransformerDecoderModelSpec.from_config(
            self.config.n_layer,
            self.config.n_head,
            pre_norm=True,
            activation=specs.common_spec.Activation.GELUTanh,
        )
        decoder = spec.decoder
        decoder.scale_embeddings = False
        decoder.embeddings.weight = parameters["wte.weight"].copy()
        decoder.position_encodings.encodings = parameters["wpe.weight"].copy()
        decoder.projection.weight = parameters["wte.weight"].copy()

        def linear(part: Any, name: str) -> None:
            part.weight = parameters[f"{name}.weight"].copy()  # quantising writes into it
            part.bias = parameters[f"{name}.bias"].copy()

        def norm(part: Any, name: str) -> None:
            part.gamma = parameters[f"{name}.weight"].copy()
            part.beta = parameters[f"{name}.bias"].copy()

        norm(decoder.layer_norm, "ln_f")
        for i, layer in enumerate(decoder.layer):
            norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
            linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
            linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
            norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
            linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
            linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
        spec.register_vocabulary([str(i) for i in range(self.config.vocab_size)])
        end = str(self.config.vocab_size - 1)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
        spec.validate()
        kind = {"fp32": "float32", "int8": "int8"}[self.kind]
        spec.optimize(quantization=kind)
        spec.save(str(directory))
        self.generator = ctranslate2.Generator(
            str(directory),
            device="cpu",
            compute_type=kind,
            inter_threads=1,
            intra_threads=self.threads,
        )

    def generate(self, texts: NDArray[np.int32], n: int, **more: Any) -> Any:
        """Continue texts by n tokens, greedily."""
        return self.generator.generate_batch(
            [[str(i) for i in text] for text in texts],
            max_length=n,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            **more,
        )

    def __call__(self) -> Any:
        """See `Peer.__call__`."""
        texts = self.texts
        if self.what == "decode":
            texts = np.concatenate([texts, texts[:, :1]], axis=1)
        found = self.generate(texts, 1, min_length=0, return_logits_vocab=True)
        logits = np.array([np.array(row.logits[0][0]).reshape(-1) for row in found], np.float32)
        return logits[0] if self.what == "prefill" else logits

    def seconds(self) -> float:
        """See `Peer.seconds`."""
        if self.what == "prefill":
            return _seconds(lambda: self.generate(self.texts, 1, min_length=1))
        times: dict[int, float] = {}

        def callback(result: Any) -> bool:
            times[result.step] = time.perf_counter()
            return False

        n = self.some + 1
        self.generate(self.texts, n, min_length=n, callback=callback)
        return (max(times.values()) - min(times.values())) / (len(times) - 1)


class LlamaCpp(Peer):
    """llama.cpp's C API through llama-cpp-python: one batch for each step."""

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Write a GGUF file and map it."""
        import ctypes

        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self.c = c = llama_cpp
        path = directory / "model.gguf"
        tokenizer = Tokenizer.from_name("bytes")  # nothing here is tokenized
        write_gguf(path, self.config, parameters, tokenizer, GGUF[self.kind])
        self.quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self.quiet, ctypes.c_void_p(0))
        c.llama_backend_init()
        given = c.llama_model_default_params()
        given.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(str(path).encode(), given)
        B, T = self.texts.shape
        given = c.llama_context_default_params()
        given.n_ctx, given.n_seq_max = B * self.room, B
        given.n_batch = given.n_ubatch = max(B * T, BATCH)
        given.n_threads = given.n_threads_batch = self.threads
        given.flash_attn_type = 1  # faster with all kinds of weights, most with many texts
        given.no_perf = True
        self.context = c.llama_init_from_model(self.model, given) if self.model else None
        if not self.context:
            raise ValueError("llama.cpp does not load the model")
        self.batch = c.llama_batch_init(B * T, 0, 1)

    def read(self, texts: NDArray[np.int32], past: int) -> NDArray[np.float32]:
        """Read rows of tokens, row r as sequence r; return logits after each."""
        batch, last, i = self.batch, [], 0
        for r, row in enumerate(texts.tolist()):
            for j, token in enumerate(row):
                batch.token[i], batch.pos[i] = token, past + j
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, r
                batch.logits[i] = j == len(row) - 1
                i += 1
            last.append(i - 1)
        batch.n_tokens = i
        if code := self.c.llama_decode(self.context, batch):
            raise ValueError(f"llama_decode returned {code}")
        found = [self.c.llama_get_logits_ith(self.context, i) for i in last]
        V = self.config.vocab_size
        return np.array([np.ctypeslib.as_array(row, (V,)) for row in found])

    def prompt(self) -> Any:
        """See `Peer.prompt`."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
        return self.read(self.texts, 0)

    def step(self, ids: NDArray[np.int32], past: int) -> Any:
        """See `Peer.step`."""
        return self.read(ids[:, None], past)


class OpenVino(Peer):
    """OpenVINO on the graph of `openvino_graph`: it keeps keys and values itself.

    With "bf16" all products are in bfloat16. With "int8" weights have 8 bits; on a CPU with 8-bit
    dot products OpenVINO rounds activations to 8 bits too, in groups of its own choice.
    """

    def load(self, parameters: Parameters, directory: Path) -> None:
        """Make the graph and compile it."""
        import openvino  # type: ignore[import-not-found,unused-ignore]

        assert isinstance(self.config, GPT2Config)
        precision = "bf16" if self.kind == "bf16" else "f32"
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": False,  # a pinned thread waits for its core if another uses it
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,  # else keys and values are rounded to 8 bits
        }
        graph = openvino_graph(self.config, parameters, self.kind)
        self.request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
        self.rows = np.arange(len(self.texts), dtype=np.int32)

    def read(self, texts: NDArray[np.int32], past: int) -> NDArray[np.float32]:
        """Read rows of tokens after `past` others; return logits of the last position."""
        places = np.arange(past, past + texts.shape[1])
        given = {0: texts.astype(np.int64), 1: places, 2: self.rows}
        found = self.request.infer(given, share_inputs=True, share_outputs=True)
        logits: NDArray[np.float32] = found[0][:, 0]
        return logits

    def prompt(self) -> Any:
        """See `Peer.prompt`."""
        self.request.reset_state()
        return self.read(self.texts, 0)

    def step(self, ids: NDArray[np.int32], past: int) -> Any:
        """See `Peer.step`."""
        return self.read(ids[:, None], past)


def openvino_graph(config: GPT2Config, w: Parameters, kind: str) -> Any:
    """Return the graph in the form that OpenVINO's CPU plugin fuses.

    Keys and values are variables that attention appends to, and attention is causal over them. The
    head is for the last position only. With "int8" each row of a weight has a scale. Inputs: ids
    (B, T) int64, positions (T,) int64, and rows (B,) int32, the row of the cache that each text
    continues from.
    """
    import openvino
    from openvino import opset15 as op  # type: ignore[import-not-found,unused-ignore]

    C, NH = config.n_embd, config.n_head

    def constant(*values: int) -> Any:
        return op.constant(np.array(values, np.int64))

    def weight(name: str) -> Any:
        if kind != "int8":
            return op.constant(w[name])
        scale = np.abs(w[name]).max(axis=1, keepdims=True) / 127
        small = op.constant(np.rint(w[name] / scale).astype(np.int8))
        return op.multiply(op.convert(small, "f32"), op.constant(scale))

    def vector(name: str) -> Any:
        return op.constant(w[name][None, None])

    def linear(x: Any, name: str) -> Any:
        product = op.matmul(x, weight(f"{name}.weight"), False, True)
        return op.add(product, vector(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        x = op.mvn(x, constant(-1), True, config.layer_norm_epsilon, "inside_sqrt")
        return op.add(op.multiply(x, vector(f"{name}.weight")), vector(f"{name}.bias"))

    def heads(x: Any) -> Any:
        x = op.reshape(x, constant(0, 0, NH, C // NH), True)
        return op.transpose(x, constant(0, 2, 1, 3))

    ids = op.parameter([-1, -1], np.int64)
    positions = op.parameter([-1], np.int64)
    rows = op.parameter([-1], np.int32)
    batch = op.gather(op.shape_of(ids), constant(0), constant(0))
    size = op.concat([batch, constant(NH, 0, C // NH)], 0)
    empty, written = op.broadcast(op.constant(np.float32(0)), size), []

    def cached(x: Any, name: str) -> Any:
        before = op.read_value(empty, name, np.float32, [-1, NH, -1, C // NH])
        x = op.concat([op.gather(before, rows, constant(0)), x], 2)
        written.append(op.assign(x, name))
        return x

    table, places = weight("wte.weight"), op.constant(w["wpe.weight"])
    first = op.constant(np.int64(0))
    x = op.add(op.gather(table, ids, first), op.gather(places, positions, first))
    for i in range(config.n_layer):
        h = f"h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        query, key, value = map(heads, op.split(qkv, op.constant(np.int64(2)), 3).outputs())
        key, value = cached(key, f"key_{i}"), cached(value, f"value_{i}")
        mixed = op.scaled_dot_product_attention(query, key, value, causal=True)
        mixed = op.reshape(op.transpose(mixed, constant(0, 2, 1, 3)), constant(0, 0, C), True)
        x = op.add(x, linear(mixed, f"{h}.attn.c_proj"))
        up = op.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), "tanh")
        x = op.add(x, linear(up, f"{h}.mlp.c_proj"))
    last = op.gather(norm(x, "ln_f"), constant(-1), op.constant(np.int64(1)))
    logits = op.result(op.matmul(last, table, False, True))
    return openvino.Model([logits], written, [ids, positions, rows], "gpt2")


PEERS: dict[str, type[Peer]] = {
    "transformers": Transformers,
    "transformers-compile": TransformersCompiled,
    "onnxruntime": OnnxRuntime,
    "ctranslate2": CTranslate2,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}
