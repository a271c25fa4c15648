"""Round trips bit for bit, Hugging Face's layout, damaged files, and writes that really fail."""

import gc
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt2c.checkpoint import (
    load_as_they_are,
    load_weights,
    read_config,
    save_as_they_are,
    save_weights,
)

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
TRANSPOSED = [name for name in SHAPES if ".c_" in name and name.endswith("weight")]


def make_tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def assert_same(tensors, expected):
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def write_raw(path, header, data):
    """Write a safetensors file by hand: length, header, bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def directory(tmp_path):
    """Give a directory that holds a saved model."""
    save_weights(tmp_path / "model", CONFIG, make_tensors())
    return tmp_path / "model"


# ---- weights -------------------------------------------------------------------------------------


def test_round_trip(directory):
    config, tensors = load_weights(directory)
    assert config == CONFIG
    assert_same(tensors, make_tensors())
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_the_file_has_hugging_faces_layout(directory):
    expected = make_tensors()
    stored = load_file(directory / "model.safetensors")
    assert len(TRANSPOSED) == 4 and sorted(stored) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor.T if name in TRANSPOSED else tensor)
    assert b'"format":"pt"' in (directory / "model.safetensors").read_bytes()[:200]
    assert json.loads((directory / "config.json").read_text()) == CONFIG


def test_saving_over_replaces(directory):
    save_weights(str(directory), CONFIG | {"n_layer": 9}, make_tensors(seed=1), {"note": "x"})
    config, tensors = load_weights(str(directory))
    assert config["n_layer"] == 9
    assert_same(tensors, make_tensors(seed=1))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
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
    assert_same(load_weights(tmp_path)[1], expected)


def store(directory, tensors):
    """Replace the weights by arrays in the file's layout, as someone else would write them."""
    save_file(tensors, directory / "model.safetensors")


def stored_tensors(directory):
    return load_file(directory / "model.safetensors")


def test_prefix_and_masks(directory):
    stored = {f"transformer.{name}": t for name, t in stored_tensors(directory).items()}
    stored["transformer.h.0.attn.bias"] = np.ones((1, 1, T, T), dtype=bool)
    stored["transformer.h.0.attn.masked_bias"] = np.array([-1e4], dtype=np.float32)
    stored["lm_head.weight"] = stored["transformer.wte.weight"].copy()
    store(directory, stored)
    assert_same(load_weights(directory)[1], make_tensors())


def test_lm_head_as_the_only_copy(directory):
    stored = stored_tensors(directory)
    stored["lm_head.weight"] = stored.pop("wte.weight")
    store(directory, stored)
    assert_same(load_weights(directory)[1], make_tensors())


def test_an_untied_head_is_refused(directory):
    stored = stored_tensors(directory)
    stored["lm_head.weight"] = stored["wte.weight"] + 1
    store(directory, stored)
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight differs"):
        load_weights(directory)


def test_a_name_twice_is_refused(directory):
    stored = stored_tensors(directory)
    stored["transformer.ln_f.bias"] = stored["ln_f.bias"]
    store(directory, stored)
    with pytest.raises(ValueError, match=r"ln_f\.bias is there twice"):
        load_weights(directory)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_converted(directory, dtype):
    store(directory, {name: t.astype(dtype) for name, t in stored_tensors(directory).items()})
    expected = {name: t.astype(dtype).astype(np.float32) for name, t in make_tensors().items()}
    assert_same(load_weights(directory)[1], expected)


def test_bfloat16_is_widened(directory):
    values = np.array([[1.0, -2.5, 0.0], [np.inf, 3.0e38, 1e-40]], dtype=np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "attn.c_fc": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
        "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [16, 16]},
    }
    write_raw(directory / "model.safetensors", header, struct.pack("<f", 7) + halves.tobytes())
    tensors = load_weights(directory)[1]
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    assert tensors["a"] == 7 and tensors["empty"].shape == (0, 3)
    np.testing.assert_array_equal(tensors["attn.c_fc"], expected)
    np.testing.assert_allclose(expected[:, :2], values[:, :2], rtol=2**-7)


def test_integers_are_refused(directory):
    store(directory, {"wte.weight": np.zeros((2, 2), dtype=np.int8)})
    with pytest.raises(ValueError, match=r"wte\.weight has dtype I8; wanted one of F32"):
        load_weights(directory)


def test_numbers_beyond_float32_are_refused(directory):
    store(directory, {"wte.weight": np.full((2, 2), 1e300)})
    with pytest.raises(ValueError, match=r"wte\.weight holds numbers beyond the range"):
        load_weights(directory)


# ---- mapped memory -------------------------------------------------------------------------------


def test_float32_stays_in_the_file(directory):
    tensors = load_weights(directory)[1]
    for name, tensor in tensors.items():
        assert not tensor.flags.writeable, f"{name}: writing here would be lost, or harm others"
        assert tensor.flags.f_contiguous if name in TRANSPOSED else tensor.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0
    store(directory, {name: t.astype(np.float16) for name, t in stored_tensors(directory).items()})
    assert all(tensor.flags.writeable for tensor in load_weights(directory)[1].values())


def test_a_file_that_is_replaced_does_no_harm(directory):
    """A save renames a whole file into its place: who has the old one mapped keeps it."""
    old = load_weights(directory)[1]
    for seed in (1, 2):
        save_weights(directory, CONFIG, make_tensors(seed=seed))
        assert_same(load_weights(directory)[1], make_tensors(seed=seed))
        assert_same(old, make_tensors())
    save_weights(directory, CONFIG, old)  # back into the directory that they came from
    assert_same(load_weights(directory)[1], make_tensors())
    (directory / "model.safetensors").unlink()
    assert_same(old, make_tensors())


def test_tensors_outlive_what_they_came_with(directory):
    bias = load_weights(directory)[1]["ln_f.bias"]
    gc.collect()
    assert np.array_equal(bias, make_tensors()["ln_f.bias"])


def test_a_tensor_may_start_anywhere(directory):
    """A header of any length, after which nothing is aligned; tensors without numbers too."""
    values = np.arange(6, dtype="<f4")
    for spaces in range(8):
        header = {
            "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
            "wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "one": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
        }
        text = json.dumps(header).encode() + b" " * spaces
        write_raw(directory / "model.safetensors", text, values.tobytes() + struct.pack("<f", 9))
        tensors = load_weights(directory)[1]
        assert np.array_equal(tensors["wte.weight"], values.reshape(2, 3))
        assert tensors["empty"].shape == (0, 3) and tensors["one"] == 9


def test_weights_as_they_are_come_back(tmp_path):
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


# ---- missing and damaged files -------------------------------------------------------------------


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gpt2 is not a directory; one with config\.json"):
        load_weights(tmp_path / "gpt2")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load_weights(directory)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b'{"a": ' + b"[" * 100_000, b"[1, 2]", b"3"]
)
def test_a_damaged_config(directory, text):
    (directory / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold a JSON obj)"):
        load_weights(directory)


def test_every_truncation_is_seen(directory):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors"):
            load_weights(directory)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"{nonsense",
        {"x": ENTRY | {"shape": [2]}},
        {"x": ENTRY | {"shape": [2**62, 4]}},
        {"x": ENTRY | {"data_offsets": [4, 8]}},
        {"x": ENTRY | {"data_offsets": [0, 2**63]}},
        {"x": ENTRY | {"dtype": "F33"}},
        {"x": ENTRY, "y": ENTRY},
        {"__metadata__": {"a": 1}, "x": ENTRY},
    ],
)
def test_a_damaged_header(directory, header):
    write_raw(directory / "model.safetensors", header, bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_weights(directory)


def test_a_header_longer_than_the_file(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_weights(directory)


def test_a_config_that_json_cannot_hold_leaves_the_old_files(directory):
    with pytest.raises(ValueError, match="JSON"):
        save_weights(directory, {"layer_norm_epsilon": np.nan}, make_tensors(seed=1))
    assert_same(load_weights(directory)[1], make_tensors())


# ---- writes that fail ----------------------------------------------------------------------------

FAILING_SAVE = """
import resource, signal, sys
import numpy as np
from gpt2c.checkpoint import save_weights

directory, limited = sys.argv[1:]
large, small = np.ones(5000, np.float32), np.ones(5, np.float32)
config = {"text": "x" * 20000} if limited == "config" else {}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails instead of killing
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    save_weights(directory, config, {"wte.weight": large if limited == "model" else small})
except OSError as error:
    print(error)
else:
    sys.exit("the save did not fail")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize("limited", ["config", "model"])
def test_a_failing_write_leaves_the_old_files(tmp_path, limited):
    save_weights(tmp_path, CONFIG, make_tensors())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", FAILING_SAVE, str(tmp_path), limited],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        save_weights(tmp_path / "file" / "model", CONFIG, make_tensors())
