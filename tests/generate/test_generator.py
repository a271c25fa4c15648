"""The generator: stop strings, characters that span tokens, several texts together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.backends import TWO_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2c import GPT2, Generator, GPT2Config, Tokenizer
from gpt2c.kernels.backend import get_backend
from gpt2c.model.language_model import LanguageModel

BYTES = Tokenizer.from_name("bytes")
END = BYTES.eot  # 256


class Script:
    """A decoder that continues each text as a script says."""

    def __init__(self, answers: dict[bytes, bytes], slots: int, capacity: int) -> None:
        self.capacity = capacity
        self._answers = answers
        self._left: list[Iterator[int]] = [iter(()) for _ in range(slots)]

    def _logits(self, slot: int) -> np.ndarray:
        logits = np.zeros(257)
        logits[next(self._left[slot], END)] = 1e4
        return logits

    def read(self, tokens: np.ndarray, slot: int, position: int) -> np.ndarray:
        assert position == 0
        self._left[slot] = iter(self._answers[bytes(t for t in tokens.tolist() if t != END)])
        return self._logits(slot)

    def step(self, tokens: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.stack([self._logits(slot) for slot in slots])

    def copy(self, source: int, target: int, length: int) -> None:
        rest = list(self._left[source])
        self._left[source], self._left[target] = iter(rest), iter(rest)


class Scripted(LanguageModel):
    """A model of bytes that answers prompts as a script says, and then ends the text."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        config = GPT2Config(257, n_positions=400, n_embd=1, n_layer=1, n_head=1)
        super().__init__(config, get_backend("numpy"))
        self._answers = answers

    def decoder(self, slots: int = 1, capacity: int | None = None, cache: str = "fp32") -> Any:
        return Script(self._answers, slots, capacity or 400)


def answering(answer: str | bytes) -> Generator:
    answer = answer.encode() if isinstance(answer, str) else answer
    return Generator(Scripted({b"": answer, b"ab": answer}), BYTES)


def both_ways(answer: str | bytes, **settings: Any) -> str:
    """Return the text of `generate`, which must equal the joined pieces of `stream`."""
    generator = answering(answer)
    text = generator.generate("ab", max_new_tokens=300, **settings)
    pieces = list(generator.stream("ab", max_new_tokens=300, **settings))
    assert "".join(pieces) == text and all(pieces), "no piece is empty"
    return str(text)


# ---- characters ----------------------------------------------------------------------------------

WORLD = "naïve café, 你好, 😀!\u2028é̂\n"


def test_text_goes_up_to_the_end_token() -> None:
    assert both_ways("cd") == "cd"
    assert both_ways("") == ""
    assert both_ways(WORLD) == WORLD


def test_each_piece_is_a_whole_character_as_soon_as_it_is_whole() -> None:
    pieces = answering(WORLD).stream("ab", max_new_tokens=300)
    assert list(pieces) == list(WORLD)
    pieces = answering("é" + "x" * 99).stream("ab", max_new_tokens=300)
    assert next(pieces) == "é"


def test_text_that_ends_within_a_character_shows_it() -> None:
    generator = answering("a你b")
    for count, text in [(0, ""), (1, "a"), (2, "a\ufffd"), (3, "a\ufffd"), (4, "a你"), (9, "a你b")]:
        assert generator.generate("ab", max_new_tokens=count) == text
        assert "".join(generator.stream("ab", max_new_tokens=count)) == text


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_become_a_text(answer: bytes) -> None:
    """Bytes that are not UTF-8 become U+FFFD, whether they come together or one by one."""
    assert both_ways(answer) == answer.decode(errors="replace")


def test_end_token_is_not_in_the_text() -> None:
    generator = answering("cd")
    assert generator.generate("ab", max_new_tokens=9, eos_token_id=None) == "cd"
    assert generator.count == 9, "it went on, with end tokens"


def test_another_token_may_be_the_end() -> None:
    assert both_ways("cd.ef", eos_token_id=ord(".")) == "cd."
    assert both_ways("cd.ef", eos_token_id=[ord("."), ord("d")]) == "cd"


# ---- stop strings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        ("one. two", ".", "one"),
        ("one. two", ["! ", ". "], "one"),
        ("one", "x", "one"),
        ("one", [], "one"),
        ("one", None, "one"),
        ("stop", "stop", ""),
        ("a stop", "stop", "a "),
        ("a sto", "stop", "a sto"),  # it only began
        ("aaab", "aab", "a"),
        ("ababac", "abac", "ab"),
        ("xyz", ["yz", "xyz"], ""),  # of those that end together, the first in the text
        ("abcd", ["bcd", "b"], "a"),  # the first one that is complete
        ("user: hi", ["\nuser:", "user:"], ""),
        ("你好。再见", "。", "你好"),
        ("你好。再见", "再见", "你好。"),
        ("日本", "本", "日"),
        ("日木", "本", "日木"),  # 本 and 木 begin with the same byte
        ("né", "é", "n"),
        ("a\ufffdb", "\ufffd", "a"),
        ("line\n\nline", "\n\n", "line"),
        ("<|endoftext|>", "<|end", ""),
    ],
)
def test_stop_string_ends_the_text_before_it(answer: str, stop: Any, text: str) -> None:
    assert both_ways(answer, stop=stop) == text


def expected_text(answer: str, stops: Sequence[str], least: int = 0) -> str:
    """Return the text before the stop string that ends first; none begins before `least`."""
    for end in range(len(answer) + 1):
        found = [answer[:end].find(stop, least) for stop in stops]
        if any(place >= 0 for place in found):
            return answer[: min(place for place in found if place >= 0)]
    return answer


ABC = st.text("abé", max_size=12)
STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


@given(ABC, STOPS)
@settings(max_examples=400, deadline=None)
@pytest.mark.slow
def test_stop_strings_cut_any_text(answer: str, stops: list[str]) -> None:
    assert both_ways(answer, stop=stops) == expected_text(answer, stops)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
       st.integers(0, 6))  # fmt: skip
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_no_stop_string_begins_before_min_new_tokens(
    answer: str, stops: list[str], least: int
) -> None:
    answer += "a" * max(0, least - len(answer))  # otherwise the end token is the forbidden one
    expected = expected_text(answer, stops, least)
    assert both_ways(answer, stop=stops, min_new_tokens=least) == expected


def test_no_end_comes_before_min_new_tokens() -> None:
    """Where the end is forbidden a random token follows, because the script has none."""
    text = both_ways("ab.cd.ef", eos_token_id=ord("."), min_new_tokens=5, seed=1)
    assert re.fullmatch(r"ab[^.]cd\.", text)
    text = answering("ab").generate("ab", min_new_tokens=5, max_new_tokens=5, top_k=1)
    assert text == "ab\0\0\0", "the first of equals"


def test_possible_start_of_a_stop_string_is_held_back() -> None:
    pieces = answering("one <b> two <br> x").stream("ab", max_new_tokens=300, stop="<br>")
    assert list(pieces) == [*"one ", "<b>", *" two "]
    pieces = answering("a<b").stream("ab", max_new_tokens=300, stop="<br>")
    assert list(pieces) == ["a", "<b"], "at the end there is nothing to wait for"


def test_stop_string_ends_the_computation() -> None:
    generator = answering("one. two")
    generator.generate("ab", max_new_tokens=300, stop=".")
    assert generator.count == 4


@pytest.mark.parametrize("wrong", ["", [""], ["a", ""], [1], 3, [b"a"], [None]])
def test_bad_stop_strings_are_refused(wrong: Any) -> None:
    for call in (answering("x").generate, answering("x").stream):
        assert refused(call, "ab", stop=wrong).startswith("stop")


# ---- several texts -------------------------------------------------------------------------------


def small(backend: Any = "auto", V: int = 257, eos: int | None = END) -> GPT2:
    config = GPT2Config(
        V, n_positions=40, n_embd=24, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=eos
    )
    return GPT2(config, seed=4, backend=backend)


PROMPTS = ["a", "", "the cat sat on the mat", "你好", "ab" * 20]


@TWO_BACKENDS
def test_texts_together_are_those_alone_and_those_of_the_stream(backend: Any) -> None:
    generator = Generator(small(backend), BYTES)
    settings = {"max_new_tokens": 30, "temperature": 0}  # the last prompt's context is full
    together = generator.generate(PROMPTS, **settings)
    assert together == [generator.generate(prompt, **settings) for prompt in PROMPTS]
    assert together == ["".join(generator.stream(prompt, **settings)) for prompt in PROMPTS]
    assert len(set(together)) > 1


@TWO_BACKENDS
def test_each_text_has_its_own_random_numbers_and_stop_strings(backend: Any) -> None:
    generator = Generator(small(backend), BYTES)
    settings = {"max_new_tokens": 20, "seed": 3, "top_k": 40}
    together = generator.generate(PROMPTS, **settings)
    assert together == generator.generate(PROMPTS, **settings)
    assert together[0] == generator.generate(PROMPTS[0], **settings)
    assert together[2] == generator.generate(["x", "y" * 30, PROMPTS[2]], **settings)[2]
    assert together != generator.generate(PROMPTS, **settings | {"seed": 4})
    others = generator.generate(PROMPTS, **settings, stop=[together[0][1]])
    assert others[0] == together[0][:1]
    assert others[2] == together[2].split(together[0][1])[0], "each has stop strings of its own"


def test_each_text_ends_on_its_own() -> None:
    generator = Generator(Scripted({b"1": b"one.", b"2": b"", b"3": b"three. x"}), BYTES)
    assert generator.generate(["1", "2", "3"], max_new_tokens=50, stop=".") == ["one", "", "three"]
    assert generator.count == 4 + 1 + 6


def test_several_texts_of_a_prompt(backend: Any) -> None:
    generator = Generator(small(backend), BYTES)
    settings = {"max_new_tokens": 15, "seed": 3}
    texts = generator.generate("ab", num_return_sequences=3, **settings)
    assert len(texts) == 3 == len(set(texts)) and texts[0] == generator.generate("ab", **settings)
    assert texts == generator.generate(["ab"] * 3, **settings)
    both = generator.generate(["ab", "c"], num_return_sequences=3, **settings)
    assert both[:3] == texts and len(both) == 6


def test_one_prompt_in_a_list_gives_a_list() -> None:
    generator = answering("cd")
    assert generator.generate(["ab"]) == ["cd"]
    assert generator.generate(("ab",)) == ["cd"]
    assert generator.generate("ab", num_return_sequences=2) == ["cd", "cd"]


def test_empty_prompt_starts_a_text() -> None:
    for eos in (END, None):  # a config may lack the end of text, which the tokenizer has
        model = small(eos=eos)
        text = Generator(model, BYTES).generate("", max_new_tokens=12, temperature=0)
        ids = model.generate([[END]], 12, temperature=0, stop=END)[0, 1:]
        assert text == BYTES.decode(token for token in ids if token != END)


def test_texts_begin_as_the_tokenizer_says() -> None:
    model, tokenizer = small(), Tokenizer.from_name("bytes")
    plain = Generator(model, tokenizer).embed("ab")
    tokenizer.add_bos_token = True
    generator = Generator(model, tokenizer)
    (ids,) = model.generate([[END, 97, 98]], 12, temperature=0).tolist()
    wanted = [token for token in ids[3:] if token != END]
    assert generator.generate("ab", max_new_tokens=12, temperature=0) == BYTES.decode(wanted)
    (start,) = model.generate([[END]], 5, temperature=0).tolist()
    wanted = [token for token in start[1:] if token != END]
    assert generator.generate("", max_new_tokens=5, temperature=0) == BYTES.decode(wanted)
    named = {"allowed_special": "all", "max_new_tokens": 5, "temperature": 0}
    assert generator.generate("<|endoftext|>", **named) == BYTES.decode(wanted)  # is there already
    assert not np.array_equal(generator.embed("ab"), plain)
    assert np.array_equal(generator.embed("ab"), model.embed([[END, 97, 98]])[0])


def padded(backend: Any = "auto", V: int = 300) -> tuple[GPT2, GPT2]:
    """Return a model, and the same model with additional rows, which it finds likeliest."""
    model, larger = small(backend), small(backend, V=V)
    for name, parameter in larger.parameters.items():
        parameter[: len(model.parameters[name])] = model.parameters[name]
    larger.parameters["wte.weight"][257:] = 3 * model.parameters["wte.weight"][65]
    return model, larger


@TWO_BACKENDS
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_k": 280}, {"seed": 2, "top_p": 1}],
)
def test_padding_ids_are_never_drawn(settings: Any, backend: Any) -> None:
    """In a vocabulary rounded up in size, texts are as without the padding."""
    model, larger = padded(backend)
    assert (larger.generate([[65]], 30, **settings) >= 257).any(), "without a tokenizer it does"
    settings = settings | {"max_new_tokens": 45}  # the context fills up
    texts = [Generator(each, BYTES).generate(["a", "bc"], **settings) for each in (model, larger)]
    assert texts[0] == texts[1]
    pairs = [list(Generator(each, BYTES).tokens("ab", 280, **settings)) for each in (model, larger)]
    for one, other in zip(*pairs, strict=True):
        assert (one.id, one.data) == (other.id, other.data)
        assert one.probability == pytest.approx(other.probability, rel=1e-4)
        assert len(other.candidates) == 257
        assert sum(share for _, share in other.candidates) == pytest.approx(1)


def test_special_token_among_padding_ids_may_be_drawn() -> None:
    _, larger = padded()
    tokenizer = Tokenizer(BYTES._ranks, END, special={"<|endoftext|>": END, "[PAD]": 290})
    ids = {token.id for token in Generator(larger, tokenizer).tokens("ab", seed=1, temperature=9.0)}
    assert ids and all(token <= END or token == 290 for token in ids)
    text = Generator(larger, tokenizer).generate("ab", seed=1, max_new_tokens=30)
    assert "[PAD]" in text, "it stands beside the likeliest, and is a token of the tokenizer's"
    assert "[PAD]" not in Generator(larger, tokenizer, 290).generate("ab", seed=1)


# ---- special tokens in a prompt ------------------------------------------------------------------


def test_prompt_may_have_special_tokens() -> None:
    mark = "<|endoftext|>"
    model = Scripted({b"ab": b"the token", f"a{mark}b".encode(): b"the text"})
    generator = Generator(model, BYTES)
    prompt = f"a{mark}b"
    assert generator.generate(prompt) == "the text"
    for allowed in ("all", [mark]):
        assert generator.generate(prompt, allowed_special=allowed) == "the token"
        assert generator.generate([prompt, "ab"], allowed_special=allowed) == ["the token"] * 2
        assert "".join(generator.stream(prompt, allowed_special=allowed)) == "the token"
        data = [token.data for token in generator.tokens(prompt, allowed_special=allowed)]
        assert b"".join(data) == f"the token{mark}".encode()
    assert "'[PAD]' is none of" in refused(generator.generate, "a", allowed_special=["[PAD]"])


# ---- ends of texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "ends"),
    [
        (None, END),
        ({}, END),
        ({"eos_token_id": None}, END),
        ({"eos_token_id": 97}, [97]),
        ({"eos_token_id": [97, END]}, [97, END]),
        ({"eos_token_id": [97, 50256]}, [97]),
        ({"eos_token_id": 50256}, END),  # transformers' default in a smaller vocabulary
        ({"eos_token_id": -1}, END),
        ({"eos_token_id": []}, END),
    ],
)
def test_directory_may_name_the_ends_of_texts(entries: Any, ends: Any, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    assert json.loads(file.read_bytes())["eos_token_id"] == END, "what is saved is read"
    assert Generator.from_pretrained(tmp_path).eos_token_id == [END]
    file.unlink()
    if entries is not None:
        file.write_text(json.dumps(entries))
    generator = Generator.from_pretrained(tmp_path)
    assert generator.eos_token_id == ends
    assert Generator.from_pretrained(tmp_path / "model.safetensors").eos_token_id == ends


@pytest.mark.parametrize("wrong", ["97", [97, None], True, 97.0, {"a": 1}])
def test_bad_ends_of_text_are_refused(wrong: Any, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    message = refused(Generator.from_pretrained, tmp_path)
    assert "eos_token_id must be a token id or several, got " in message


def test_generators_ends_count_unless_a_call_has_its_own() -> None:
    generator = Generator(Scripted({b"ab": b"cd.ef"}), BYTES, [ord("."), END])
    assert generator.generate("ab") == "cd." == "".join(generator.stream("ab"))
    assert generator.generate("ab", eos_token_id=ord("d")) == "cd"


def test_generators_cache_counts_unless_a_call_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, taken = small(), []
    decoder = model.decoder
    monkeypatch.setattr(model, "decoder", lambda *given: taken.append(given[2]) or decoder(*given))
    generator = Generator(model, BYTES, cache="int8")
    generator.generate("ab", max_new_tokens=2)
    generator.generate(["ab", "cd"], max_new_tokens=2, cache="fp16")
    list(generator.stream("ab", max_new_tokens=2, cache=None))
    model.generate([[1, 2]], 2)
    list(model.stream([[1, 2]], 2, cache="fp16"))
    assert taken == ["int8", "fp16", "int8", "fp32", "fp16"]


def test_special_end_token_is_not_in_the_text() -> None:
    special = {"<|endoftext|>": END, "<|im_end|>": 0}
    ranks = {token: i for token, i in BYTES._ranks.items() if i} | {b"\0": 257}
    tokenizer = Tokenizer(ranks, END, special=special)
    config = GPT2Config(258, n_positions=400, n_embd=1, n_layer=1, n_head=1)
    model = Scripted({b"ab": b"cd\0ef"})
    model.config = config
    assert Generator(model, tokenizer, [0, END]).generate("ab") == "cd"
    assert Generator(model, tokenizer).generate("ab") == "cd<|im_end|>ef"
    assert Generator(model, tokenizer).generate("ab", stop="<|im_end|>") == "cd"


# ---- probabilities of tokens ---------------------------------------------------------------------


def test_tokens_have_the_models_own_probabilities(backend: Any) -> None:
    generator = Generator(small(backend), BYTES)
    settings = {"max_new_tokens": 12, "seed": 3, "temperature": 2.0, "top_k": 40}
    tokens = list(generator.tokens("ab", 4, **settings))
    assert generator.count == len(tokens) == 12
    text = b"".join(token.data for token in tokens if token.id != END).decode(errors="replace")
    assert text == generator.generate("ab", **settings)
    ids = BYTES.encode("ab")
    for token in tokens:
        logits = generator.model([ids])[0, -1].astype(np.float64)
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert token.probability == pytest.approx(p[token.id], rel=1e-4)
        assert [i for i, _ in token.candidates] == np.argsort(-p, kind="stable")[:4].tolist()
        assert [q for _, q in token.candidates] == pytest.approx(np.sort(p)[:-5:-1], rel=1e-4)
        assert token.data == BYTES.token_bytes(token.id)
        ids.append(token.id)


def test_token_that_ends_a_text_comes_as_well() -> None:
    generator = answering("one. two")
    assert [token.id for token in generator.tokens("ab", stop=".")] == [*b"one."]
    assert [token.id for token in answering("cd").tokens("ab", 0)] == [*b"cd", END]
    assert [token.candidates for token in answering("c").tokens("ab", 0)] == [[], []]
    assert all(len(token.candidates) == 257 for token in answering("c").tokens("ab", 999))


# ---- counting, mistakes --------------------------------------------------------------------------


def test_tokens_are_counted() -> None:
    generator = answering("cd")
    generator.generate("ab")
    assert generator.count == 3  # the end is a token
    list(generator.stream("ab"))
    assert generator.count == 6
    pieces = generator.stream("ab")
    next(pieces)
    assert generator.count == 7


def test_generator_refuses_mistakes_before_any_work() -> None:
    generator = Generator(small(), BYTES)
    for wrong, message in [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"eos_token_id": 257}, "eos_token_id"),
        ({"logprobs": True}, "logprobs belong to tokens"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"cache": "bf16"}, "cache must be one of fp32, fp16, int8, got 'bf16'"),
    ]:
        for call in (generator.generate, generator.stream):
            assert refused(call, "ab", **wrong).startswith(message)
    assert refused(generator.tokens, "ab", -1) == "candidates must be at least 0, got -1"
    for call in (generator.generate, generator.stream, generator.tokens):
        assert "is 41 tokens; this model's context is 40" in refused(call, "x" * 41)
        with pytest.raises(TypeError, match="beam"):
            call("ab", beam=5)
    assert "num_return_sequences" in refused(generator.stream, "ab", num_return_sequences=2)
    for door, name in ((generator.generate, "prompt"), (generator.embed, "texts")):
        for nothing in ([], (), iter([])):
            message = f"{name} must be a string or a list of at least one, got none"
            assert refused(door, nothing) == message
    for wrong, got in ((5, "5, which is for model.embed"), (None, "None"), (b"ab", "b'ab'")):
        assert (
            refused(generator.embed, wrong)
            == f"texts must be a string or a list of them, got {got}"
        )
    assert refused(Generator, BYTES, small()).startswith("model must be a GPT2 or Llama, got T")
    assert refused(Generator, small(), "gpt2") == "tokenizer must be a Tokenizer, got 'gpt2'"
    assert refused(Generator, small(), BYTES, cache="q8").startswith("cache must be one of fp32,")
    for end in ("x", b"x", 999, -1, 1.5, [END, None], np.array(3)):
        assert refused(Generator, small(), BYTES, end).startswith("eos_token_id: ")
    assert refused(generator.generate, np.array(3)).startswith("prompt must be a string or a list")
    assert generator.count == 0


@pytest.mark.parametrize(
    ("prompt", "got"),
    [
        (b"abc", "b'abc'"),
        (None, "None"),
        (5, "5, which is for model.generate"),
        ([1, 2], "1, which is for model.generate"),
        (np.arange(3), ", which is for model.generate"),
        (["a", None], "None"),
        ([b"a"], "b'a'"),
    ],
)
def test_prompt_is_a_string(prompt: Any, got: str) -> None:
    message = refused(answering("").generate, prompt)
    assert message.startswith("prompt must be a string or a list of them, got ")
    assert message.endswith(got)
    for call in (answering("").stream, answering("").tokens):
        assert refused(call, prompt).startswith("prompt must be a string, got ")


def test_another_models_tokenizer_is_refused() -> None:
    message = refused(Generator, small(V=256, eos=None), BYTES)
    assert "257 tokens" in message and "256" in message and "do not belong together" in message
