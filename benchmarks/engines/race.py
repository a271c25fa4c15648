"""Race engines that run GPT-2 124M on a CPU: decoding one text and eight, and reading 512 tokens.

    pip install -r benchmarks/engines/requirements.txt    # beside gpt2c; torch first
    python benchmarks/engines/models.py                   # writes engines-models/, 4 GB
    python benchmarks/engines/race.py --rounds 7 [--engines gpt2c-int8,ort-int8] [--json FILE]

Every engine is a process of its own that loads once; they take turns, measure by measure, and
figures are medians of the rounds. In decode the prompts (32 tokens) are read outside the timed
part, which gives the first new token; the seconds are those of 64 further steps. Before anything
is timed each one's greedy tokens are compared, and those that compute in fp32 must agree.

The last column judges the race: how many CPUs something else kept busy while samples were taken.
Above 0.1, race again: engines whose threads spin fall to a tenth of their speed beside another
busy process. ENGINES_THREADS (2) is for all of them.
"""

import argparse
import gc
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
import traceback

from engines import ENGINES, EXACT, LONG, THREADS, VOCAB

PROMPT, NEW, SAME = 32, 64, 16  # tokens of a prompt, of the timed part, of the comparison
MEASURES = ("decode1", "decode8", "prefill")


def random_tokens(seed, n):
    draw = random.Random(seed)
    return [draw.randrange(VOCAB - 1) for _ in range(n)]


# ---- a worker: one engine, a measure a line in, a JSON object a line out -------------------------


def answer(engine, measure):
    """Do one measure; give its figure: tokens a second, milliseconds, tokens or MB."""
    gc.collect()
    if measure == "prefill":
        tokens = random_tokens(100, LONG)
        engine.prefill(tokens[:PROMPT])  # wakes the threads
        return 1e3 * engine.prefill(tokens)
    if measure == "tokens":
        return engine.decode([random_tokens(200, PROMPT)], SAME - 1)[0][0]
    if measure == "resident":
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1e3
    rows = int(measure.removeprefix("decode"))
    _, seconds = engine.decode([random_tokens(seed, PROMPT) for seed in range(rows)], NEW)
    return NEW * rows / seconds


def work(name):
    """Answer measures until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    try:
        engine = ENGINES[name][0]()
        for line in sys.stdin:
            print(json.dumps({"value": answer(engine, line.strip())}), file=out)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=out)
    out.flush()
    os._exit(0)  # what the libraries do at exit is not measured, and some of them are slow at it


# ---- the race ------------------------------------------------------------------------------------


class Worker:
    """A process with one engine, and what it measured."""

    def __init__(self, name):
        self.samples = {measure: [] for measure in MEASURES}
        self.others = []
        environment = {"OMP_NUM_THREADS": str(THREADS), "GPT2C_NUM_THREADS": str(THREADS)}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, __file__, "--worker", name]
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment, **ENGINES[name][1]}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip

    def cpu(self):
        """CPU seconds that it has used, and that all processes have."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        user, nice, system, _, _, irq, soft, steal = (
            pathlib.Path("/proc/stat").read_text().split()[1:9]
        )
        ticks = os.sysconf("SC_CLK_TCK")
        everyone = sum(map(int, (user, nice, system, irq, soft, steal)))
        return (int(stat[11]) + int(stat[12])) / ticks, everyone / ticks

    def ask(self, measure):
        start, (mine, everyone) = time.perf_counter(), self.cpu()
        try:
            self.process.stdin.write(measure + "\n")
            reply = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        except OSError:
            reply = {"error": "the process ended"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        seconds, (mine_after, everyone_after) = time.perf_counter() - start, self.cpu()
        self.others.append(max(0.0, everyone_after - everyone - mine_after + mine) / seconds)
        time.sleep(0.05)  # threads that wait by spinning for a while give up
        return reply["value"]

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def race(names, rounds):
    """Give rows of figures: name -> column -> value; and the names whose tokens are wrong."""
    workers, tokens, rows = {}, {}, {}
    for name in names:
        workers[name] = worker = Worker(name)
        try:
            start = time.perf_counter()
            tokens[name] = worker.ask("tokens")
            seconds = time.perf_counter() - start
            rows[name] = {"load s": seconds, "resident MB": worker.ask("resident")}
            for measure in MEASURES:  # not counted: compilation, buffers, page faults
                worker.ask(measure)
            worker.others.clear()
            print(f"{name} is ready", file=sys.stderr, flush=True)
        except RuntimeError as failure:
            print(f"{name} drops out: {failure}", file=sys.stderr, flush=True)
            workers.pop(name).end()
    for turn in range(rounds):
        for measure in MEASURES:
            for worker in workers.values():
                worker.samples[measure].append(worker.ask(measure))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    judge = next((name for name in tokens if name in EXACT), None)
    for name, worker in workers.items():
        worker.end()
        decode1, decode8, prefill = (statistics.median(worker.samples[m]) for m in MEASURES)
        rows[name] = {
            "batch 1 tokens/s": decode1,
            "batch 8 tokens/s": decode8,
            f"{LONG} tokens ms": prefill,
            **rows[name],
            "others' CPUs": statistics.median(worker.others),
        }
    wrong = [name for name in tokens if name in EXACT and tokens[name] != tokens[judge]]
    return {name: rows[name] for name in workers}, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default=",".join(ENGINES), help="names, commas between")
    parser.add_argument("--json", type=pathlib.Path, help="the medians in a file too")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)
    names = options.engines.split(",")
    if unknown := [name for name in names if name not in ENGINES]:
        parser.error(f"no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rows, wrong = race(names, options.rounds)
    if not rows:
        sys.exit("no engine is left: see requirements.txt and models.py")
    columns = list(next(iter(rows.values())))
    widths = [max(len(column), 9) for column in columns]
    first = max(map(len, rows))
    print(" " * first, *(c.rjust(w) for c, w in zip(columns, widths, strict=True)), sep="  ")
    for name, row in rows.items():
        cells = (
            f"{row[c]:.{1 if row[c] >= 10 else 2}f}".rjust(w)
            for c, w in zip(columns, widths, strict=True)
        )
        print(name.ljust(first), *cells, sep="  ")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if wrong:
        sys.exit(f"computes in fp32, and its greedy tokens differ: {', '.join(wrong)}")
    return None


if __name__ == "__main__":
    main()
