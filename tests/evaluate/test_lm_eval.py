"""GPT2LM: the harness gets what the logits give, and what its own HFLM would give."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from helpers.likely import by_hand, distribution, random_model, uniform

from gpt2c import GPT2, GPT2Config, Tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are not ours
    pytest.importorskip("lm_eval", reason="lm_eval is not installed, nor is it needed")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from gpt2c.evaluate.lm_eval import GPT2LM

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness', datasets', transformers'

TEXT = "the cat sat on the mat, the cat ran. the dog sat on the cat"
TOKENIZER = Tokenizer.train([TEXT] * 9, 300)
CONFIG = GPT2Config(
    TOKENIZER.vocab_size,
    n_positions=24,
    n_embd=24,
    n_layer=2,
    n_head=3,
    eos_token_id=TOKENIZER.eot,
)
PAIRS = [
    ("the cat", " sat on the mat"),
    ("the cat ", "sat"),
    ("", "the dog"),
    (" ", "the dog"),
    ("the cat sat on", " the"),
    ("the cat sat on", " the dog"),
    (TEXT * 3, " ran."),
    ("the cat", " \u00e9 zebra"),
    ("a<|endoftext|>the", " cat"),
    ("the cat", " sat on the mat"),
]
TEXTS = ["the", TEXT, TEXT * 4, "the cat" * 17, ""]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def lm(model: GPT2) -> GPT2LM:
    return GPT2LM(model, TOKENIZER)


def requests(kind: str, rows: list[Any]) -> list[Instance]:
    """Wrap arguments as the harness does."""
    return [
        Instance(kind, {}, row if isinstance(row, tuple) else (row,), i)
        for i, row in enumerate(rows)
    ]


def whole(context: str, continuation: str) -> tuple[np.ndarray, int]:
    """Return the tokens of a pair that fit, and the number of them in the continuation."""
    text = context.split("<|endoftext|>")
    before = TOKENIZER.encode(text[-1].rstrip())
    tokens = TOKENIZER.encode(text[-1] + continuation)
    count = len(tokens) - len(before)
    if len(text) > 1:
        tokens = [*TOKENIZER.encode(text[0]), TOKENIZER.eot, *tokens]
    if not context.strip():
        tokens = [TOKENIZER.eot, *tokens]
    return np.array(tokens[-CONFIG.n_positions - 1 :]), count


def greedy_pair(model: Any, context: str) -> tuple[str, str] | None:
    """Return a context and the token that the model finds likeliest, if it can be a text."""
    tokens = TOKENIZER.encode(context)
    likeliest = distribution(model, np.array(tokens[-24:]))[-1].argmax()
    ending = TOKENIZER.decode([likeliest])
    whole = [*tokens, likeliest]
    return (context, ending) if TOKENIZER.encode(context + ending) == whole else None


def test_adapter_is_a_model_of_the_harness(lm: GPT2LM) -> None:
    assert isinstance(lm, LM)
    assert (lm.rank, lm.world_size, lm.max_length) == (0, 1, 24)
    assert lm.eot_token_id == lm.prefix_token_id == TOKENIZER.eot


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_loglikelihood(kind: str) -> None:
    model = random_model(CONFIG, kind=kind)
    lm = GPT2LM(model, TOKENIZER)
    greedy = next(filter(None, (greedy_pair(model, TEXT[:size]) for size in range(1, len(TEXT)))))
    answers = lm.loglikelihood(requests("loglikelihood", [*PAIRS, greedy]), disable_tqdm=True)
    for (logprob, is_greedy), pair in zip(answers, [*PAIRS, greedy], strict=True):
        tokens, count = whole(*pair)
        likely = distribution(model, tokens[:-1])[-count:]
        assert logprob == pytest.approx(by_hand(model, tokens)[-count:].sum(), abs=1e-4), pair
        assert is_greedy == (likely.argmax(axis=1) == tokens[-count:]).all()
    assert len(whole(*PAIRS[6])[0]) == 25, "nothing is cut"
    assert answers[-1][1] is True and answers[0][1] is False


def test_odd_pairs_end_no_batch(lm: GPT2LM, model: GPT2) -> None:
    """The harness's own class fails an assert for each, and loses the whole batch."""
    merged = [("the c", "at"), ("th", "e"), ("t", "he"), ("the cat s", "at"), ("the c ", "at")]
    empty = [("the cat", ""), ("", ""), ("", "<|endoftext|>")]
    long = [("the", TEXT[:40].upper()), ("", "z" * 24), ("the", "z" * 25), ("", "z" * 60)]
    asked = [PAIRS[0], *merged, *empty, *long, PAIRS[1]]
    answers = lm.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    alone = lm.loglikelihood(requests("loglikelihood", PAIRS[:2]), disable_tqdm=True)
    assert (answers[0], answers[-1]) == (pytest.approx(alone[0]), pytest.approx(alone[1]))
    scores = dict(zip(asked, answers, strict=True))
    for context, continuation in merged:
        kept = context.rstrip()
        before = TOKENIZER.encode(kept)
        after = TOKENIZER.encode(context[len(kept) :] + continuation)
        tokens = np.array(before + after)
        likely = distribution(model, tokens[:-1])[len(before) - 1 :]
        expected = likely[np.arange(len(after)), after].sum()
        greedy = (likely.argmax(axis=1) == after).all()
        assert scores[context, continuation] == (pytest.approx(expected, abs=1e-4), greedy)
    for context, continuation in merged[:-1]:
        assert len(TOKENIZER.encode(context + continuation)) <= len(TOKENIZER.encode(context))
    for pair in empty:
        assert scores[pair] == (0.0, True), "what is empty is certain"
    for context, continuation in long:
        row = [*(TOKENIZER.encode(context) or [TOKENIZER.eot]), *TOKENIZER.encode(continuation)]
        expected, start = 0.0, len(row) - len(TOKENIZER.encode(continuation))
        while start < len(row):
            end = min(start + 24, len(row))
            window = np.array(row[max(0, end - 25) : end])
            expected += by_hand(model, window)[start - end :].sum()
            start = end
        assert scores[context, continuation] == (pytest.approx(expected, abs=1e-3), False)


def test_loglikelihood_rolling(lm: GPT2LM, model: GPT2) -> None:
    answers = lm.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS), disable_tqdm=True)
    assert answers[-1] == 0
    for total, text in zip(answers, TEXTS, strict=True):
        tokens = np.array([TOKENIZER.eot, *TOKENIZER.encode(text)])
        expected, done = 0.0, 1  # windows of 24 tokens read, each the context of the 24 to come
        while done < len(tokens):
            end = min(done + 24, len(tokens))
            window = tokens[max(0, end - 25) : end]
            expected += by_hand(model, window)[done - end :].sum()
            done = end
        assert total == pytest.approx(expected, abs=1e-3)
    assert len(TOKENIZER.encode(TEXTS[2])) > 48, "there are no windows"


def test_generate_until(lm: GPT2LM, model: GPT2) -> None:
    def continued(context: str, new: int) -> list[int]:
        tokens = (TOKENIZER.encode(context) or [TOKENIZER.eot])[-(24 - new) :]
        out = model.generate([tokens], new, temperature=0, eos_token_id=TOKENIZER.eot)[0]
        return [int(token) for token in out[len(tokens) :] if token != TOKENIZER.eot]

    def ask(context: str, **settings: Any) -> str:
        (text,) = lm.generate_until(requests("generate_until", [(context, settings)]), True)
        return str(text)

    for context in ("the cat", "", TEXT):
        text = TOKENIZER.decode(continued(context, 9))
        assert len(text) > 3
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
            assert ask(context, until=[], **{name: 9}) == text
        assert ask(context, until=text[2], max_gen_toks=9) == text[: text.index(text[2])]
        stops = [text[3:], "", "never there"]
        assert (
            ask(context, until=stops, max_gen_toks=9, do_sample=False, temperature=0.0)
            == (text[: text.index(text[3:])])
        )
        assert ask(context, max_gen_toks=9, do_sample=False, temperature=2.0) == text
        assert ask(context) == TOKENIZER.decode(continued(context, 12)), "half of 24 by default"
    plain = ask("the cat", max_gen_toks=9)
    for neutral in (
        *({"num_beams": 1}, {"num_beams": None}, {"use_cache": True}, {"use_cache": False}),
        *({"early_stopping": True}, {"pad_token_id": 0}, {"pad_token_id": None}, {"until": None}),
        *({"eos_token_id": TOKENIZER.eot}, {"length_penalty": 2.0}, {"num_return_sequences": 1}),
        *({"typical_p": 1.0}, {"min_length": 0}, {"repetition_penalty": 1.0}, {"max_length": None}),
        *({"do_sample": False, "top_p": 0.0, "top_k": 0, "temperature": 0.7}, {"do_sample": None}),
        *({"suppress_tokens": None}, {"guidance_scale": 1}, {"output_scores": False}),
        *({"max_gen_toks": 9.0}, {"top_k": 5.0}, {"bos_token_id": 3}, {"output_logits": False}),
        *({"temperature": 0, "top_p": 0.9, "min_p": 0.1, "seed": 3}, {"no_repeat_ngram_size": 0}),
    ):
        assert ask("the cat", **{"max_gen_toks": 9} | neutral) == plain, neutral
    for total, new in ((9, 9 - len(TOKENIZER.encode("the cat"))), (1000, 12), (2, 0), (0, 0)):
        text = TOKENIZER.decode(continued("the cat", new)) if new else ""
        assert ask("the cat", max_length=total) == text, "the context is a part of it"
    assert ask("the cat", max_length=1, min_new_tokens=3) == ""
    drawn = [
        ask("the", max_gen_toks=9, temperature=5.0, seed=seed, top_k=100) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask("the", max_gen_toks=9, do_sample=True, seed=1) != ask("the", max_gen_toks=9)


def test_end_of_text_ends_a_text(model: GPT2) -> None:
    model = uniform(CONFIG)
    model.parameters["ln_f.bias"][...] = 1
    model.parameters["wte.weight"][TOKENIZER.eot] = 1
    lm = GPT2LM(model, TOKENIZER)
    assert lm.generate_until(requests("generate_until", [("the", {"until": []})]), True) == [""]


def test_answers_are_kept_for_the_cache(lm: GPT2LM, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[Any, Any] = {}

    def keep(kind: str, arguments: Any, result: Any) -> None:
        kept[kind, str(arguments)] = result

    monkeypatch.setattr(lm.cache_hook, "add_partial", keep)
    (score,) = lm.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [TEXT]), True)
    wanted = {"until": ["."], "max_gen_toks": 3}
    (text,) = lm.generate_until(requests("generate_until", [("a", wanted)]), True)
    assert kept == {
        ("loglikelihood", str(PAIRS[0])): score,
        ("loglikelihood_rolling", str((TEXT,))): total,
        ("generate_until", str(("a", wanted))): text,
    }


def test_adapter_refuses_bad_requests(
    lm: GPT2LM, model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(**settings: Any) -> str:
        return refused(
            lm.generate_until, requests("generate_until", [("a", settings)]), disable_tqdm=True
        )

    assert "n_positions = 24 tokens, got 24" in generate(max_gen_toks=24)
    assert "got -1" in generate(max_gen_toks=-1)
    assert generate(num_beams=1, foo="x", bar=4, use_cache=True).startswith(
        "generation_kwargs: gpt2c has no bar=4, foo='x'; "
    )
    for name, value in (("penalty_alpha", 0.6), ("typical_p", 0.9), ("num_return_sequences", 2)):
        message = generate(**{name: value})
        assert message.startswith(f"generation_kwargs: {name} must be ")
        assert message.endswith(f"got {value}")
    for name, value in (("max_gen_toks", 2.5), ("max_length", "9"), ("do_sample", "no")):
        assert f" must be a whole number, got {value!r}" in generate(**{name: value}) or (
            "do_sample must be True or False, got 'no'" in generate(**{name: value})
        )
    assert generate(until=["a", 5]).endswith("until must be strings, got 5")
    assert generate(until=5).endswith("until must be strings, got 5")
    assert "did you mean min_new_tokens?" in generate(min_length=5)
    assert "top_p must be " in generate(do_sample=True, top_p=1.5)
    asked: list[str] = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, *_: asked.append(kind))
    pairs = [("a", {"max_gen_toks": 3}), ("a", {"num_beams": 4})]
    message = refused(lm.generate_until, requests("generate_until", pairs), True)
    assert "num_beams must be 1" in message
    assert not asked, "a mistake in the last request showed after the work of the first"
    large = Tokenizer.train([TEXT * 2 + "bad mad sad"] * 9, 310)
    assert "do not belong together" in refused(GPT2LM, model, large)


# ---- through the harness -------------------------------------------------------------------------


def task(name: str, rows: list[dict[str, Any]], **config: Any) -> Any:
    """Return a task in memory."""
    datasets = pytest.importorskip("datasets")
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            **config,
        }
    )


def evaluated(lm: GPT2LM, what: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        lm,
        tasks=[what],
        bootstrap_iters=0,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),  # thousands are slow to load
    )
    return {name.split(",")[0]: value for name, value in results["results"][what.task_name].items()}


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_multiple_choice_task(kind: str) -> None:
    model = random_model(CONFIG, kind=kind)
    choices = ["sat on the mat", "ran", "\u00e9 zebra"]
    rows = [
        {"ctx": context, "choices": choices, "label": label}
        for context in ("the cat", "the dog", "a", "the mat, the")
        for label in range(3)
    ]
    right = []
    for row in rows:
        sums = []
        for choice in choices:
            tokens, count = whole(row["ctx"], " " + choice)
            sums.append(by_hand(model, tokens)[-count:].sum())
        by_length = [total / len(text) for total, text in zip(sums, choices, strict=True)]
        right.append([np.argmax(scores) == row["label"] for scores in (sums, by_length)])
    figures = evaluated(
        GPT2LM(model, TOKENIZER),
        task(
            "choices",
            rows,
            output_type="multiple_choice",
            doc_to_text="{{ctx}}",
            doc_to_choice="choices",
            doc_to_target="label",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
    )
    assert [figures["acc"], figures["acc_norm"]] == pytest.approx(np.mean(right, axis=0))
    assert figures["acc"] == pytest.approx(1 / 3), "one label of three is right for each context"


def test_tasks_of_perplexity_and_generation(lm: GPT2LM, model: GPT2) -> None:
    rows = [{"text": text} for text in TEXTS[:4]]
    totals = lm.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS[:4]), True)
    size = sum(len(text.encode()) for text in TEXTS)
    figures = evaluated(
        lm,
        task(
            "rolling",
            rows,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
    )
    assert figures["bits_per_byte"] == pytest.approx(-sum(totals) / size / math.log(2))

    wanted = {"until": ["\n"], "max_gen_toks": 4}
    texts = lm.generate_until(
        requests("generate_until", [(text, wanted) for text in TEXTS[:4]]), True
    )
    answers = [texts[0], "no", texts[2], "no"]
    figures = evaluated(
        lm,
        task(
            "generation",
            [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)],
            output_type="generate_until",
            doc_to_text="{{text}}",
            doc_to_target="{{answer}}",
            generation_kwargs=wanted,
            metric_list=[{"metric": "exact_match"}],
            filter_list=[{"name": "none", "filter": [{"function": "take_first"}]}],
        ),
    )
    assert figures["exact_match"] == pytest.approx(0.5)


def test_harness_own_class_gives_the_same(lm: GPT2LM, model: GPT2, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="HFLM needs accelerate")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    theirs = HFLM(
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path),
        device="cpu",
        batch_size=2,
        logits_cache=False,  # version 0.4.13 confuses two pairs whose joined texts are equal
    )
    assert theirs.max_length == 24
    pairs = [pair for pair in PAIRS if pair[0] != " "]  # theirs refuses a context of spaces
    asked = requests("loglikelihood", pairs)
    for ours, other in zip(lm.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert ours == (pytest.approx(other[0], abs=1e-3), other[1])
    asked = requests("loglikelihood_rolling", TEXTS)
    assert lm.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked), abs=1e-3
    )
    for wanted in (
        {"until": ["at", "e"], "max_gen_toks": 9},
        {"until": [], "max_gen_toks": 5, "do_sample": False},
        {"max_gen_toks": 12, "temperature": 0.0},
    ):
        asked = requests("generate_until", [(text, wanted) for text in TEXTS[:4]])
        assert lm.generate_until(asked) == theirs.generate_until(asked)


def test_quantized_weights_generate(model: GPT2) -> None:
    lm = GPT2LM(model.quantize("int8"), TOKENIZER)
    (text,) = lm.generate_until(requests("generate_until", [("the", {"max_gen_toks": 5})]), True)
    tokens = lm.model.generate([TOKENIZER.encode("the")], 5, temperature=0)[0]
    assert text == TOKENIZER.decode(tokens[len(TOKENIZER.encode("the")) :])
