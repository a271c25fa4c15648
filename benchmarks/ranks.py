"""Training with 1, 2 and 4 ranks on this machine, and on hosts that a slow link joins.

    python benchmarks/ranks.py --json benchmarks/results/ranks.json      # half an hour; root
    python benchmarks/ranks.py --quick                                   # without GPT-2 124M
    python benchmarks/ranks.py --openmpi ENV/bin/python           # where openmpi is installed, too

It needs the packages mpi4py and mpich. A host is a network namespace with its own name and one
interface. A switch joins them, and each cable carries RATE in both directions (tc's token bucket).
The counters of the interfaces show that all bytes took this way. On two cores, four ranks show that
results and bytes are right, and not how fast four machines are: ranks share the cores.

The model of a step's time: t = t_compute + max(0, t_comm - t_overlap). t_compute is the step of as
many ranks without a link. t_comm = bytes / bandwidth, with 2 (p - 1) / p * 4 P bytes a rank.
t_overlap has two parts. One is the shorter of: the gradients' half of t_comm, without the tables of
tokens and positions, whose gradients are final last; and the last batch's backward, 2/3 of its
time. The other is the shorter of: the weights' half, without these tables, which forward reads
first; and the first batch's forward, 1/3.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpt2c
from gpt2c.bench.report import provenance
from gpt2c.files.tensors import read_tensors
from gpt2c.gpt2 import GPT2
from gpt2c.kernels.backend import get_backend
from gpt2c.kernels.limits import usable_cores
from gpt2c.parallel.gradients import BUCKET, MANY, Exchange
from gpt2c.parallel.world import first_voice, join
from gpt2c.text.prepare import prepare
from gpt2c.train import hooks, loop, pretrain
from gpt2c.train.metrics import read_metrics
from gpt2c.train.needs import training_parts
from gpt2c.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
GBIT, MBIT = 1e9 / 8, 1e6 / 8
PAYLOAD = 1448 / 1514  # of an Ethernet frame, which the token bucket counts
BURST, LATENCY = "128kb", "50ms"  # of tc: what may go at once, and the longest queue
COMMON = {
    "max_iters": 20, "learning_rate": 1e-3, "warmup_iters": 0, "schedule": "constant",
    "eval_interval": 0, "eval_iters": 1, "save_minutes": 0.0, "save_interval": 1000,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "11M": COMMON | {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 128, "batch_size": 4,
        # Without spikes of the loss, which would enlarge what another order of sums changes.
        "gradient_accumulation_steps": 2, "learning_rate": 3e-4,
    },
    "124M": COMMON | {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "batch_size": 2,
        "gradient_accumulation_steps": 1, "max_iters": 4,
    },
}  # fmt: skip
TOKENS = 2**19  # of a step of the projection
START = 50e-6  # seconds until a message arrives, in the projection
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


# ---- in each rank --------------------------------------------------------------------------------


def rank(data: str, out: str, text: str) -> None:
    """Train as the command does, and write the figures of this rank to a file."""
    job = json.loads(text)
    hooks.fma_peak = lambda *_: 0.0  # what takes time once
    loop.plot_loss = lambda *_: False
    if job["late"]:
        backward = GPT2.backward
        GPT2.backward = lambda self, scale=1.0, final=None: backward(self, scale)
        begin = Exchange.begin
        Exchange.begin = lambda self, flat: (begin(self, flat), self.arrive())
    world = join()
    rss, sent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, counter()
    with first_voice():
        pretrain.train(Path(data), Path(out), job["settings"])
    found = {
        "host": os.uname().nodename,
        "memory": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss),
        "bytes": world.bytes_sent,
        "interface": counter() - sent,
    }
    (Path(out) / f"rank{world.rank}.json").write_text(json.dumps(found))


def counter() -> int:
    """Return the bytes that have left by the interface of this host; 0 outside of one."""
    path = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else 0


# ---- hosts ---------------------------------------------------------------------------------------


class Hosts:
    """Network namespaces that a switch joins; a context manager that removes them."""

    def __init__(self, count: int, rate: float) -> None:
        self.rate = rate
        self.addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
        self._prefix = f"gpt2c-{os.getpid()}-"
        self._names: list[str] = []

    def __enter__(self) -> Hosts:
        try:
            switch = self._add(0)
            ip("-n", switch, "link", "add", "bridge", "up", "type", "bridge")
            for number, address in enumerate(self.addresses, 1):
                host, port = self._add(number), f"port{number}"
                peer = ("peer", "name", port, "netns", switch)
                ip("link", "add", "eth0", "netns", host, "type", "veth", *peer)
                ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", switch, "link", "set", port, "master", "bridge")
                for name, end in ((host, "eth0"), (switch, port)):
                    ip("-n", name, "link", "set", end, "up")
                    rate = ("rate", f"{self.rate * 8:.0f}bit", "burst", BURST, "latency", LATENCY)
                    ip("-n", name, "qdisc", "add", "dev", end, "root", "tbf", *rate, tool="tc")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, number: int) -> str:
        name = f"{self._prefix}{number}"
        ip("netns", "add", name)
        self._names.append(name)
        ip("-n", name, "link", "set", "lo", "up")
        return name

    def __exit__(self, *error: object) -> None:
        for name in self._names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in map(int, left.stdout.split()):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False)

    @staticmethod
    def sweep() -> None:
        """Remove the namespaces of a benchmark that was killed."""
        for path in Path("/run/netns").glob("gpt2c-*-*"):
            if not Path("/proc", path.name.split("-")[1]).exists():
                subprocess.run(["ip", "netns", "delete", path.name], check=False)

    def launcher(self, path: Path) -> Path:
        """Write the program that launchers call in place of ssh: [options] HOST COMMAND."""
        path.write_text(
            "#!/bin/sh\n"
            'while [ "${1#-}" != "$1" ]; do shift; done\n'
            "number=${1##*.}; shift\n"
            f"exec ip netns exec {self._prefix}$number unshare --uts"
            ' sh -c "hostname node$number; $*"\n'
        )
        path.chmod(0o755)
        return path


def ip(*arguments: str, tool: str = "ip") -> None:
    subprocess.run([tool, *arguments], check=True)


# ---- launches ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What one launch was, and its figures."""

    model: str
    ranks: int
    rate: float  # bytes a second of the link; 0 without one
    late: bool  # nothing was on its way during forward and backward
    mpi: str
    losses: list[float]
    seconds: float  # of the fastest step after the first: other programs may run, too
    share: float  # of a step, spent in waiting for other ranks
    step_bytes: int  # sent by rank 0 in a step
    each: list[dict[str, Any]]  # see `rank`


class Bench:
    """Launches ranks and collects rows."""

    def __init__(self, work: Path, python: str, openmpi: str | None) -> None:
        self.work, self.python, self.openmpi = work, python, openmpi
        self.rows: list[Row] = []

    def launch(
        self,
        model: str,
        ranks: int,
        hosts: Hosts | None = None,
        late: bool = False,
        mpi: str = "MPICH",
        **changes: Any,
    ) -> Row:
        out = self.work / f"run{len(self.rows)}"
        threads = 1 if ranks > 1 else usable_cores()
        settings = MODELS[model] | {"threads": threads} | changes
        python = self.python if mpi == "MPICH" else str(self.openmpi)
        command = [str(Path(python).parent / "mpiexec"), "-n", str(ranks)]
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        if mpi == "MPICH":
            # Hosts on one machine have one memory, by which UCX and MPICH send if they may.
            variables |= {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"} if hosts else {}
        else:
            variables |= OPEN_MPI
            command += ["--bind-to", "none", "--map-by", ":oversubscribe"]
        if hosts:
            ssh = str(hosts.launcher(self.work / "ssh"))
            if mpi == "MPICH":
                command += ["-launcher", "ssh", "-launcher-exec", ssh]
                command += ["-hosts", ",".join(hosts.addresses[:ranks])]
            else:
                command += ["--prtemca", "plm_ssh_agent", ssh, "--mca", "btl", "self,tcp"]
                command += ["--mca", "btl_tcp_if_include", "eth0", "--mca", "pml", "ob1"]
                command += ["--host", ",".join(hosts.addresses[:ranks])]
            command = [ssh, hosts.addresses[0], "exec", *command]
        job = json.dumps({"settings": settings, "late": late})
        quoted = f"'{job}'" if hosts else job  # ssh joins its arguments, for a shell
        command += [python, str(Path(__file__).resolve()), "rank", str(self.work / model)]
        done = subprocess.run([*command, str(out), quoted], env=variables, stdout=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        steps = [*read_metrics(out / "metrics.jsonl")]
        later = steps[1:]
        tokens = tokens_of(model)
        row = Row(
            *(model, ranks, hosts.rate if hosts else 0.0, late, mpi),
            losses=[step["loss"] for step in steps],
            seconds=tokens / max(step["tokens_per_second"] for step in later),
            share=statistics.median(step.get("mpi_share", 0.0) for step in later),
            step_bytes=later[-1].get("mpi_bytes", 0),
            each=[json.loads((out / f"rank{n}.json").read_text()) for n in range(ranks)],
        )
        self.rows.append(row)
        shutil.rmtree(out)
        print(f"{where(row)}: {row.seconds:.2f} s a step", file=sys.stderr, flush=True)
        return row

    def same_bits(self, ranks: int) -> bool:
        """Return whether MPICH and Open MPI give the same losses and weights."""
        found = []
        for python in (self.python, str(self.openmpi)):
            out = self.work / "bits"
            mpiexec = [str(Path(python).parent / "mpiexec"), "-n", str(ranks)]
            if python != self.python:
                mpiexec += ["--map-by", ":oversubscribe"]
            windows = {"batch_size": 3, "gradient_accumulation_steps": 2}  # for 2 and 3 ranks
            settings = MODELS["11M"] | windows | {"threads": 1, "max_iters": 6}
            job = {"settings": settings, "late": False}
            here = [python, str(Path(__file__).resolve()), "rank", str(self.work / "11M")]
            variables = {**os.environ, **OPEN_MPI, "PYTHONPATH": str(ROOT)}
            command = [*mpiexec, *here, str(out), json.dumps(job)]
            subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE)
            weights, _ = read_tensors(out / "model.safetensors")
            losses = [step["loss"] for step in read_metrics(out / "metrics.jsonl")]
            found.append((losses, {name: array.tobytes() for name, array in weights.items()}))
            shutil.rmtree(out)
        return bool(found[0] == found[1])


def where(row: Row) -> str:
    link = f"hosts, {row.rate * 8 / 1e6:,.0f} Mbit/s" if row.rate else "this machine"
    late = ", nothing sent meanwhile" if row.late else ""
    return f"{row.model}, {row.ranks} rank{'s' * (row.ranks > 1)}, {row.mpi}, {link}{late}"


# ---- the model of time, and the tables -----------------------------------------------------------


def flat_bytes(model: str, vocab: int) -> tuple[int, int]:
    """Return the bytes of all gradients, and of those that backward finishes last."""
    config = TrainSettings(**MODELS[model]).model_config(vocab)
    assert isinstance(config, gpt2c.GPT2Config)
    last = 4 * (config.vocab_size + config.n_positions) * config.n_embd
    return 4 * config.num_parameters(), last


def tokens_of(model: str) -> int:
    return TrainSettings(**MODELS[model]).tokens_per_step


def traffic(size: float, ranks: int) -> float:
    """Return the bytes that a rank sends in a step, for `size` bytes of gradients."""
    return 2 * (ranks - 1) / ranks * size


def exposed(size: tuple[int, int], ranks: int, bandwidth: float, batch: float) -> float:
    """Return t_comm - t_overlap, at least 0: the seconds that a step waits for the link.

    Parameters
    ----------
    size : see `flat_bytes`
    batch : seconds of a batch, forward and backward
    """
    seconds = traffic(size[0], ranks) / bandwidth
    half = traffic(size[0] - size[1], ranks) / 2 / bandwidth
    return max(0.0, seconds - min(half, batch * 2 / 3) - min(half, batch / 3))


def tables(bench: Bench, vocabs: dict[str, int]) -> None:
    ones = {row.model: row for row in bench.rows if row.ranks == 1}
    compute = {(row.model, row.ranks): row.seconds for row in bench.rows if not row.rate}
    print("\n| run | s a step | share of waiting | worst loss against one process |")
    print("|---|---:|---:|---:|")
    for row in bench.rows:
        worst = difference(row, ones[row.model])
        print(f"| {where(row)} | {row.seconds:.2f} | {row.share:.0%} | {worst:.1e} |")
    print(
        "\n| hosts | MB a rank and step | 2 (p - 1) / p * 4 P | MB of the whole run, rank 0 |"
        " by the interface |"
    )
    print("|---|---:|---:|---:|---:|")
    for row in filter(lambda row: row.rate, bench.rows):
        wanted = traffic(flat_bytes(row.model, vocabs[row.model])[0], row.ranks)
        first = row.each[0]
        cells = (row.step_bytes, wanted, first["bytes"], first["interface"])
        print(f"| {where(row)} | {' | '.join(f'{cell / 1e6:.1f}' for cell in cells)} |")
    print(
        "\n| exchange | while kernels compute, s | between, s | hidden, s | model, s |"
        " model without overlap, s |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for row in bench.rows:
        late = next((one for one in bench.rows if one[:3] == row[:3] and one.late), None)
        if not row.rate or row.late or late is None or row.mpi != "MPICH":
            continue
        batches = MODELS[row.model]["gradient_accumulation_steps"]
        alone = compute[row.model, row.ranks]
        batch = alone / max(1, batches / row.ranks)
        bandwidth = row.rate * PAYLOAD
        size = flat_bytes(row.model, vocabs[row.model])
        model = alone + exposed(size, row.ranks, bandwidth, batch)
        print(
            f"| {where(row)} | {row.seconds:.2f} | {late.seconds:.2f} |"
            f" {late.seconds - row.seconds:.2f} | {model:.2f} |"
            f" {alone + traffic(size[0], row.ranks) / bandwidth:.2f} |"
        )
    print("\n| memory of a rank | measured, MB | 4P + 4P + 8P/p + the rest, MB | 16P, MB |")
    print("|---|---:|---:|---:|")
    for row in bench.rows:
        if row.rate or row.late:
            continue
        settings = TrainSettings(**MODELS[row.model])
        backend = get_backend("auto", 1 if row.ranks > 1 else None)
        config = settings.model_config(vocabs[row.model])
        parts = training_parts(config, settings, backend, 0, row.ranks)
        most = max(one["memory"] for one in row.each)
        cells = (most, sum(parts.values()), 4 * flat_bytes(row.model, vocabs[row.model])[0])
        print(f"| {where(row)} | {' | '.join(f'{cell / 1e6:.0f}' for cell in cells)} |")


def difference(row: Row, one: Row) -> float:
    """Return the largest relative difference of losses from those of one process."""
    count = min(len(row.losses), len(one.losses))
    ours, theirs = np.array(row.losses[:count]), np.array(one.losses[:count])
    return float(np.abs(ours / theirs - 1).max())


def projection(rate: float) -> list[dict[str, float]]:
    """Print and return the time of a step of GPT-2 124M on many machines, without overlap."""
    found = []
    print(f"\nGPT-2 124M, {TOKENS:,} tokens a step, {rate:,.0f} tokens/s a machine:\n")
    print("| machines | link | t_compute, s | t_comm, s | t, s | efficiency | tokens/s |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    size, _ = flat_bytes("124M", 50257)
    for ranks in (2, 4, 16, 64, 256):
        for gbit in (0.1, 1, 10):
            alone = TOKENS / ranks / rate
            messages = 2 * (ranks - 1) * -(-size // (4 * BUCKET * max(1, ranks // MANY)))
            comm = traffic(size, ranks) / (gbit * GBIT * PAYLOAD) + messages * START
            seconds = alone + comm
            print(
                f"| {ranks} | {gbit:g} Gbit/s | {alone:,.1f} | {comm:.1f} | {seconds:,.1f} |"
                f" {alone / seconds:.0%} | {TOKENS / seconds:,.0f} |"
            )
            found.append({"machines": ranks, "gbit": gbit, "compute": alone, "step": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="training with ranks, also over slow links")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--openmpi", help="Python of an environment with openmpi and mpi4py")
    parser.add_argument("--rate", type=float, help="tokens/s of 124M on a machine, to project")
    parser.add_argument("--quick", action="store_true", help="without GPT-2 124M")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    is_root = os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc", "unshare")))
    if is_root:
        Hosts.sweep()
    else:
        print("Network namespaces need root and iproute2: the rows of this machine only.")
    print(provenance(usable_cores()))
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(work, sys.executable, options.openmpi)
        text = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")
        tokenizers = {"11M": "bytes"} if options.quick else {"11M": "bytes", "124M": "gpt2"}
        vocabs = {}
        for model, tokenizer in tokenizers.items():
            prepare(text, work / model, tokenizer)
            vocabs[model] = gpt2c.Tokenizer.from_pretrained(work / model).vocab_size
        record = {"machine": provenance(usable_cores()), "burst": BURST, "latency": LATENCY}
        try:
            measure(bench, [*vocabs], is_root)
        finally:  # what there is, if the rest fails or is stopped
            record |= {"models": MODELS, "rows": [row._asdict() for row in bench.rows]}
            write(options.json, record)
        tables(bench, vocabs)
        if options.openmpi:
            record["same bits"] = {str(n): bench.same_bits(n) for n in (2, 3)}
            print(f"\nThe same bits from MPICH and Open MPI: {record['same bits']}")
        one = next((row for row in bench.rows if row[:2] == ("124M", 1)), None)
        if rate := options.rate or (one and tokens_of("124M") / one.seconds):
            record["projection"] = projection(rate)
        write(options.json, record)


def write(path: Path | None, record: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def measure(bench: Bench, models: list[str], is_root: bool) -> None:
    """Launch all rows."""
    for model in models:
        counts = (1, 2, 4) if model == "11M" else (1, 2)
        for ranks in counts:
            bench.launch(model, ranks)
        for rate in (1 * GBIT, 100 * MBIT) if is_root else ():
            steps = {} if rate == GBIT else {"max_iters": 6 if model == "11M" else 2}
            for ranks in counts[1:]:
                with Hosts(ranks, rate) as hosts:
                    for late in (False, True):
                        bench.launch(model, ranks, hosts, late, **steps)
        if is_root and bench.openmpi and model == "11M":
            with Hosts(2, GBIT) as hosts:
                bench.launch(model, 2, hosts, mpi="Open MPI")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(*sys.argv[2:])
    else:
        main()
