"""Hugging Face's files: round trips, layout, shards, damaged files, failing writes."""

import gc
import json
import math
import os
import tracemalloc

import numpy as np
import pytest
from conftest import refused
from helpers.command import program, run_process
from helpers.raw import write_raw
from safetensors.numpy import load_file, save_file

from gpt2c import GPT2, GPT2Config, Tokenizer
from gpt2c.formats import huggingface
from gpt2c.formats.huggingface import (
    load_as_they_are,
    save_as_they_are,
    save_weights,
)
from gpt2c.model.parameters import check_shapes

C, V, T = 4, 7, 5
CONFIG = {"n_embd": C, "vocab_size": V, "n_positions": T, "layer_norm_epsilon": 1e-5}
SHAPES = {
    "wte.weight": (V, C),
    "wpe.weight": (T, C),
    "h.0.ln_1.weight": (C,),
    "h.0.attn.c_attn.weight": (3 * C, C),
    "h.0.attn.c_attn.bias": (3 * C,),
    "h.0.attn.c_proj.weight": (C, C),
    "h.0.mlp.c_fc.weight": (4 * C, C),
    "h.0.mlp.c_proj.weight": (C, 4 * C),
    "ln_f.bias": (C,),
}
FILES = ["config.json", "generation_config.json", "model.safetensors"]
TRANSPOSED = [name for name in SHAPES if ".c_" in name and name.endswith("weight")]


def make_tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def assert_same(tensors, expected):
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        assert array.dtype == np.float32 and tensor.shape == array.shape
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.fixture
def directory(tmp_path):
    """Return a directory that holds a saved model."""
    save_weights(tmp_path / "model", CONFIG, make_tensors())
    return tmp_path / "model"


def load_weights(path):
    """Read a model as `gpt2c.formats.load.find_model` does: first its kind, then its tensors."""
    return huggingface.load_weights(path, read_config(path))


def read_config(path):
    """Return config.json's entries alone."""
    return huggingface.read_config(path)[0]


# ---- weights -------------------------------------------------------------------------------------


def test_round_trip(directory):
    config, tensors = read_config(directory), load_weights(directory)
    assert config == CONFIG
    assert_same(tensors, make_tensors())
    assert sorted(os.listdir(directory)) == sorted(FILES)


def test_file_has_the_layout_of_hugging_face(directory):
    expected = make_tensors()
    stored = load_file(directory / "model.safetensors")
    assert len(TRANSPOSED) == 4 and sorted(stored) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor.T if name in TRANSPOSED else tensor)
    assert b'"format":"pt"' in (directory / "model.safetensors").read_bytes()[:200]
    assert json.loads((directory / "config.json").read_text()) == CONFIG


def test_saving_over_replaces(directory):
    save_weights(str(directory), CONFIG | {"n_layer": 9}, make_tensors(seed=1))
    config, tensors = read_config(str(directory)), load_weights(str(directory))
    assert config["n_layer"] == 9
    assert_same(tensors, make_tensors(seed=1))


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_weights(tmp_path, CONFIG, make_tensors())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_views_that_are_not_contiguous_are_stored_right(tmp_path):
    expected = make_tensors()
    tensors = {name: np.repeat(t, 2, axis=-1)[..., ::2] for name, t in expected.items()}
    save_weights(tmp_path, CONFIG, tensors)
    assert_same(load_weights(tmp_path), expected)


def store(directory, tensors):
    """Replace the weights by arrays in the file's layout, as another program writes them."""
    save_file(tensors, directory / "model.safetensors")


def stored_tensors(directory):
    return load_file(directory / "model.safetensors")


def test_prefix_and_masks_are_read(directory):
    stored = {f"transformer.{name}": t for name, t in stored_tensors(directory).items()}
    stored["transformer.h.0.attn.bias"] = np.ones((1, 1, T, T), dtype=bool)
    stored["transformer.h.0.attn.masked_bias"] = np.array([-1e4], dtype=np.float32)
    stored["lm_head.weight"] = stored["transformer.wte.weight"].copy()
    store(directory, stored)
    assert_same(load_weights(directory), make_tensors())


def test_lm_head_may_be_the_only_copy(directory):
    stored = stored_tensors(directory)
    stored["lm_head.weight"] = stored.pop("wte.weight")
    store(directory, stored)
    assert_same(load_weights(directory), make_tensors())


def test_untied_head_is_refused(directory):
    stored = stored_tensors(directory)
    stored["lm_head.weight"] = stored["wte.weight"] + 1
    store(directory, stored)
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight differs"):
        load_weights(directory)


def test_duplicate_name_is_refused(directory):
    stored = stored_tensors(directory)
    stored["transformer.ln_f.bias"] = stored["ln_f.bias"]
    store(directory, stored)
    with pytest.raises(ValueError, match=r"holds ln_f\.bias twice"):
        load_weights(directory)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_converted(directory, dtype):
    store(directory, {name: t.astype(dtype) for name, t in stored_tensors(directory).items()})
    expected = {name: t.astype(dtype).astype(np.float32) for name, t in make_tensors().items()}
    assert_same(load_weights(directory), expected)


def test_integers_are_refused(directory):
    store(directory, {"wte.weight": np.zeros((2, 2), dtype=np.int8)})
    with pytest.raises(ValueError, match=r"wte\.weight has dtype I8; wanted one of F32"):
        load_weights(directory)


def test_numbers_beyond_float32_are_refused(directory):
    store(directory, {"wte.weight": np.full((2, 2), 1e300)})
    with pytest.raises(ValueError, match=r"wte\.weight holds numbers beyond the range"):
        np.asarray(load_weights(directory)["wte.weight"])


# ---- mapped memory -------------------------------------------------------------------------------


def test_float32_stays_in_the_file(directory):
    tensors = load_weights(directory)
    for name, tensor in ((name, np.asarray(tensor)) for name, tensor in tensors.items()):
        assert not tensor.flags.writeable, f"{name}: writing here would be lost, or harm others"
        assert tensor.flags.f_contiguous if name in TRANSPOSED else tensor.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0
    store(directory, {name: t.astype(np.float16) for name, t in stored_tensors(directory).items()})
    assert all(np.asarray(t).flags.writeable for t in load_weights(directory).values())


def test_file_that_is_replaced_does_no_harm(directory):
    """A save renames a whole file into its place, so a reader that mapped the old one keeps it."""
    old = load_weights(directory)
    for seed in (1, 2):
        save_weights(directory, CONFIG, make_tensors(seed=seed))
        assert_same(load_weights(directory), make_tensors(seed=seed))
        assert_same(old, make_tensors())
    save_weights(directory, CONFIG, old)  # back into the directory that they came from
    assert_same(load_weights(directory), make_tensors())
    (directory / "model.safetensors").unlink()
    assert_same(old, make_tensors())


def test_tensors_outlive_their_file_and_mapping(directory):
    bias = np.asarray(load_weights(directory)["ln_f.bias"])
    gc.collect()
    assert np.array_equal(bias, make_tensors()["ln_f.bias"])


def test_weights_keep_their_dtype(tmp_path):
    tensors = {
        "a.weight": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "attn.c_attn.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a.scale": np.ones(3, np.float32),
    }
    save_as_they_are(tmp_path, CONFIG, tensors)
    loaded = load_as_they_are(tmp_path)
    assert loaded.keys() == tensors.keys() and read_config(tmp_path) == CONFIG
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and not loaded[name].flags.writeable
        np.testing.assert_array_equal(loaded[name], tensor)
    with pytest.raises(ValueError, match=r"a\.weight has dtype U8; wanted one of F32"):
        load_weights(tmp_path)
    save_as_they_are(tmp_path, CONFIG, {"a.scale": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(loaded["a.scale"], np.ones(3))


# ---- shards --------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(directory, weight_map, metadata=None):
    index = {"metadata": metadata or {"total_size": 1}, "weight_map": weight_map}  # it lies
    (directory / INDEX).write_text(json.dumps(index))


@pytest.fixture
def sharded(directory):
    """Return a directory with the same model in two shards, and the content of its index."""
    stored = {f"transformer.{name}": t for name, t in stored_tensors(directory).items()}
    (directory / "model.safetensors").unlink()
    files = dict(zip(stored, [ONE, TWO] * len(stored), strict=False))
    for file in (ONE, TWO):
        save_file({n: t for n, t in stored.items() if files[n] == file}, directory / file)
    write_index(directory, files)
    return directory, files


def test_shards_are_one_model(sharded):
    directory, files = sharded
    config, tensors = read_config(directory), load_weights(directory)
    assert config == CONFIG and {files[f"transformer.{name}"] for name in SHAPES} == {ONE, TWO}
    assert_same(tensors, make_tensors())


def test_shards_may_hold_masks_and_a_head(sharded):
    directory, files = sharded
    mask, head = "transformer.h.0.attn.bias", make_tensors()["wte.weight"]
    save_file({mask: np.ones((T, T), bool), "lm_head.weight": head}, directory / "x.safetensors")
    write_index(directory, files | {"lm_head.weight": "x.safetensors"})  # the mask is not listed
    assert_same(load_weights(directory), make_tensors())
    write_index(directory, files | {"lm_head.weight": "x.safetensors", mask: ONE})  # nor there
    assert_same(load_weights(directory), make_tensors())


def test_whole_file_comes_before_shards(sharded):
    """As in transformers. A save removes the shards, because other programs might read them."""
    directory, _ = sharded
    old = load_weights(directory)
    (directory / "other-00001-of-00002.safetensors").write_text("stays")
    save_file(make_tensors(seed=3), directory / "model.safetensors")
    assert set(os.listdir(directory)) > {ONE, TWO, INDEX, *FILES}
    np.testing.assert_array_equal(
        load_weights(directory)["wpe.weight"], make_tensors(3)["wpe.weight"]
    )
    save_weights(directory, CONFIG, make_tensors(seed=1))
    assert set(os.listdir(directory)) == {*FILES, "other-00001-of-00002.safetensors"}
    assert_same(load_weights(directory), make_tensors(seed=1))
    assert_same(old, make_tensors())  # a reader that mapped them keeps them


@pytest.mark.parametrize(
    "file",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors"),
        *("C:x.safetensors", "..", ".", "", ".safetensors", "..safetensors", "x.bin"),
        *("x.safetensors/", "x\0.safetensors", "x\n.safetensors", "\u202ex.safetensors"),
        *("~.safetensors", "x" * 300 + ".safetensors", "-x.safetensors", None, 1, True),
        *(["x.safetensors"], {}),
    ],
    ids=str,
)
def test_index_reaches_for_plain_names_only(sharded, file):
    directory, files = sharded
    for outside in (directory.parent, directory / "a"):
        outside.mkdir(exist_ok=True)
        save_file({"transformer.wte.weight": np.zeros((V, C))}, outside / "x.safetensors")
    write_index(directory, files | {"transformer.wte.weight": file})
    message = refused(load_weights, directory)
    assert INDEX in message and "'transformer.wte.weight' must be in a .safetensors file" in message


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3, [[]]], ids=str)
def test_index_must_have_a_map(sharded, weight_map):
    write_index(sharded[0], weight_map)
    assert f"{INDEX}: weight_map must say" in refused(load_weights, sharded[0])


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {"a": "b", "a": "b"}}', '{"a": NaN}'])
def test_damaged_index_is_refused(sharded, text):
    (sharded[0] / INDEX).write_text(text)
    assert INDEX in refused(load_weights, sharded[0])


def test_link_out_of_the_directory_is_refused(sharded):
    directory, _ = sharded
    (directory / ONE).rename(directory.parent / "elsewhere.safetensors")
    for target in ("../elsewhere.safetensors", directory.parent / "elsewhere.safetensors"):
        (directory / ONE).symlink_to(target)
        assert f"{ONE} is a link that leads out of its directory" in refused(
            load_weights, directory
        )
        (directory / ONE).unlink()
    (directory / "down").mkdir()
    (directory.parent / "elsewhere.safetensors").rename(directory / "down" / ONE)
    (directory / ONE).symlink_to(f"down/{ONE}")
    assert "leads out" in refused(load_weights, directory)
    (directory / "down" / ONE).rename(directory / "real.safetensors")
    (directory / ONE).unlink()
    (directory / ONE).symlink_to("real.safetensors")
    assert_same(load_weights(directory), make_tensors())
    link = directory.parent / "link"
    link.symlink_to(directory)  # the user named the directory itself
    assert_same(load_weights(link), make_tensors())
    (directory / ONE).unlink()
    (directory / ONE).symlink_to(ONE)  # a link in a circle
    with pytest.raises(FileNotFoundError, match=ONE):
        load_weights(directory)


def test_links_of_the_hub_cache_are_read(sharded, tmp_path):
    """models--x/snapshots/REVISION/file -> ../../blobs/HASH, as huggingface_hub lays it out."""
    directory, _ = sharded
    snapshot, blobs = (
        tmp_path / "models--x" / "snapshots" / ("0" * 40),
        tmp_path / "models--x" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(directory.iterdir()):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_same(load_weights(snapshot), make_tensors())
    (snapshot.parent.parent / "secret").write_bytes((snapshot / ONE).read_bytes())
    (snapshot / ONE).unlink()
    (snapshot / ONE).symlink_to("../../secret")
    assert "leads out" in refused(load_weights, snapshot)


def test_missing_shard_is_named(sharded):
    directory, _ = sharded
    (directory / TWO).unlink()
    with pytest.raises(FileNotFoundError, match=f"{TWO} does not exist, but .*{INDEX} lists it"):
        load_weights(directory)
    (directory / TWO).mkdir()
    with pytest.raises(FileNotFoundError, match=TWO):
        load_weights(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("transformer.wte.weight"), "holds transformer.wte.weight, which model.s"),
        (lambda m: m.update({"transformer.wte.weight": TWO}), f"index.json says is in {TWO}"),
        (lambda m: m.update({"transformer.extra": ONE}), f"'transformer.extra' is not in {ONE}"),
        (lambda m: m.update({"\x1b[31m" + "x" * 999: ONE}), f"' is not in {ONE}"),
    ],
)
def test_index_and_shards_must_agree(sharded, change, said):
    directory, files = sharded
    assert files["transformer.wte.weight"] == ONE or "says is" not in said
    change(files)
    write_index(directory, files)
    message = refused(load_weights, directory)
    assert said in message and message.isprintable() and len(message) < 500


def test_tensor_is_in_one_shard_only(sharded):
    directory, files = sharded
    twice = next(name for name, file in files.items() if file == ONE)
    tensors = load_file(directory / TWO)
    save_file(tensors | {twice: np.zeros(1)}, directory / TWO)
    assert f"{TWO} holds {twice}, which {INDEX} says is in {ONE}" in refused(
        load_weights, directory
    )
    name = twice.removeprefix("transformer.")
    save_file(tensors | {name: np.zeros(1)}, directory / TWO)
    write_index(directory, files | {name: TWO})
    assert f"holds {name} twice, with and without the prefix" in refused(load_weights, directory)


# ---- one file ------------------------------------------------------------------------------------


def test_file_is_read_with_the_config_beside_it(directory):
    file = directory / "anything.safetensors"
    (directory / "model.safetensors").rename(file)
    config, tensors = read_config(file), load_weights(file)
    assert config == CONFIG == read_config(str(file))
    assert_same(tensors, make_tensors())
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_weights(file)


@pytest.mark.parametrize("name", ["ckpt.pt", "model.gguf", "pytorch_model.bin", "model"])
def test_other_files_are_not_read(directory, name):
    (directory / name).write_bytes(b"x")
    message = refused(load_weights, directory / name)
    assert message == f"{directory / name} is not a directory, nor a .safetensors file"


# ---- generation_config.json ----------------------------------------------------------------------


def test_generation_config_has_start_and_end_of_texts(tmp_path):
    file = tmp_path / "generation_config.json"
    save_weights(tmp_path, CONFIG | {"bos_token_id": 5, "eos_token_id": 6}, make_tensors())
    assert json.loads(file.read_text()) == {
        "_from_model_config": True,
        "bos_token_id": 5,
        "eos_token_id": 6,
    }
    save_weights(tmp_path, CONFIG, make_tensors())  # no id, and none of the last save
    assert json.loads(file.read_text()) == {"_from_model_config": True}
    save_as_they_are(tmp_path, CONFIG | {"eos_token_id": 0}, {})
    assert json.loads(file.read_text()) == {"_from_model_config": True, "eos_token_id": 0}


@pytest.mark.parametrize("config", [CONFIG, CONFIG | {"eos_token_id": None}])
def test_read_config_takes_a_missing_end_from_generation_config(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert read_config(directory)["eos_token_id"] == 3
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    assert read_config(directory)["eos_token_id"] == 0
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text("{")
    assert "generation_config.json is not valid JSON" in refused(read_config, directory)
    (directory / "generation_config.json").unlink()
    assert read_config(directory).get("eos_token_id") is None


# ---- before memory is allocated ------------------------------------------------------------------

PUBLISHED = {  # openai-community's gpt2, gpt2-medium, gpt2-large, gpt2-xl
    "124M": GPT2Config(n_layer=12, n_head=12, n_embd=768),
    "355M": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "1558M": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}


def write_hollow(path, shapes, dtype="F32"):
    """Write a safetensors file of zeros that takes no space on the disk."""
    header, end, size = {}, 0, {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    write_raw(path, header, b"")
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size + end)


def published_shapes(config):
    """Return names and shapes of the files on the hub: Conv1D's layout, no prefix, with masks."""
    shapes = {
        name: shape[::-1] if ".c_" in name else shape
        for name, shape in config.parameter_shapes().items()
    }
    masks = {f"h.{layer}.attn.bias": (1, 1, 1024, 1024) for layer in range(config.n_layer)}
    return shapes | masks


@pytest.mark.parametrize("size", PUBLISHED)
def test_four_sizes_fit_by_shape(tmp_path, size):
    """1558M too: its file would have 6.4 GB, and none of its numbers is read."""
    config = PUBLISHED[size]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    write_hollow(tmp_path / "model.safetensors", published_shapes(config))
    entries, tensors = read_config(tmp_path), load_weights(tmp_path)
    assert GPT2Config.from_dict(entries) == config
    check_shapes(config.parameter_shapes(), tensors, size)
    for other in PUBLISHED.values():
        if other != config:
            assert "must be" in refused(check_shapes, other.parameter_shapes(), tensors, size)


@pytest.mark.parametrize("quantize", [None, "int8", "fp16"])
@pytest.mark.parametrize(
    "changes",
    [
        *({name: 2**31 - 1} for name in ("vocab_size", "n_positions", "n_inner")),
        *({"n_layer": 10_000}, {"n_embd": 2**31 - 1, "n_head": 1}),
    ],
    ids=str,
)
def test_config_asks_for_no_more_than_the_file_holds(tmp_path, monkeypatch, changes, quantize):
    """A config of terabytes is refused because of the file's size, before memory is allocated."""
    model = GPT2(GPT2Config(V, n_positions=T, n_embd=C, n_layer=1, n_head=1), backend="numpy")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("gpt2c.model.weights.aligned_zeros", None)
    for directory in (tmp_path, tmp_path / "small"):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))
        message = refused(GPT2.from_pretrained, directory, "numpy", quantize=quantize)
        assert message.startswith(f"{directory}/model.safetensors: tensor ")
        if quantize is None:
            break
        if directory == tmp_path:  # and quantized weights on the disk
            monkeypatch.undo()
            model.quantize(quantize).save_pretrained(tmp_path / "small")
            monkeypatch.setattr("gpt2c.model.weights.aligned_zeros", None)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_loading_takes_the_model_and_one_tensor(tmp_path, dtype):
    """The largest tensor is half of this model, so a second copy of it would show."""
    config = GPT2Config(20_000, n_positions=8, n_embd=64, n_layer=26, n_head=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    write_hollow(tmp_path / "model.safetensors", published_shapes(config) | {}, dtype)
    largest = 4 * max(math.prod(shape) for shape in config.parameter_shapes().values())
    tracemalloc.start()  # it sees NumPy's allocations; the model's own memory is mapped
    GPT2.from_pretrained(tmp_path, "numpy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 1.3 * largest, (peak, largest)


def test_model_beyond_the_memory_is_refused():
    config = GPT2Config(2**31 - 1, n_positions=2**31 - 1, n_embd=2**31 - 1, n_head=1, n_layer=9999)
    for weights in ("fp32", "fp16"):
        with pytest.raises(MemoryError, match=r"^a model of [\d,]{20,} parameters needs"):
            GPT2(config, weights=weights)


# ---- missing and damaged files -------------------------------------------------------------------


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a directory; name one with config\.json"):
        load_weights(tmp_path / "gpt2")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load_weights(directory)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xff", b'{"a": ' + b"[" * 100_000, b"[1, 2]", b"3"]
)
def test_damaged_config_is_refused(directory, text):
    (directory / "config.json").write_bytes(text)
    with pytest.raises(
        ValueError, match=r"config\.json (is not (valid JSON|UTF-8)|must hold a JSON)"
    ):
        load_weights(directory)


def test_every_truncation_is_refused(directory):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors"):
            load_weights(directory)


def test_config_that_json_cannot_hold_leaves_the_old_files(directory):
    with pytest.raises(ValueError, match="JSON"):
        save_weights(directory, {"layer_norm_epsilon": np.nan}, make_tensors(seed=1))
    assert_same(load_weights(directory), make_tensors())


# ---- writes that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("limited", ["config", "model"])
def test_failing_write_leaves_the_old_files(tmp_path, limited):
    save_weights(tmp_path, CONFIG, make_tensors())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run_process(program("programs.disks", "save", str(tmp_path), limited))
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_empty_name_is_refused(tmp_path, monkeypatch):
    model = GPT2(GPT2Config(257, 8, 32, 2, 2), seed=1)
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_name("bytes")
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    quantized = model.quantize("int8")
    for use in (
        *(model.save_pretrained, quantized.save_pretrained, tokenizer.save_pretrained),
        *(GPT2.from_pretrained, Tokenizer.from_pretrained),
    ):
        assert refused(use, "").endswith(" is empty: is a variable of the shell not set?")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        save_weights(tmp_path / "file" / "model", CONFIG, make_tensors())
