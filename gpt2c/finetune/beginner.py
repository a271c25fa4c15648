"""A beginner at a task, from nothing: reinforcement learning sharpens what it sometimes gets right.

base   a small model, pretrained on the text of a careless teacher, wrong in two of five
sft    fine-tuned on other examples of that teacher: it learns the answers, not the prompts
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from gpt2c.files.atomic import atomic_path, check_directory
from gpt2c.files.names import RUN_FILE
from gpt2c.files.untrusted import read_json, shown
from gpt2c.finetune.sft import sft
from gpt2c.finetune.tasks import examples
from gpt2c.text.prepare import prepare
from gpt2c.train.directory import read_record
from gpt2c.train.pretrain import train
from gpt2c.train.stop import interruptible

__all__ = ["CARELESS", "SFT", "beginner", "careless_examples"]

RECORD = "beginner.json"  # names the task; written before the directories
TEXT, BASE_RUN, SFT_RUN = "text", "base", "sft"
LINES = 80  # of the text, for each step of pretraining
CARELESS = 0.4  # the share of the teacher's answers that are wrong


class Lesson(NamedTuple):
    """What makes a beginner at a task right in 20 to 60% of its answers.

    Attributes
    ----------
    examples : drawn for fine-tuning, which leaves out those drawn before
    epochs : of fine-tuning
    block_size : of pretraining. All lines of "add" have 16 tokens: in windows of 32 each would
        begin at one of two places, another one than in fine-tuning
    """

    examples: int
    epochs: int = 1
    block_size: int = 32


# There are 8,750 problems of "add", and few examples that are not there already: so it has epochs.
LESSONS = {
    "sort": Lesson(32_000),
    "add": Lesson(20_000, epochs=10, block_size=33),
    "reverse": Lesson(40_000),
    "format": Lesson(32_000),
}
# Constant rates: weights at the end of a falling one lie in a narrow valley, and the first steps of
# reinforcement learning throw them out of it.
SHARED: dict[str, Any] = {
    **{"schedule": "constant", "beta2": 0.99, "weight_decay": 0.1},
    **{"batch_size": 64, "learning_rate": 2e-3, "log_interval": 100},
}
BASE: dict[str, Any] = SHARED | {
    **{"n_layer": 2, "n_head": 4, "n_embd": 64, "max_iters": 150, "warmup_iters": 15},
    "eval_interval": 0,
}
SFT: dict[str, Any] = SHARED | {"val_fraction": 0.01}


def careless_examples(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return examples of the careless teacher, see `tasks.examples`."""
    return examples(task, "train", count, seed, CARELESS)


def beginner(
    task: str,
    out: Path,
    seed: int = 1337,
    overwrite: bool = False,
    resume: bool = False,
    **given: Any,
) -> Path | None:
    """Train a beginner at a task; return its directory, `out`/sft, or None if a signal ended it.

    Parameters
    ----------
    task : of `tasks.TASKS`
    out : gets text, base and sft, and beginner.json, which says that they are made here
    seed : of the weights and the examples
    overwrite : they may hold files
    resume : they may hold what an earlier call for the same task made, which is continued
    given : settings of the runs that both have, such as threads

    Raises
    ------
    OSError, ValueError : see `prepare`, `train` and `sft`; with `resume` a directory holds files
        that no earlier call made
    """
    if task not in LESSONS:
        raise ValueError(f"task must be one of {', '.join(LESSONS)}, got {task!r:.50}")
    record, lesson = out / RECORD, LESSONS[task]
    if resume and record.exists():
        if (before := read_json(record).get("task")) != task:
            raise ValueError(f"{record}: the task must be {shown(before)}, got {task!r:.50}")
        for name, verb in ((BASE_RUN, "train"), (SFT_RUN, "sft")):
            if (out / name / RUN_FILE).exists():
                read_record(out / name, verb)
            else:
                check_directory(out / name, False)
        overwrite = True
    for name in (TEXT, BASE_RUN, SFT_RUN):
        check_directory(out / name, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(record) as temporary:
        temporary.write_text(json.dumps({"task": task}) + "\n", encoding="utf-8")
    text = [
        one["prompt"] + one["completion"]
        for one in careless_examples(task, LINES * BASE["max_iters"], seed + 1)
    ]

    def goes_on(name: str) -> bool:
        return resume and (out / name / RUN_FILE).exists()

    given = given | {"seed": seed}
    base = BASE | {"block_size": lesson.block_size} | given
    with interruptible() as stop:
        prepare(text, out / TEXT, "bytes", overwrite=overwrite)
        if goes_on(BASE_RUN):
            train(out / TEXT, out / BASE_RUN, {}, resume=True)
        else:
            train(out / TEXT, out / BASE_RUN, base, overwrite=overwrite)
        if stop.asked:
            return None
        taught = careless_examples(task, lesson.examples, seed)
        if goes_on(SFT_RUN):
            sft(out / BASE_RUN, taught, out / SFT_RUN, resume=True)
        else:
            tuned = SFT | {"max_epochs": lesson.epochs} | given
            sft(out / BASE_RUN, taught, out / SFT_RUN, overwrite=overwrite, **tuned)
        return None if stop.asked else out / SFT_RUN
