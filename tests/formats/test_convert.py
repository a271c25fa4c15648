"""gpt2c convert: it reads and writes other projects' files, and refuses an unclear request."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.command import program, run_process

from gpt2c.cli.main import main
from gpt2c.files.atomic import locked
from gpt2c.formats import convert, llama2c, llmc
from gpt2c.formats.nanogpt import open_nanogpt, write_nanogpt
from gpt2c.gpt2 import GPT2
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.model.model import Model
from gpt2c.text.shards import read_shards, read_tokens, write_shards, write_tokens
from gpt2c.text.splits import DIGITS
from gpt2c.text.tokenizer import Tokenizer

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with one source of each kind."""
    path = tmp_path_factory.mktemp("originals")
    tokenizer = Tokenizer.train(["the cat sat on the mat. the dog didn't. " * 9], 270)
    config = GPT2Config(tokenizer.vocab_size, 8, 32, 2, 2, eos_token_id=tokenizer.eot)
    model = GPT2(config, seed=1)
    model.save_pretrained(path / "run")
    model.quantize("fp16").save_pretrained(path / "fp16")
    for name in ("run", "data", "vocabulary"):
        tokenizer.save_pretrained(path / name)
    write_shards(path / "data", "train", np.arange(250), 100)
    write_tokens(path / "data" / "val.bin", [3, 1, 2])
    (path / "nano").mkdir()
    np.arange(250, dtype="<u2").tofile(path / "nano" / "train.bin")
    np.array([3, 1, 2], "<u2").tofile(path / "nano" / "val.bin")
    config = LlamaConfig(
        tokenizer.vocab_size, 32, 64, 2, 4, 2, max_position_embeddings=8, rms_norm_eps=1e-5
    )
    llama2c.write_model(path / "llama.bin", config, Model(config, seed=1).parameters)
    (path / "out").mkdir()
    (path / "out" / "ckpt.pt").write_bytes(b"PK\3\4")
    (path / "empty").mkdir()
    (path / "notes.txt").write_text("nothing to convert")
    (path / "some.gguf").write_bytes(b"GGUF\3\0\0\0")
    return path


@pytest.fixture
def world(originals: Path, tmp_path: Path) -> Path:
    """Return a copy of `originals`."""
    return shutil.copytree(originals, tmp_path / "world")


@pytest.fixture
def run(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return `gpt2c convert` in `world`, as a function: arguments -> (exit code, output, error)."""
    monkeypatch.chdir(world)

    def call(arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["convert", *arguments.split()])
        return code, *capsys.readouterr()

    return call


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_run_round_trips_through_llm_c(run: Run, world: Path) -> None:
    assert run("run model.bin") == (0, "model.bin: llm.c's model, 34,368 parameters, fp32\n", "")
    assert run("run my_tokenizer.bin")[1] == "my_tokenizer.bin: llm.c's tokenizer, 270 tokens\n"
    written = "back: Hugging Face's model, 34,368 parameters, float32"
    more = "; no tokenizer yet: gpt2c convert TOKENIZER back"
    assert run("model.bin back")[1] == f"{written}{more}\n"
    assert run("my_tokenizer.bin back")[1] == "back: Hugging Face's tokenizer, 270 tokens\n"
    before, after = contents(world / "run"), contents(world / "back")
    assert before.keys() == after.keys()
    ids = {"config.json", "generation_config.json"}  # llm.c's file does not name the end of text
    for name in before.keys() - ids:
        assert before[name] == after[name], name
    assert GPT2.from_pretrained("back").config.eos_token_id is None


def test_bf16_is_half_as_large_and_rounded(run: Run, world: Path) -> None:
    assert run("run model.bin")[0] == run("run half.bin --dtype bf16")[0] == 0
    sizes = [(world / name).stat().st_size - 1024 for name in ("model.bin", "half.bin")]
    assert sizes[0] == 2 * sizes[1]
    full, half = (GPT2.from_pretrained(name).flat_parameters for name in ("model.bin", "half.bin"))
    # 8 bits of each number are left: rounding changes it by 2**-8 of itself at most.
    np.testing.assert_allclose(half, full, rtol=2**-8, atol=0)
    assert (half != full).any()
    assert run("half.bin again.bin --dtype bf16")[0] == 0
    assert (world / "again.bin").read_bytes() == (world / "half.bin").read_bytes()


def test_bin_of_a_llama_is_llama2_cs(run: Run, world: Path) -> None:
    said = "again.bin: llama2.c's model, 35,872 parameters, fp32\n"
    assert run("llama.bin again.bin") == (0, said, "")
    assert (world / "again.bin").read_bytes() == (world / "llama.bin").read_bytes()
    assert run("llama.bin fp32.bin --dtype fp32")[0] == 0
    said = "new: Hugging Face's model, 35,872 parameters, float32"
    assert run("llama.bin new")[1] == f"{said}; no tokenizer yet: gpt2c convert TOKENIZER new\n"
    assert run("vocabulary tokenizer.bin")[0] == run("tokenizer.bin new")[0] == 0
    assert run("new back.bin")[0] == 0
    assert (world / "back.bin").read_bytes() == (world / "llama.bin").read_bytes()
    if importlib.util.find_spec("gguf"):
        assert run("new model.gguf")[1] == "model.gguf: GGUF, 35,872 parameters, f32\n"


def test_names_and_directories_are_tokenizers(run: Run, world: Path) -> None:
    for source in ("vocabulary", "data", "run"):
        assert run(f"{source} {source}_tokenizer.bin")[0] == 0
    assert len({(world / f"{s}_tokenizer.bin").read_bytes() for s in ("vocabulary", "data")}) == 1
    assert run("vocabulary any.bin")[1] == "any.bin: llm.c's tokenizer, 270 tokens\n"
    assert run("bytes plain.bin")[1] == "plain.bin: llm.c's tokenizer, 257 tokens\n"
    assert run("bytes directory")[1] == "directory: Hugging Face's tokenizer, 257 tokens\n"
    assert Tokenizer.from_pretrained("directory").vocab_size == 257


def test_tokenizer_that_cuts_otherwise_is_not_llmcs(run: Run, world: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    Tokenizer(ranks, 256, split=DIGITS).save_pretrained("digits")
    code, _, error = run("digits digits.bin")
    assert code == 2 and not (world / "digits.bin").exists()
    said = "digits cuts texts as smollm does, and llm.c's tokenizer only as GPT-2: name a directory"
    assert said in error


def test_ids_that_are_left_out_have_names_in_llmcs_file(run: Run, world: Path) -> None:
    special = {"<|endoftext|>": 256, "[PAD]": 259}
    Tokenizer({bytes([i]): i for i in range(256)}, 256, special=special).save_pretrained("left")
    assert run("left left.bin")[1] == "left.bin: llm.c's tokenizer, 260 tokens\n"
    tokenizer = Tokenizer(*llmc.read_tokenizer("left.bin"))
    assert [tokenizer.token_bytes(i) for i in (257, 258, 259)] == [
        b"[PAD257]",
        b"[PAD258]",
        b"[PAD]",
    ]


def test_nanogpts_token_files_get_a_header_and_lose_it(run: Run, world: Path) -> None:
    said = "a.bin: 250 tokens, llm.c's\n"
    assert run("nano/train.bin a.bin --format nanogpt") == (0, said, "")
    assert read_tokens("a.bin").tolist() == list(range(250))
    said = "b.bin: 250 tokens, nanoGPT's, without a header\n"
    assert run("a.bin b.bin --format nanogpt") == (0, said, "")
    assert (world / "b.bin").read_bytes() == (world / "nano" / "train.bin").read_bytes()


def test_directory_of_token_files_is_converted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "new: train: 250 tokens, llm.c's; val: 3 tokens, llm.c's"
    said += "; no tokenizer yet: gpt2c convert TOKENIZER new\n"
    assert run("nano new --format nanogpt") == (0, said, "")
    assert read_tokens("new/val.bin").tolist() == [3, 1, 2]
    monkeypatch.setattr(convert, "SHARD_TOKENS", 100)
    assert run("nano new --format nanogpt --overwrite") == (0, said, "")
    shards = read_shards("new", "train")
    assert [len(shard) for shard in shards] == [100, 100, 50], "and the file of before is gone"
    assert run("data old --format nanogpt")[0] == 0
    assert open_nanogpt("old/train.bin")[:].tolist() == list(range(250))
    assert contents(Path("old")) == contents(Path("nano"))


def test_directory_may_have_a_dot_in_its_name(run: Run) -> None:
    assert run("run model.bin")[0] == 0
    for name in ("model-0.1", "model-0.2/", "my.model.v2", "slash.bin/", "pickle.pt/"):
        code, out, err = run(f"model.bin {name}")
        assert (code, err) == (0, "") and out.startswith(
            f"{name.rstrip('/')}: Hugging Face's model"
        )
        assert Path(name, "model.safetensors").is_file()


def test_error_says_that_a_directory_hides_a_tokenizer(run: Run) -> None:
    Path("gpt2").mkdir()
    code, _, err = run("gpt2 tokenizer.bin")
    assert code == 2 and err.endswith("; the directory gpt2 here hides the tokenizer\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run model.txt", "model.txt: its name must say what to write"),
        ("run other", "run is a directory in Hugging Face's layout, and so would other be"),
        ("run run", "run and run are the same"),
        ("some.gguf new", "some.gguf is a GGUF file, which gpt2c can write but not read"),
        ("none model.bin", "none does not exist, nor is it one of gpt2, bytes"),
        ("empty model.bin", "empty holds no config.json, vocab.json or token files"),
        ("notes.txt model.bin", "notes.txt starts with none of llm.c's magic numbers"),
        ("nano/train.bin model.bin", "pass --format nanogpt"),
        ("nano model.bin", "--format nanogpt"),
        ("data/val.bin model.bin", "data/val.bin has only llm.c's token files"),
        ("data model.bin", "data has a tokenizer and token files, and model.bin could be either"),
        ("data/val.bin directory", "--format nanogpt"),
        ("vocabulary model.gguf", "vocabulary holds no model to convert into model.gguf"),
        ("bytes model.gguf", "bytes holds no model"),
        ("out model.bin", "out/ckpt.pt is a pickle"),
        ("out/ckpt.pt model.bin", "out/ckpt.pt is a pickle"),
        ("out/ckpt.pt a.bin --format nanogpt", "out/ckpt.pt is a pickle"),
        ("run model.bin --dtype q8_0", "model.bin takes fp32, bf16, not --dtype q8_0"),
        ("llama.bin model.bin --dtype bf16", "model.bin takes fp32, not --dtype bf16"),
        ("llama.bin model.gguf", "llama.bin has no tokenizer, which a GGUF file needs too"),
        ("llama.bin tokenizer.bin", "llama.bin has no tokenizer to convert into tokenizer.bin"),
        ("llama.bin model.onnx", "model.onnx: its name must say what to write"),
        ("run model.gguf --dtype bf16", "model.gguf takes f32, f16, q8_0, not --dtype bf16"),
        ("bytes a.bin --dtype fp32", "--dtype fp32 is for weights"),
        ("nano new --format nanogpt --dtype fp32", "--dtype fp32 is for weights"),
        ("nano a.bin --format nanogpt", "name two directories of token files"),
        ("nano/val.bin new --format nanogpt", "name two directories of token files"),
        ("nano/val.bin a.gguf --format nanogpt", "name two directories of token files"),
        ("none a.bin --format nanogpt", "token file none does not exist"),
        ("empty new --format nanogpt", "empty has no token files train.bin or val.bin"),
        ("fp16 model.bin", "fp16 holds fp16 weights: convert the model that was quantized"),
        ("data/val.bin data/val.bin", "are the same"),
    ],
)
def test_impossible_conversions_are_refused(
    run: Run, world: Path, arguments: str, message: str
) -> None:
    before = contents(world)
    code, out, err = run(arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert contents(world) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "run there.bin",
        "run there_tokenizer.bin",
        "first.bin run",
        "bytes vocabulary",
        "nano/val.bin there.bin --format nanogpt",
        "nano data --format nanogpt",
        "run there.gguf",
    ],
)
def test_convert_overwrites_only_when_told(run: Run, world: Path, arguments: str) -> None:
    if arguments.endswith("gguf") and not importlib.util.find_spec("gguf"):
        pytest.skip("writing GGUF needs the gguf package")
    assert run("run first.bin")[0] == 0
    for name in ("there.bin", "there_tokenizer.bin", "there.gguf"):
        (world / name).write_bytes(b"of value")
    before = contents(world)
    code, _, err = run(arguments)
    assert code == 2 and "exists; name another place or pass --overwrite" in err
    assert contents(world) == before
    assert run(f"{arguments} --overwrite")[0] == 0
    assert contents(world) != before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("first.bin new", "model-00002-of-00003.safetensors"),
        ("first.bin new", "model.safetensors.index.json"),
        ("first.bin new", "generation_config.json"),
        ("bytes new", "tokenizer.json"),
        ("bytes new", "added_tokens.json"),
        ("bytes new", "chat_template.jinja"),
        ("bytes new", "tokenizer_config.json"),
        ("nano new --format nanogpt", "manifest.json"),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_convert_removes_files_only_with_overwrite(
    run: Run, world: Path, arguments: str, name: str, linked: bool
) -> None:
    assert run("run first.bin")[0] == 0
    old = world / "new" / name
    old.parent.mkdir()
    (world / "value").write_text("of value")
    if linked:
        old.symlink_to(world / "value")
    else:
        old.write_text("of value")
    before = contents(world)
    code, _, err = run(arguments)
    assert (code, err) == (
        2,
        f"gpt2c: new/{name} exists; name another place or pass --overwrite\n",
    )
    assert contents(world) == before
    assert run(f"{arguments} --overwrite")[0] == 0
    assert not old.exists() or old.read_text() != "of value"


@pytest.mark.parametrize("arguments", ["first.bin run", "bytes vocabulary", "nano data"])
@pytest.mark.parametrize("shared", [False, True])
def test_convert_refuses_a_directory_in_use(
    run: Run, world: Path, arguments: str, shared: bool
) -> None:
    assert run("run first.bin")[0] == 0
    before = contents(world)
    wishes = f"{arguments} --overwrite" + " --format nanogpt" * arguments.startswith("nano")
    dst = arguments.split()[1]
    with locked(world / dst, "", shared):
        code, _, err = run(wishes)
    assert code == 2 and err.startswith(f"gpt2c: another process trains on {dst}, or prepares it")
    assert contents(world) == before
    assert run(wishes)[0] == 0


def test_convert_refuses_a_tokenizer_of_another_model(run: Run, world: Path) -> None:
    small = GPT2(GPT2Config(257, 8, 32, 2, 2), seed=1)
    small.save_pretrained(world / "small")
    assert run("small small.bin")[0] == run("vocabulary tokenizer.bin")[0] == 0
    before = contents(world)
    for source, dst in (("tokenizer.bin", "small"), ("small.bin", "vocabulary")):
        for overwrite in ("", " --overwrite"):
            code, _, err = run(f"{source} {dst}{overwrite}")
            assert code == 2 and err == (
                f"gpt2c: {dst} would have a tokenizer of 270 tokens and a model of 257, which do"
                " not belong together: name another directory\n"
            )
            assert contents(world) == before
    assert run("bytes small")[0] == 0, "one that is as large as the model"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("run out.bin", "out.bin"),
        ("run out_tokenizer.bin", "out_tokenizer.bin"),
        ("run out.gguf", "out.gguf"),
        ("first.bin new", "new/model.safetensors"),
        ("first.bin new", "new/config.json"),
        ("bytes new", "new/vocab.json"),
        ("nano/val.bin out.bin --format nanogpt", "out.bin"),
        ("data/val.bin out.bin --format nanogpt", "out.bin"),
        ("nano new --format nanogpt", "new/train.bin"),
        ("data new --format nanogpt", "new/val.bin"),
    ],
)
@pytest.mark.parametrize("old", [None, "old"])
def test_convert_keeps_links(
    run: Run, world: Path, arguments: str, name: str, old: str | None
) -> None:
    if arguments.endswith("gguf") and not importlib.util.find_spec("gguf"):
        pytest.skip("writing GGUF needs the gguf package")
    assert run("run first.bin")[0] == 0
    disk, link = world / "disk", world / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(disk / "file")
    before = contents(world)
    code, _, err = run(arguments)
    assert code == 2 and err.count("\n") == 1
    assert f"{name} is a link to {disk}/file, whose directory does not exist" in err
    assert contents(world) == before
    disk.mkdir()
    if old:
        (disk / "file").write_text(old)
        assert f"{name} exists; name another place" in run(arguments)[2]
    assert run(f"{arguments} --overwrite" if old else arguments)[::2] == (0, "")
    assert link.is_symlink() and [path.name for path in disk.iterdir()] == ["file"]
    content = link.read_bytes()
    link.unlink()
    assert run(f"{arguments} --overwrite")[0] == 0
    assert link.read_bytes() == content, "as without a link"


def test_convert_refuses_two_links_to_one_file(run: Run, world: Path) -> None:
    """If two splits led to one file, the second would replace the first."""
    (world / "new").mkdir()
    for name in ("train", "val"):
        (world / "new" / f"{name}.bin").symlink_to(world / "file")
    code, _, err = run("nano new --format nanogpt --overwrite")
    assert code == 2 and "lead to one file: remove the link" in err
    assert not (world / "file").exists() and len(list((world / "new").iterdir())) == 2
    (world / "new" / "train.bin").unlink()
    (world / "new" / "train_000007.bin").symlink_to(world / "data" / "val.bin")
    before = contents(world / "data")
    assert run("nano new --format nanogpt --overwrite")[0] == 0
    assert sorted(path.name for path in (world / "new").iterdir()) == ["train.bin", "val.bin"]
    assert contents(world / "data") == before, "a link that nothing replaces is removed itself"


def test_convert_refuses_a_link_to_nowhere(run: Run, world: Path) -> None:
    assert run("run first.bin")[0] == 0
    (world / "new").symlink_to("away")
    for arguments in ("first.bin new", "bytes new", "nano new --format nanogpt", "run new/a.bin"):
        code, _, err = run(arguments)
        assert code == 2 and "new is a link to away, which does not exist: make or mount" in err
    (world / "away").mkdir()
    assert run("first.bin new")[0] == 0 and (world / "away" / "config.json").exists()


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_convert_names_a_source_truncated_meanwhile(
    tmp_path: Path, headed: bool, whole: bool
) -> None:
    """If gpt2c mapped the file, the process would die; so it runs in its own."""
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "train.bin"
    tokens = np.arange(1 << 20) % 60000
    if headed:
        write_tokens(path, tokens)
    else:
        write_nanogpt(path, [tokens])
    src, dst = ("src", "dst") if whole else ("src/train.bin", "dst.bin")
    command = program("programs.disks", "shrink", str(path), src, dst, "--format", "nanogpt")
    done = run_process(command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gpt2c: src/train.bin was cut short while it was read: tokens 0 to 1,048,576 of 1,048,576"
        " are not there any more\n"
    )
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file != path]


def test_damaged_source_leaves_the_target(run: Run, world: Path) -> None:
    assert run("run model.bin")[0] == 0
    (world / "model.bin").write_bytes((world / "model.bin").read_bytes()[:-1])
    (world / "nano" / "val.bin").write_bytes(b"odd")
    before = contents(world)
    assert "model.bin has" in run("model.bin run --overwrite")[2]
    assert "val.bin has 3 bytes" in run("nano data --format nanogpt --overwrite")[2]
    assert contents(world) == before


@pytest.mark.parametrize("dst", ["new", "model.bin", "half.bin --dtype bf16", "model.gguf"])
def test_convert_warns_of_nonfinite_weights(run: Run, world: Path, dst: str) -> None:
    """It converts them all the same; eval and generate refuse such a model."""
    if dst.endswith("gguf") and not importlib.util.find_spec("gguf"):
        pytest.skip("writing GGUF needs the gguf package")
    name, source = dst.split()[0], "first.bin" if dst == "new" else "run"
    model = GPT2.from_pretrained("run")
    model.parameters["h.1.ln_2.bias"][3] = np.nan
    for lost in ("h.1.ln_2.bias", "h.0.attn.c_attn.weight and 1 more"):
        model.save_pretrained("run")
        if source != "run":
            assert run(f"run {source} --overwrite")[0] == 0
        code, out, err = run(f"{source} {dst} --overwrite")
        assert code == 0 and out.startswith(f"{name}: ") and Path(name).exists()
        assert err == (
            f"gpt2c: warning: {source} and {name} have nan or infinity in {lost}: the model"
            " has diverged or is damaged\n"
        )
        model.parameters["h.0.attn.c_attn.weight"][0, 0] = -np.inf


def test_format_without_nan_refuses_it(run: Run) -> None:
    if not importlib.util.find_spec("gguf"):
        pytest.skip("writing GGUF needs the gguf package")
    model = GPT2.from_pretrained("run")
    model.parameters["wte.weight"][0, 0] = np.nan
    model.save_pretrained("run")
    code, _, err = run("run model.gguf --dtype q8_0")
    assert code == 2 and "wte.weight holds nan" in err and err.count("\n") == 1
    assert not Path("model.gguf").exists()


def test_vocabulary_without_merges_is_named(run: Run, world: Path) -> None:
    assert run("bytes a.bin")[0] == 0
    content = bytearray((world / "a.bin").read_bytes())
    content[8:12] = (258).to_bytes(4, "little")
    (world / "a.bin").write_bytes(content + b"\3xyz")
    code, _, err = run("a.bin new")
    assert code == 2 and "a.bin: its ids are not in the order of BPE merges" in err
    assert not (world / "new").exists()


def test_help_shows_the_way_out_of_a_pickle(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert 'saved = torch.load("ckpt.pt"' in capsys.readouterr().out
