"""Names of models: huggingface_hub and a local stand-in for the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import refused
from helpers.command import COMMAND, environment, program
from helpers.standin_hub import COMMIT, StandIn, serve

from gpt2c import GPT2, Generator, GPT2Config, Tokenizer
from gpt2c.files import hub

REPO = "user/small"
needs_client = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None,
    reason="huggingface_hub is not installed: pip install huggingface_hub",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small model with its tokenizer."""
    directory = tmp_path_factory.mktemp("saved")
    tokenizer = Tokenizer.train(["hello world, hello again"], 264)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=8, n_layer=1, n_head=2
    )
    GPT2(config, seed=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def files(saved: Path) -> dict[str, bytes]:
    """Return the files of a repository on the hub, pickles too."""
    others = {"pytorch_model.bin": b"pickle", "training_args.bin": b"pickle", "README.md": b"#"}
    return {path.name: path.read_bytes() for path in saved.iterdir()} | others


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    """Serve a hub."""
    with serve(StandIn({})) as standin:
        yield standin


@pytest.fixture
def standin(server: StandIn, files: dict[str, bytes]) -> StandIn:
    """Return the hub as if it were new, with one model."""
    vars(server).update(vars(StandIn({REPO: files}, url=server.url)))
    return server


class Client:
    """Asks the stand-in: the process of a download reads the variables of its environment."""

    def __init__(self, standin: StandIn, root: Path) -> None:
        self.standin = standin
        self.root = root
        self.path = root / "work"
        self.path.mkdir()
        self.home = root / "some" / "where" / "home"

    def environment(self, **variables: str) -> dict[str, str]:
        """Return this process's variables without those of the hub and of proxies."""
        own = {
            name: value
            for name, value in environment().items()
            if not name.startswith("HF_") and not name.lower().endswith("_proxy")
        }
        return own | {"HF_HOME": str(self.home), "HF_ENDPOINT": self.standin.url} | variables

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=self.path,
            env=self.environment(**variables),
            timeout=60,
        )

    def find(
        self, name: str = REPO, revision: str | None = None, weights: bool = True, **variables: str
    ) -> Path:
        """Find a model."""
        with (
            patch.dict(os.environ, self.environment(**variables), clear=True),
            contextlib.chdir(self.path),
        ):
            return hub.find(name, revision, weights)

    def fails(self, name: str = REPO, revision: str | None = None, **variables: str) -> str:
        """Look for a model that cannot be found; return the error, which is one sentence."""
        with pytest.raises((OSError, ValueError)) as error:
            self.find(name, revision, **variables)
        text = str(error.value)
        assert text and not re.search(r"\n|\. [A-Z]", text), text
        return f"{type(error.value).__name__} {text}"

    def outside(self) -> set[str]:
        """Return the names of files written outside HF_HOME."""
        names = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        return {name for name in names if not name.startswith("some/where/home")} - {
            "work",
            "some",
            "some/where",
        }


@pytest.fixture
def client(standin: StandIn, tmp_path: Path) -> Client:
    """Return one with nothing on its disk."""
    return Client(standin, tmp_path)


# ---- downloads -----------------------------------------------------------------------------------


@needs_client
def test_model_is_downloaded_once(client: Client, saved: Path) -> None:
    """And a file that could hold a pickle is never downloaded."""
    done = client.run(program("programs.downloads", "read", REPO))
    assert done.returncode == 0, done.stderr
    here = Generator.from_pretrained(saved)
    text = here.generate("hello", max_new_tokens=4, temperature=0)
    assert done.stdout == f"{text}\nint8\nfp16\n{here.tokenizer.vocab_size}\n"
    assert done.stderr == "", "no one is watching"
    got = sorted(path.rpartition("/")[2] for path in client.standin.asked("GET", "/resolve/"))
    assert got == sorted(path.name for path in saved.iterdir()), "each once, and nothing else"
    assert not client.standin.asked("HEAD", "bin"), "a pickle was asked for"


@needs_client
def test_second_load_comes_from_the_cache(client: Client) -> None:
    first = client.find()
    client.standin.requests.clear()
    assert client.find() == first
    assert not client.standin.asked("GET", "/resolve/") + client.standin.asked("HEAD")
    client.standin.requests.clear()
    assert client.find(HF_HUB_OFFLINE="1") == first
    assert not client.standin.requests


@needs_client
def test_tokenizer_needs_no_weights(client: Client) -> None:
    directory = client.find(weights=False)
    assert {path.name for path in directory.iterdir()} == {
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
    }
    message = client.fails(HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in message and str(client.home) in message
    assert (client.find() / "model.safetensors").exists(), "the rest comes when it is wanted"


@needs_client
def test_revision_is_asked_for(client: Client) -> None:
    for revision in ("main", "v1", COMMIT):
        assert client.find(revision=revision).name == COMMIT
        shutil.rmtree(client.home)
    message = client.fails(revision="v2")
    assert message.startswith(f"FileNotFoundError {REPO} has no revision v2")


@needs_client
def test_names_without_a_user(client: Client, files: dict[str, bytes]) -> None:
    client.standin.files["gpt2"] = files
    assert client.find("gpt2").name == COMMIT
    assert client.standin.asked("GET", "/api/models/gpt2/")


@needs_client
def test_shards_are_fetched(client: Client, files: dict[str, bytes]) -> None:
    del files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
    files |= {"model.safetensors.index.json": b"{}", **shards, "model-x-of-y.safetensors": b"no"}
    client.standin.files[REPO] = files
    names = {path.name for path in client.find().iterdir()}
    assert names >= {"model.safetensors.index.json", *shards}
    assert "model-x-of-y.safetensors" not in names


@needs_client
def test_token_is_sent(client: Client) -> None:
    client.standin.private[REPO] = "secret"
    message = client.fails()
    assert message.startswith("FileNotFoundError") and "HF_TOKEN" in message
    client.find(HF_TOKEN="secret")
    sent = [headers for _, path, headers in client.standin.requests if "/resolve/" in path]
    assert {headers.get("authorization") for headers in sent} == {"Bearer secret"}


@needs_client
def test_broken_download_is_resumed(client: Client, files: dict[str, bytes]) -> None:
    content = files["model.safetensors"] = os.urandom(11 << 20)  # the client keeps tens of MB
    client.standin.cut["model.safetensors"] = [21 << 19]
    assert (client.find() / "model.safetensors").read_bytes() == content
    ranges = [
        headers.get("range") for _, path, headers in client.standin.requests if "tensors" in path
    ]
    assert ranges[-1] == f"bytes={10 << 20}-"


@needs_client
def test_terminal_has_a_bar(client: Client) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # in a terminal of size 0 tqdm shows nothing
    subprocess.run(
        program("programs.downloads", "find", REPO),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=True,
        env=client.environment(TERM="xterm"),
        timeout=60,
    )
    os.close(theirs)
    shown = b""
    while piece := _read(ours):
        shown += piece
    os.close(ours)
    assert b"100%" in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's error when the other side is closed
        return b""


@needs_client
def test_commands_take_repository_names(client: Client) -> None:
    choices = client.path / "choices.jsonl"
    choices.write_text('{"ctx": "hello", "endings": [" world", " again"], "label": 0}\n')
    for arguments in (
        f"generate {REPO} --prompt hello --max-new-tokens 3",
        f"eval {REPO} --choices {choices}",
    ):
        done = client.run([*COMMAND, *arguments.split()])
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(("hello", "acc "))
    done = client.run([*COMMAND, "generate", f"{REPO}x", "--prompt", "hello"])
    assert done.returncode == 2
    assert re.fullmatch(
        rf"gpt2c: the file or directory {REPO}x does not exist here, nor is {REPO}x a model on the"
        r" hub, \S+, that may be read: a private one needs HF_TOKEN\n",
        done.stderr,
    )


# ---- faults --------------------------------------------------------------------------------------


@needs_client
@pytest.mark.parametrize(
    ("fault", "variables", "message"),
    [
        ({"gated": {REPO}}, {}, rf"PermissionError {REPO} is gated: .* HF_TOKEN"),
        ({}, {"HF_TOKEN": "wrong"}, "PermissionError the f.* does not know the token"),
        (
            {"short": {"vocab.json"}},
            {},
            rf"OSError the .*{REPO} does not .* cannot be downloaded .*should be of size",
        ),
        (
            {"status": 500},
            {},
            f"ConnectionError the .*{REPO} does not exist here.*: it answers 500",
        ),
        ({}, {"HF_HUB_OFFLINE": "1"}, "FileNotFoundError the file .* HF_HUB_OFFLINE"),
        (
            {},
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            r"ConnectionError .*:9, did not deliver a model of that name: [^\[]*refused",
        ),
        ({}, {"HF_HUB_CACHE": "/dev/null/cache"}, "NotADirectoryError .*/dev/null"),
        ({}, {"SSL_CERT_FILE": "/dev/null"}, "OSError the .* cannot be downloaded .*certificate"),
    ],
)
def test_fault_of_the_hub_is_one_sentence(
    client: Client, fault: dict[str, Any], variables: dict[str, str], message: str
) -> None:
    vars(client.standin).update(fault)
    assert re.match(message, client.fails(**variables))
    assert not client.outside()


@needs_client
def test_silent_hub_times_out(client: Client) -> None:
    """The client's own timeout is ten seconds; one second is enough here."""
    client.standin.silent = True
    message = client.fails(HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert message.startswith("ConnectionError") and "timed out" in message


@needs_client
def test_cached_model_needs_no_hub(client: Client) -> None:
    first = client.find()
    assert client.find(HF_ENDPOINT="http://127.0.0.1:9") == first


@needs_client
def test_repository_of_pickles_is_refused(client: Client, files: dict[str, bytes]) -> None:
    del files["model.safetensors"]
    message = client.fails()
    assert message.startswith(f"FileNotFoundError {REPO} has no model.safetensors on the hub")
    assert "pickles" in message and not client.standin.asked("GET", ".bin")


@needs_client
def test_bad_repository_names_are_refused(client: Client) -> None:
    for name in ("a--b", "a..b", "user/x.git", "user/x-", "x" * 200):
        message = client.fails(name)
        assert message.startswith("ValueError") and name in message
    assert not client.standin.requests


# ---- hostile hubs --------------------------------------------------------------------------------


@needs_client
def test_listed_paths_outside_are_not_written(client: Client, files: dict[str, bytes]) -> None:
    up = "../" * 7
    bad = [
        f"{up}model.safetensors",
        f"{client.path}/model.safetensors",
        "x/../../model.safetensors",
    ]
    bad += [f"model-00001-of-00002.safetensors/{up}evil", "..", "/", "", "con\0fig.json"]
    client.standin.files[REPO] = dict.fromkeys(bad, b"evil") | files
    assert {path.name for path in client.find().iterdir()} >= {"config.json", "model.safetensors"}
    assert not client.outside()
    got = [path.read_bytes() for path in client.home.rglob("*") if path.is_file()]
    assert b"evil" not in got and files["config.json"] in got


@needs_client
@pytest.mark.parametrize("trick", ["commit", "etag"])
@pytest.mark.parametrize("depth", [2, 4, 5])  # in its directory, in HF_HOME, in the one above
def test_identifier_that_leads_outside_is_refused(client: Client, trick: str, depth: int) -> None:
    """The client names files after the hub's commits and hashes."""
    setattr(client.standin, trick, "../" * depth + "evil")
    message = client.fails()
    assert re.match("(ValueError|OSError|ConnectionError|FileNotFoundError) ", message)
    assert not client.outside() and not [*client.home.rglob("evil*")]


@needs_client
def test_client_of_this_process_stays_as_it_is(client: Client) -> None:
    import huggingface_hub

    session = huggingface_hub.get_session()
    hooks = {event: [*checks] for event, checks in session.event_hooks.items()}
    client.find()
    assert huggingface_hub.get_session() is session and not session.is_closed
    assert session.event_hooks == hooks


@needs_client
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_download_ends_with_its_process(client: Client, stop: signal.Signals) -> None:
    """A terminal sends SIGINT to both; another program sends it to the one alone."""
    client.standin.silent = True
    process = subprocess.Popen(
        program("programs.downloads", "find", REPO),
        env=client.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not client.standin.requests and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it asks a hub that does not answer"
        process.send_signal(stop)
        _, errors = process.communicate(timeout=20)  # the download's stderr too: it ended
    finally:
        process.kill()
    assert process.returncode == -stop
    assert errors.count("Traceback") == (stop == signal.SIGINT)


@needs_client
def test_downloaded_files_are_checked_like_any_others(
    client: Client, files: dict[str, bytes]
) -> None:
    files["config.json"] = b'{"n_layer": 1, "n_layer": 2}'
    done = client.run([*COMMAND, "generate", REPO])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "config.json is not valid JSON: 'n_layer' is there twice" in done.stderr


# ---- GPT-2's own vocabulary ----------------------------------------------------------------------


@needs_client
@pytest.mark.slow
def test_gpt2_vocabulary_comes_from_the_hub(client: Client, tmp_path: Path) -> None:
    """If tiktoken's cache is empty and its server unreachable."""
    try:
        Tokenizer.from_name("gpt2").save_pretrained(tmp_path / "bpe")
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not reachable: {error}")
    client.standin.files["gpt2"] = {p.name: p.read_bytes() for p in (tmp_path / "bpe").iterdir()}
    code = "import gpt2c; print(gpt2c.Tokenizer.from_spec('gpt2').encode('hello world'))"
    command = [sys.executable, "-W", "error", "-c", code]
    unreachable = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    unreachable["NO_PROXY"] = "127.0.0.1"
    done = client.run(command, **unreachable)
    assert done.stdout == "[31373, 995]\n", done.stderr
    client.standin.files.clear()
    done = client.run(command, **unreachable, HF_HOME=str(tmp_path / "empty"))
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert re.match(
        r"OSError: choose .* a directory with GPT-2's .*TIKTOKEN_CACHE_DIR.* the hub ", last
    )


# ---- paths ---------------------------------------------------------------------------------------


def test_path_precedes_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert hub.find("gpt2") == Path("gpt2")
    assert refused(hub.find, "gpt2", "v1") == (
        "revision 'v1' is for a name on the hub; gpt2 is a path"
    )


def test_error_says_that_a_directory_hides_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "gpt2").mkdir()
    hint = "; the directory gpt2 here hides a model of that name on the hub"
    for read, name in (
        (GPT2.from_pretrained, "config.json"),
        (Generator.from_pretrained, "config.json"),
        (Tokenizer.from_pretrained, "vocab.json"),
        (Tokenizer.from_spec, "vocab.json"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            read("gpt2")
        assert str(error.value).startswith(f"gpt2/{name} does not exist")
        assert str(error.value).endswith(hint)
        with pytest.raises((OSError, ValueError)) as error:
            read(str(tmp_path / "gpt2"))
        assert "hides a model" not in str(error.value), "it was a path"


@pytest.mark.parametrize(
    "source", ["./gpt2", "/gpt2", "a/b/c", "~/gpt2", "-x", "a b", Path("gpt3")]
)
def test_other_names_are_paths(source: Any) -> None:
    assert hub.find(source) == Path(source)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        GPT2.from_pretrained(source)


@pytest.mark.parametrize("name", ["gpt3", "runs/nothing"])
@pytest.mark.parametrize("content", ["raise ImportError", ""], ids=["missing", "before 1.0"])
def test_error_names_the_extra_for_the_hub(
    name: str, content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "huggingface_hub.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=rf"^the file or directory {name} does not exist here; .*pip install 'gpt2c\[hub\]'$",
    ):
        hub.find(name)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')", "ValueError 'utf-8' codec .*bad"),
        ("print('hello'); raise PermissionError(13, 'no', 'f')", r"PermissionError .*no: 'f'"),
        ("import ssl; raise ssl.SSLError(1, 'untrusted')", r"OSError .*untrusted"),
    ],
)
def test_any_error_of_the_client_arrives(
    content: str, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even if the client prints, which is no answer."""
    (tmp_path / "huggingface_hub.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((OSError, ValueError)) as found:
        hub.find("user/model")
    assert re.match(error, f"{type(found.value).__name__} {found.value}")


def test_program_without_python_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sys.executable would start the program again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(OSError, match=r"^the file or directory gpt3 does not exist here, .*pass a"):
        hub.find("gpt3")


def test_download_without_an_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "huggingface_hub.py").write_text("import os; os._exit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        OSError,
        match=r"^the file or directory gpt3 does not exist here, and the download of a model of"
        r" that name ended without an answer$",
    ):
        hub.find("gpt3")


def test_model_and_tokenizer_together(saved: Path, tmp_path: Path) -> None:
    generator = Generator.from_pretrained(saved)
    model, tokenizer = GPT2.from_pretrained(saved), Tokenizer.from_pretrained(saved)
    ids = tokenizer.encode("hello")
    assert np.array_equal(generator.model([ids]), model([ids]))
    small = Generator.from_pretrained(str(saved), quantize="int8").model
    assert small.weights == "int8"
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert Generator.from_pretrained(tmp_path).model.weights == "int8", "as it was saved"
