"""Methods of fine-tuning on several ranks, and in one process: each case is a run of six steps."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2c.cli.main import main as command
from gpt2c.finetune import classify, distill, dpo, grpo, reward, rollouts, sft
from gpt2c.finetune.dpo import DPOSettings
from gpt2c.gpt2 import GPT2
from gpt2c.parallel import gradients
from gpt2c.parallel.gradients import Exchange
from gpt2c.parallel.world import first_voice, join
from gpt2c.train import hooks, loop
from programs.common import main
from programs.ranks import replace, world

# 5 examples, which no number of ranks shares equally; a rank reads its share in several parts.
SHARED: dict[str, Any] = {
    "learning_rate": 3e-3, "max_iters": 6, "eval_interval": 3, "save_interval": 2, "keep": 4,
    "batch_size": 5, "batch_tokens": 48, "val_fraction": 0.3,
}  # fmt: skip


def words(count: int) -> list[str]:
    rng = random.Random(1)
    found = ("".join(rng.choice("abcde") for _ in range(rng.randint(2, 8))) for _ in range(999))
    return list(dict.fromkeys(found))[:count]


ANSWERS = [{"prompt": f"{word}=", "completion": word.upper()} for word in words(24)]
PAIRS = [
    {"prompt": f"{word}?", "chosen": word.upper(), "rejected": word[::-1] + "."}
    for word in words(24)
]
LIKED = [
    {"prompt": word, "completion": word[::-1], "label": number % 3 == 0}
    for number, word in enumerate(words(24))
]
TEXTS = [{"text": word, "label": word[0]} for word in words(40)]
PROMPTS = [{"prompt": word} for word in words(12)]


def low(completion_ids: Any, **_: Any) -> list[float | None]:
    """Return the share of bytes below 128, and nothing about some."""
    return [None if ids[0] == 7 else float(np.mean(np.array(ids) < 128)) for ids in completion_ids]


def noisy(completion_ids: Any, **_: Any) -> list[float]:
    """Return numbers that depend on the other completions, of which all must be there."""
    found = np.array([sum(ids) % 7 for ids in completion_ids])
    return [float(value) for value in found - found.mean()]


def sampled(**given: Any) -> Callable[..., Any]:
    """Return a run of reinforcement learning with these settings."""
    quick = {"num_generations": 4, "max_completion_length": 8, "least_pass": 0.0, "threshold": 0.5}

    def run(base: Path, out: Path, **others: Any) -> Any:
        return grpo(base, PROMPTS, out, reward_funcs=[low, noisy], **{**quick, **given, **others})

    return run


def learned(method: Callable[..., Any], examples: Any, **given: Any) -> Callable[..., Any]:
    def run(base: Path, out: Path, **others: Any) -> Any:
        return method(base, examples, out, **{**given, **others})

    return run


adapted = {"lora": True, "lora_r": 2, "quantize": "int8"}
CASES: dict[str, Callable[..., Any]] = {
    "sft": learned(sft, ANSWERS, dropout=0.1, eval_answers=20),
    "adapters": learned(sft, ANSWERS, dropout=0.1, **adapted),
    "frozen": learned(sft, ANSWERS, freeze="wte.*,h.0.*", recompute="full", zero=0),
    "bf16": learned(sft, ANSWERS, precision="bf16"),
    "pruned": learned(sft, ANSWERS, keep_zeros=True),
    "classify": learned(classify, TEXTS, dropout=0.1, class_weights="balanced"),
    "folds": learned(classify, TEXTS, folds=2, eval_interval=0),
    "reward": learned(reward, PAIRS, center_rewards_coefficient=0.01),
    "dpo": learned(dpo, PAIRS, sft_weight=0.2),
    "kto": learned(dpo, LIKED, loss_type="kto", desirable_weight=2.0),
    "distill": learned(distill, ANSWERS, n_layer=1, lmbda=0.5, max_new_tokens=8, dropout=0.1),
    "grpo": sampled(dropout=0.1),
    "cycles": sampled(num_iterations=2, beta=0.1, loss_type="grpo", scale_rewards="batch"),
    "ppo": sampled(algorithm="ppo", loss_type="bnpo", num_iterations=2),
    "rloo": sampled(algorithm="rloo", loss_type="dr_grpo", mask_truncated_completions=True),
    "rft": sampled(algorithm="rft", rollouts="fp16"),
}


def tune(name: str, base: str | Path, out: Path, **others: Any) -> Any:
    with first_voice():
        given = others if others.get("resume") else {**SHARED, **others}
        return CASES[name](base, out / name, **given)


def every(base: str, out: str) -> None:
    """Run all cases, then what must be refused."""
    gradients.BUCKET = 1000  # floats: more buckets than are on their way at a time
    finish, sent = Exchange.finish, list[bool]()

    def noted(self: Exchange) -> None:
        sent.append(self._next == len(self.buckets))  # during backward
        finish(self)

    replace(Exchange, "finish", noted)
    for name in CASES:
        sent.clear()
        tune(name, base, Path(out))
        assert sent and all(sent), name  # also where a rank gets no completions of a step
    faults(base, out)
    refusals(base, out)
    patience()
    stopped(base, out)


def some(base: str, out: str, *names: str) -> None:
    """Run cases; those whose run has begun go on."""
    for name in names:
        if join().by_first((Path(out) / name / "run.json").exists):
            tune(name, base, Path(out), resume=True)
        else:
            tune(name, base, Path(out))


def killed(base: str, out: str, name: str) -> None:
    """Kill rank 1 after its fifth step; the only save is in the middle of a cycle of updates."""
    show = hooks.Show.__call__

    def kill(self: hooks.Show, run: Any, step: hooks.Step) -> None:
        if run.step == 5 and world().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        show(self, run, step)

    replace(hooks.Show, "__call__", kill)
    tune(name, base, Path(out), save_interval=3)


def faults(base: str, out: str) -> None:
    """Skip a step that one rank alone finds not finite, wherever it finds it."""
    ranks, place = world(), Path(out) / "faults"
    scores, losses, draw = GPT2.scores, GPT2.losses, rollouts.draw
    steps = [0]

    def once(real: Any) -> Any:
        """Return a method whose result is not finite at the third step of rank 1."""

        def stub(self: GPT2, *given: Any, keep: bool = True, **others: Any) -> Any:
            found = real(self, *given, keep=keep, **others)
            steps[0] += keep
            if steps[0] == 3 and ranks.rank == 1 and keep:
                for row in found:
                    row *= np.nan
            return found

        return stub

    def drawn(*given: Any) -> Any:
        steps[0] += 1
        if steps[0] == 30 and ranks.rank == 1:
            raise rollouts.Diverged("infinite")
        return draw(*given)

    replace(GPT2, "scores", once(scores))
    replace(GPT2, "losses", once(losses))
    replace(rollouts, "draw", drawn)
    for name in ("classify", "dpo", "grpo"):
        steps[0] = 0
        with np.errstate(invalid="ignore"):  # of the losses of nan
            result = tune(name, base, place, skip_nonfinite=True)
        (run,) = getattr(result, "runs", [result])
        assert (run.step, run.skipped) == (6, 1), (name, run.skipped)
    replace(GPT2, "scores", scores)
    replace(GPT2, "losses", losses)
    replace(rollouts, "draw", draw)


def stopped(base: str, out: str) -> None:
    """Stop the sampling of an evaluation at a signal, which comes to one rank or to both."""
    draw, drawn, ranks = rollouts.draw, list[int](), world()

    def signalled(*given: Any) -> Any:
        drawn.append(1)
        if ranks.rank in those:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*given)

    replace(rollouts, "draw", signalled)
    for those in ((1,), (0, 1)):
        drawn.clear()
        assert tune("grpo", base, Path(out) / f"stopped {len(those)}").interrupted
        assert len(drawn) <= 4 or ranks.rank not in those, drawn  # the first tokens of its prompts
    replace(rollouts, "draw", draw)


def patience() -> None:
    """Let rank 0 work longer than ranks wait for each other."""
    ranks = world()
    ranks.timeout = 0.2
    assert ranks.by_first(lambda: time.sleep(0.5)) is None
    assert ranks.timeout == 0.2
    ranks.timeout = 60.0
    assert ranks.by_first(lambda: ranks.rank) == 0
    assert ranks.rows(np.full((ranks.rank, 2), 3.5)).tolist() == [[3.5, 3.5]]


def refusals(base: str, out: str) -> None:
    """Refuse what a user can get wrong: exit code 2 everywhere, a sentence on rank 0 alone."""
    ranks, bad, data = world(), Path(out) / "bad", Path(out) / "data"
    if ranks.rank == 0:
        data.mkdir()
        files: dict[str, list[Any]] = {
            "answers": ANSWERS, "other": ANSWERS[1:], "pairs": PAIRS, "empty": [{"a": 1}],
            "prompts": PROMPTS,
        }  # fmt: skip
        for name, rows in files.items():
            (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ranks.any(True)
    other = "other" if ranks.rank == 1 else "answers"
    never = "--reward=regex:never", "--max-completion-length=4"
    cases: list[tuple[str, list[str]]] = [
        ("a step has 1 example (batch_size), which 2 ranks cannot share: start fewer ranks",
         ["sft", base, f"{data}/answers.jsonl", "--batch-size=1"]),
        (f"{data}/empty.jsonl", ["sft", base, f"{data}/empty.jsonl"]),
        ("rank 1 has other training or validation tokens than rank 0: each machine needs the",
         ["sft", base, f"{data}/{other}.jsonl"]),
        ("rank 1 has seed=1 and rank 0 has seed=0: start all ranks with the same settings",
         ["sft", base, f"{data}/answers.jsonl", f"--seed={ranks.rank}"]),
        ("/nowhere", ["classify", "train", "/nowhere", f"{data}/answers.jsonl"]),
        ("the first loss is 0.693", ["dpo", base, f"{data}/pairs.jsonl", "--batch-size=4"]),
        ("of 1 prompts 0.0% have a completion", ["grpo", base, f"{data}/prompts.jsonl", *never]),
        ("the making of a beginner does not run on several ranks yet", ["grpo", "--task=sort"]),
        ("name a base, or a task to begin with", ["grpo"]),
    ]  # fmt: skip
    replace(sys.modules[DPOSettings.__module__], "NEAR", -1.0)
    for said, given in cases:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                code: Any = command([*given, "--out", str(bad)])
            except SystemExit as error:
                code = error.code
        assert code == 2, (said, code)
        lines = errors.getvalue().splitlines()
        assert len(lines) == (ranks.rank == 0), lines
        assert all(line.startswith(f"gpt2c: {said}") for line in lines), lines
        ranks.any(True)  # rank 0 has removed what it has written
        assert not (bad / "run.json").exists()


if __name__ == "__main__":
    replace(loop, "plot_loss", lambda *_: False)  # see draw_nothing of conftest.py
    replace(hooks, "fma_peak", lambda *_: 0.0)
    with join().guard():
        main(globals())
