"""Write what every engine of the race reads, from one set of random GPT-2 124M weights (seed 0).

    python benchmarks/engines/models.py [DIRECTORY]      # default: engines-models

    gpt2                              transformers'; made when it is not there
    gpt2c-fp32, gpt2c-fp16, gpt2c-int8
    gguf/gpt2-f32.gguf, gpt2-f16.gguf, gpt2-q8_0.gguf
    onnx/gpt2-fp32.onnx, gpt2-int8.onnx
    ct2/float32, ct2/int8

Takes a minute and 4 GB.
"""

import copy
import pathlib
import sys

import numpy as np
import torch
from engines import HEADS, LAYERS, MODELS, VOCAB
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2c
from gpt2c.gguf_export import write_gguf

WIDTH, EPS = 768, 1e-5


def weights(root):
    where = root / "gpt2"
    if not (where / "model.safetensors").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(where)
    model = GPT2LMHeadModel.from_pretrained(where, dtype=torch.float32).eval()
    return model, {k: v.detach().numpy() for k, v in model.transformer.state_dict().items()}


def onnx_fp32(w, path):
    """Write the graph as ONNX Runtime's own optimiser would leave it.

    Fused attention over a cache that is written in place (GroupQueryAttention with as many key
    heads as query heads), fused residual + LayerNorm, fused bias + tanh GELU, and the head for the
    last position only.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name, array):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(kind, inputs, outputs, **attributes):
        nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0] + "_op", **attributes))
        return outputs[0]

    def linear(x, name, bias=True):
        out = op("MatMul", [x, constant(name + ".weight", w[name + ".weight"])], [name + ".mm"])
        return (
            op("Add", [out, constant(name + ".bias", w[name + ".bias"])], [name + ".out"])
            if bias
            else out
        )

    ms = {"domain": "com.microsoft"}
    x = op("Gather", [constant("wte", w["wte.weight"]), "input_ids"], ["tok"])
    p = op("Gather", [constant("wpe", w["wpe.weight"]), "position_ids"], ["pos"])
    residual = op("Add", [x, p], ["embedded"])

    def norm_name(name):
        return [
            constant(name + ".weight", w[name + ".weight"]),
            constant(name + ".bias", w[name + ".bias"]),
        ]

    normed = op(
        "LayerNormalization", [residual, *norm_name("h.0.ln_1")], ["h.0.ln_1"], axis=-1, epsilon=EPS
    )
    for i in range(LAYERS):
        h = f"h.{i}"
        qkv = linear(normed, f"{h}.attn.c_attn")
        op(
            "GroupQueryAttention",
            [qkv, "", "", f"past_key_{i}", f"past_value_{i}", "seqlens_k", "total_length"],
            [f"{h}.attn", f"present_key_{i}", f"present_value_{i}"],
            num_heads=HEADS,
            kv_num_heads=HEADS,
            **ms,
        )
        projected = linear(f"{h}.attn", f"{h}.attn.c_proj", bias=False)
        op(
            "SkipLayerNormalization",
            [
                projected,
                residual,
                *norm_name(f"{h}.ln_2"),
                constant(f"{h}.attn.c_proj.bias", w[f"{h}.attn.c_proj.bias"]),
            ],
            [f"{h}.ln_2", "", "", f"{h}.mid"],
            epsilon=EPS,
            **ms,
        )
        up = linear(f"{h}.ln_2", f"{h}.mlp.c_fc", bias=False)
        up = op(
            "FastGelu",
            [up, constant(f"{h}.mlp.c_fc.bias", w[f"{h}.mlp.c_fc.bias"])],
            [f"{h}.gelu"],
            **ms,
        )
        down = linear(up, f"{h}.mlp.c_proj", bias=False)
        bias = constant(f"{h}.mlp.c_proj.bias", w[f"{h}.mlp.c_proj.bias"])
        after = f"h.{i + 1}.ln_1" if i + 1 < LAYERS else "ln_f"
        op(
            "SkipLayerNormalization",
            [down, f"{h}.mid", *norm_name(after), bias],
            [after, "", "", f"{h}.end"],
            epsilon=EPS,
            **ms,
        )
        normed, residual = after, f"{h}.end"
    constants.append(
        numpy_helper.from_array(np.array(-1, np.int64), "minus_one")
    )  # a scalar: Gather drops the axis
    last = op("Gather", [normed, "minus_one"], ["last"], axis=1)
    op("MatMul", [last, constant("head", w["wte.weight"].T)], ["logits"])

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    cache = ["batch", HEADS, "room", WIDTH // HEADS]
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "length"]),
        value("position_ids", TensorProto.INT64, ["length"]),
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_length", TensorProto.INT32, [1]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", VOCAB])]
    for i in range(LAYERS):
        for what in "key", "value":
            inputs.append(value(f"past_{what}_{i}", TensorProto.FLOAT, cache))
            outputs.append(value(f"present_{what}_{i}", TensorProto.FLOAT, cache))
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def onnx_int8(fp32, path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        fp32,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
    )


def ct2(model, root):
    """Write by CTranslate2's own loader, without the tokenizer that its converter insists on.

    Token i is written "i" in the vocabulary.
    """
    from ctranslate2.converters.transformers import GPT2Loader

    for kind in "float32", "int8":
        # Quantising writes into the model's own arrays.
        spec = GPT2Loader().get_model_spec(copy.deepcopy(model))
        spec.register_vocabulary([str(i) for i in range(VOCAB)])
        end = str(VOCAB - 1)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
        spec.validate()
        spec.optimize(quantization=kind)
        (root / kind).mkdir(parents=True, exist_ok=True)
        spec.save(str(root / kind))


def ours(root):
    model = gpt2c.GPT2.from_pretrained(root / "gpt2")
    model.save_pretrained(root / "gpt2c-fp32")
    for kind in "fp16", "int8":
        gpt2c.QuantizedGPT2.from_model(model, kind).save_pretrained(root / f"gpt2c-{kind}")
    tokenizer = gpt2c.Tokenizer.from_name("bytes")  # no engine here tokenizes
    for kind in "f32", "f16", "q8_0":
        path = root / f"gguf/gpt2-{kind}.gguf"
        write_gguf(path, model.config, model.parameters, tokenizer, kind)


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else MODELS)
    model, w = weights(root)
    for folder in "onnx", "gguf":
        (root / folder).mkdir(exist_ok=True)
    ours(root)
    onnx_fp32(w, str(root / "onnx/gpt2-fp32.onnx"))
    onnx_int8(str(root / "onnx/gpt2-fp32.onnx"), str(root / "onnx/gpt2-int8.onnx"))
    ct2(model, root / "ct2")


if __name__ == "__main__":
    main()
