"""Reinforcement learning: a model samples completions, and learns by their rewards.

    G completions of each prompt -> rewards -> advantages A_t -> loss, the sum of -f_t A_t log p_t

GRPO, RLOO, REINFORCE, PPO and rejection fine-tuning (rft) share all but the advantages; policy.py
has the formulas and their sources. A step is a function of its number, the seed, the prompts and
the weights.

PPO's value of a text is the logit of an id that no text has, one more row of the token table: the
policy's own forward pass computes it, and the row's gradient comes with the others. Checkpoints
have the row, and the model that is published lacks it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from gpt2c.causal_lm import CausalLM
from gpt2c.evaluate.figures import written
from gpt2c.files.names import CHECKPOINTS
from gpt2c.finetune import cycles
from gpt2c.finetune.cycles import Experience
from gpt2c.finetune.given import GRPOGiven
from gpt2c.finetune.policy import (
    LOSS_TYPES,
    SCALES,
    PolicyLoss,
    PolicyObjective,
    TokenFacts,
    centred,
    deviation,
    gae,
    group_advantages,
    kept_once,
    leave_one_out,
    pass_at_k,
    token_factors,
    truncated_ratio,
    whitened,
)
from gpt2c.finetune.prompts import Prompt, read_prompts, task_prompts
from gpt2c.finetune.report import Counts, held
from gpt2c.finetune.rollouts import Diverged, Rollouts, sample
from gpt2c.finetune.settings import FinetuneSettings, rate
from gpt2c.finetune.tasks import TASKS
from gpt2c.finetune.tune import Base, Method, Result, tune
from gpt2c.finetune.verifiers import Function, Reward, Rewards, find_rewards, score, try_rewards
from gpt2c.formats.huggingface import save_weights
from gpt2c.formats.load import AnyConfig, find_model
from gpt2c.model.first_values import first_values
from gpt2c.model.parameters import names_that_fit
from gpt2c.parallel.world import World
from gpt2c.pretrained import MODELS
from gpt2c.screen.terminal import fitted
from gpt2c.text.ragged import Order, parts
from gpt2c.train.directory import report
from gpt2c.train.hooks import Learned
from gpt2c.train.loop import dropout_of
from gpt2c.train.run import Run
from gpt2c.train.settings import setting
from gpt2c.train.stop import Check

__all__ = ["GRPOSettings", "grpo"]

Floats = NDArray[np.float64]
IntArray = NDArray[np.int32]
CHOICES = {
    "algorithm": ("grpo", "rloo", "reinforce", "ppo", "rft"),
    "loss_type": LOSS_TYPES,
    "scale_rewards": SCALES,
    "kl_estimator": ("k2", "k3"),
    "rollouts": ("fp32", "fp16", "int8"),
}
SEEN = 2  # completions of the base that are shown
EVALUATION = 1 << 48  # in place of a step, in the key of an evaluation's random numbers


def choice(name: str, default: str, text: str, fixed: bool = False) -> str:
    """Make a field of settings whose values are in CHOICES."""
    return setting("grpo", default, f"{text}: {', '.join(CHOICES[name])}", fixed=fixed)


@dataclasses.dataclass(frozen=True)
class GRPOSettings(FinetuneSettings):
    """The settings of `gpt2c grpo`, under TRL's names.

    Examples
    --------
    >>> gpt2c.finetune.GRPOSettings(num_generations=1)
    Traceback (most recent call last):
    ValueError: grpo compares completions of one prompt: num_generations must be at least 2, got 1
    """

    learning_rate: float = rate(2e-5, 5e-4)
    max_epochs: float = setting("run", 1.0, "how often each prompt is sampled from")
    batch_size: int = setting(
        "data", 16, "prompts in a step, each with its generations", least=1, fixed=True
    )
    task: str = setting(
        "grpo", "", f"make prompts, in place of DATA: {', '.join(TASKS)}", fixed=True
    )
    task_prompts: int = setting(
        "grpo", 4096, "how many prompts of the task to learn from", least=1, fixed=True
    )
    prompt_field: str = setting("grpo", "", "the name of the field prompt, if it is another")
    reward: str = setting(
        *("grpo", "", "exact, number, regex:PATTERN, module:function; several: 'exact + number'"),
        fixed=True,
    )
    reward_weights: str = setting("grpo", "", "a weight for each reward", fixed=True)
    algorithm: str = choice("algorithm", "grpo", "how rewards become advantages", fixed=True)
    loss_type: str = choice("loss_type", "dapo", "what the loss is divided by")
    scale_rewards: str = choice("scale_rewards", "group", "whose deviation divides the advantages")
    num_generations: int = setting("grpo", 16, "completions of each prompt", least=1, fixed=True)
    max_completion_length: int = setting(
        "grpo", 64, "the most tokens of a completion", least=1, fixed=True
    )
    temperature: float = setting(
        "grpo", 1.0, "of the policy, which samples and is trained", fixed=True
    )
    num_iterations: int = setting(
        "grpo", 1, "updates on each step's completions", least=1, fixed=True
    )
    epsilon: float = setting("grpo", 0.2, "how far a ratio may fall below 1", least=0)
    epsilon_high: float = setting("grpo", 0.0, "how far it may rise; 0: as epsilon", least=0)
    beta: float = setting(
        "grpo", 0.0, "weight of the divergence from the base", least=0, fixed=True
    )
    kl_estimator: str = choice("kl_estimator", "k2", "of the divergence; TRL has k3")
    mask_truncated_completions: bool = setting(
        "grpo", False, "learn nothing from completions that have no end"
    )
    rollouts: str = choice("rollouts", "fp32", "weights of the sampler", fixed=True)
    vf_coef: float = setting("grpo", 0.1, "ppo: weight of the values' loss", least=0)
    cliprange_value: float = setting("grpo", 0.2, "ppo: how far a value may move", least=0)
    lam: float = setting("grpo", 0.95, "ppo: lambda of the advantages", least=0)
    threshold: float = setting("grpo", 1.0, "the reward from which on a completion passes")
    least_pass: float = setting(
        *("grpo", 0.01, "do not begin if a smaller share of the prompts has a pass"), least=0
    )
    eval_prompts: int = setting(
        "grpo", 128, "held-out prompts of an evaluation", least=1, fixed=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.50}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.lora and self.algorithm == "ppo":
            raise ValueError(
                "ppo trains values in a row of the token table, which adapters leave as it is: pass"
                " lora or algorithm ppo, not both"
            )
        if self.least_pass > 1:
            raise ValueError(f"least_pass must be in [0, 1], got {self.least_pass}")
        if self.num_generations == 1 and self.algorithm in ("grpo", "rloo"):
            raise ValueError(
                f"{self.algorithm} compares completions of one prompt: num_generations must be at"
                " least 2, got 1"
            )

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss of tokens."""
        high = self.epsilon_high or self.epsilon
        value = self.vf_coef, self.cliprange_value
        return PolicyLoss(self.epsilon, high, self.beta, self.kl_estimator, *value)


class Sampled(NamedTuple):
    """Rollouts with their rewards (S,), and which of them pass (P, G)."""

    rollouts: Rollouts
    scores: Rewards
    passed: NDArray[np.bool_]


class _GRPO(Method):
    verb = "grpo"
    shown = ("reward", "pass@1", "entropy")
    unit = "(the share that fails)"
    loss = "loss of the policy\nvalidation: the share that fails"

    def __init__(
        self,
        base: Base,
        settings: GRPOSettings,
        source: str | Path | Sequence[Mapping[str, Any]] | None,
        rewards: Sequence[Reward],
    ) -> None:
        self.tokenizer, self._base, self._settings = base.tokenizer, base, settings
        self.tokenizer.add_bos_token = True
        self._rewards = rewards
        base.found.config.require_language_head("grpo")
        context = base.found.config.n_positions
        context = min(settings.max_length or context, context)
        most = context + 1 - settings.max_completion_length
        if source is None:
            counts = settings.task_prompts, settings.eval_prompts
            found = task_prompts(settings.task, self.tokenizer, most, *counts, settings.seed)
        else:
            found = read_prompts(
                *(source, self.tokenizer, most, settings.prompt_field),
                *(settings.val_fraction, settings.seed, settings.group_field),
            )
        try_rewards(rewards, [*found.train, *found.val], self.tokenizer.eot)
        self._prompts, self.facts = found, found.fingerprint
        self.examples = len(found.train) * settings.num_iterations
        longest = max(len(one.ids) for one in (*found.train, *found.val))
        self.longest = longest + settings.max_completion_length - 1
        self._order = Order(len(found.train), settings.batch_size, settings.seed)
        self._ppo = settings.algorithm == "ppo"
        self._held: tuple[int, Experience] | None = None  # the number of a cycle, and what it has
        self._passed = self._varied = 0.0  # shares of the prompts of the last evaluation
        self._best = 0.0  # reward of it
        self._seen: list[tuple[float, str]] = []  # rewards and completions of its first prompt

    def config(self, base: AnyConfig) -> AnyConfig:
        config = dataclasses.replace(base, vocab_size=base.vocab_size + 1) if self._ppo else base
        self._unused = self.tokenizer.unused_ids(config.vocab_size)
        self._value = base.vocab_size if self._ppo else None
        head, freeze = config.stack().head.weight, self._settings.freeze
        if self._ppo and freeze:
            if head in names_that_fit(config.parameter_shapes(), freeze.split(",")):
                raise ValueError(
                    f"ppo trains values in a row of {head}, which freeze leaves as it is: freeze"
                    " other parameters only, or take another algorithm"
                )
        return config

    def lines(self) -> Iterator[str]:
        settings, found = self._settings, self._prompts
        names = ", ".join(reward.name for reward in self._rewards)
        yield (
            f"{len(found.train):,} prompts, {held(len(found.val))}; left out:"
            f" {Counts(found.left_out)}; {settings.batch_size} of them in a step,"
            f" {settings.num_generations} completions of each; rewards: {names}"
        )
        text = self.tokenizer.decode(found.train[0].ids)
        yield fitted(f"the first prompt: {text}")
        if self._ppo:
            yield "checkpoints have one more row in the token table, for PPO's values"

    def publish(self, checkpoint: Path, out: Path) -> None:
        if self._value is None:
            super().publish(checkpoint, out)
            return
        config = self._base.found.config  # no text has the row of values, so readers do without
        shapes, found = config.parameter_shapes(), find_model(checkpoint)
        cut = {name: np.asarray(one)[: shapes[name][0]] for name, one in found.tensors.items()}
        save_weights(out, config.to_dict(), cut)

    def begin(self, run: Run) -> None:
        settings = self._settings
        share, least = self._passed, settings.least_pass
        # Rejection fine-tuning learns from what passes, the others from rewards that differ, too.
        varied = 0.0 if settings.algorithm == "rft" else self._varied
        for reward, text in () if run.step else self._seen:
            report(fitted(f"reward {written(reward)}: {text}"))
        with run.world.agreement():
            if not run.step and max(share, varied) < least:
                raise ValueError(
                    f"of {len(self._held_out)} prompts {share:.1%} have a completion whose reward"
                    f" is at least the threshold, {settings.threshold:g}, and {least:.1%} is"
                    f" wanted; the best reward is {self._best:g}: nothing can be learned; fine-tune"
                    " the base first, or lower --threshold or --least-pass"
                )
        if settings.beta:
            self._reference = self._first_model(run)

    def _first_model(self, run: Run) -> CausalLM:
        """Return the run's model as it was before step 1, without adapters."""
        found, model = self._base.found, run.model
        if self._settings.random_weights:  # the seed gives them again
            own = self.config(found.config)
            fresh = first_values(own, self._settings.seed, own.parameter_shapes().keys())
            found = dataclasses.replace(found, config=own, tensors=fresh)
        weights = None if model.weights == "fp32" else model.weights
        return MODELS[type(found.config)].from_found(
            found, model.backend, quantize=weights, precision=model.precision
        )

    @property
    def _held_out(self) -> list[Prompt]:
        return (self._prompts.val or self._prompts.train)[: self._settings.eval_prompts]

    # ---- a step ----------------------------------------------------------------------------------

    def learn(self, run: Run) -> Learned:
        settings, loss_of = self._settings, self._settings.policy_loss
        cycle, update = divmod(run.step, settings.num_iterations)
        try:
            batch = self._batch(run, cycle, update)
        except Diverged:
            return Learned(math.nan, 0)
        run.model.zero_grad()
        own, start = self._share(run, batch.ids)
        loss, first = 0.0, start
        logps = np.zeros(len(batch.targets))
        each = parts([len(ids) - 1 for ids in own], self._settings.batch_tokens)
        for part in run.parts(each):
            idx = [ids[:-1] for ids in own[part]]
            rows = slice(first, first + sum(map(len, idx)))
            objective = PolicyObjective(
                *(batch.targets[rows], batch.tokens.at(rows), loss_of),
                *(settings.temperature, self._unused, self._value),
            )
            dropout = dropout_of(run.settings, run.step, first)
            loss += run.model.loss(idx, objective, count=1, dropout=dropout)
            run.model.backward(final=run.final)
            logps[rows] = objective.logps
            first = rows.stop
        (loss,) = run.world.sum([loss])
        logps = run.world.rows(logps[start:first])
        metrics = batch.metrics | self._figures(batch, logps, update)
        if update:
            metrics["rollout_seconds"] = 0.0
        if not update and settings.num_iterations > 1:
            batch = batch._replace(tokens=batch.tokens._replace(old=logps))
            self._held = cycle, batch
            if run.world.rank == 0:
                cycles.store(run.out, cycle, batch)
                saved = [int(path.name) for path in (run.out / CHECKPOINTS).glob("[0-9]*")]
                cycles.prune(run.out, min([run.step, *saved]) // settings.num_iterations)
        return Learned(loss, batch.read, metrics)

    def _share(self, run: Run, ids: Sequence[IntArray]) -> tuple[Sequence[IntArray], int]:
        """Return the completions that this rank learns from, and the targets of those before."""
        own = run.world.share(len(ids))
        return ids[own], sum(len(one) - 1 for one in ids[: own.start])

    def _batch(self, run: Run, cycle: int, update: int) -> Experience:
        """Return the completions of a cycle of updates: new ones at its start, else those of it."""
        if not update:
            batch = self._sampled_batch(run, cycle)
        elif self._held is not None and self._held[0] == cycle:
            batch = self._held[1]
        else:  # a resumed run, within a cycle
            batch = cycles.load(run.out, cycle, run.world)
        self._held = cycle, batch
        return batch

    def _sampled_batch(self, run: Run, cycle: int) -> Experience:
        """Sample completions, and compute the advantages of their tokens."""
        settings = self._settings
        prompts = [self._prompts.train[n] for n in self._order.step(cycle)]
        policy = run.model if settings.rollouts == "fp32" else run.model.quantize(settings.rollouts)
        asked = settings.num_generations, settings.temperature, cycle
        began = time.perf_counter()
        found = self._sample(policy, prompts, *asked, run.world)
        spent = {"rollout_seconds": round(time.perf_counter() - began, 4)}
        rollouts, lengths = found.rollouts, found.rollouts.lengths
        advantages = self._advantages(found)
        counted = lengths.copy()
        if settings.mask_truncated_completions:
            counted[rollouts.truncated] = 0
        if settings.algorithm == "rft":
            counted[advantages.reshape(-1) == 0] = 0
        factors = token_factors(settings.loss_type, counted, settings.max_completion_length)
        factors[counted == 0] = 0
        signal = advantages.reshape(-1) != 0  # without it nothing is learned, and nothing computed
        if self._ppo or settings.beta:
            signal[:] = True
        live = signal & (factors > 0)
        chosen = np.flatnonzero(live).tolist()
        ids = [
            np.array([*rollouts.prompt_of(i), *rollouts.completions[i]], np.int32) for i in chosen
        ]
        following = np.concatenate([np.zeros(0, np.int32), *(one[1:] for one in ids)])
        asked_for = [len(rollouts.prompt_of(i)) - 1 for i in chosen]  # targets in prompts
        spans = np.array([asked_for, lengths[chosen]], np.int64).T  # and in completions
        marks = np.repeat(np.tile([False, True], len(chosen)), spans.reshape(-1))

        def rows(each: Floats | Sequence[Floats]) -> Floats:
            """Return a number for each target, 0 in prompts, of one or several a completion."""
            out = np.zeros(len(marks))
            if isinstance(each, np.ndarray):
                out[marks] = np.repeat(each[chosen], lengths[chosen])
            elif len(chosen):
                out[marks] = np.concatenate([each[i] for i in chosen])
            return out

        tokens = TokenFacts(rows(factors), rows(advantages.reshape(-1)))
        if self._ppo:
            tokens = self._valued(tokens, found, rows, marks)
        sampled = rows(rollouts.logps)
        if settings.rollouts != "fp32":
            tokens = tokens._replace(sampled=sampled)
        targets = np.where(marks, following, np.int32(-1)).astype(np.int32)
        if settings.beta:
            tokens = tokens._replace(reference=self._reference_logps(run, ids, targets))
        read = int(lengths.sum()) + settings.num_generations * sum(len(p.ids) for p in prompts)
        return Experience(ids, tokens, targets, sampled, read, self._metrics(found) | spent)

    def _sample(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        count: int,
        temperature: float,
        number: int,
        world: World,
        check: Check | None = None,
    ) -> Sampled:
        """Sample completions of prompts, and reward them; rank 0 alone calls the user's code."""
        settings = self._settings
        rollouts = sample(
            *(policy, [one.ids for one in prompts], count, {self.tokenizer.eot}),
            *(settings.max_completion_length, temperature, (settings.seed, number)),
            *(self._unused, self._value, check),
            world=world,
        )
        texts = self._texts(rollouts)
        repeated = [one for one in prompts for _ in range(count)]
        columns = {
            name: [one.columns.get(name) for one in repeated]
            for name in dict.fromkeys(name for one in prompts for name in one.columns)
        }
        ids = [ids.tolist() for ids in rollouts.completions]

        def rewarded() -> tuple[list[float], dict[str, list[float]]]:
            asked = [one.text for one in repeated]
            total, each = score(self._rewards, asked, texts, ids, columns)
            return total.tolist(), {name: values.tolist() for name, values in each.items()}

        total, each = world.by_first(rewarded)
        scores = Rewards(np.array(total), {name: np.array(told) for name, told in each.items()})
        passed = (scores.total >= settings.threshold).reshape(-1, count)
        return Sampled(rollouts, scores, passed)

    def _texts(self, rollouts: Rollouts) -> list[str]:
        """Return completions without their ends."""
        return [
            self.tokenizer.decode((ids if cut else ids[:-1]).tolist())
            for ids, cut in zip(rollouts.completions, rollouts.truncated, strict=True)
        ]

    def _advantages(self, found: Sampled) -> Floats:
        """Return the advantage of each completion, (P, G); PPO's are those of tokens."""
        settings = self._settings
        rewards = found.scores.total.reshape(found.passed.shape)
        if settings.algorithm == "grpo":
            return group_advantages(rewards, settings.scale_rewards)
        if settings.algorithm == "rloo":
            return leave_one_out(rewards)
        if settings.algorithm == "rft":
            return kept_once(found.passed, [ids.tolist() for ids in found.rollouts.completions])
        return centred(rewards)

    def _valued(self, tokens: TokenFacts, found: Sampled, rows: Any, marks: Any) -> TokenFacts:
        """Return tokens with PPO's advantages, values and returns: the reward is the last's."""
        values, advantages, returns = found.rollouts.values, [], []
        for value, reward in zip(values, np.nan_to_num(found.scores.total), strict=True):
            rewards = np.zeros(len(value))
            rewards[-1] = reward
            advantage, own = gae(rewards, value, 1.0, self._settings.lam)
            advantages.append(advantage)
            returns.append(own)
        flat = rows(advantages)
        flat[marks] = whitened(flat[marks])
        return tokens._replace(advantages=flat, values=rows(values), returns=rows(returns))

    def _reference_logps(self, run: Run, ids: Sequence[IntArray], targets: IntArray) -> Floats:
        """Return the log-probability of each target by the base."""
        own, start = self._share(run, ids)
        logps, first = np.zeros(len(targets)), start
        unused = self.tokenizer.unused_ids(self._reference.config.vocab_size)
        for part in parts([len(one) - 1 for one in own], self._settings.batch_tokens):
            idx = [one[:-1] for one in own[part]]
            rows = slice(first, first + sum(map(len, idx)))
            none = TokenFacts(*np.zeros((2, rows.stop - rows.start)))
            objective = PolicyObjective(
                targets[rows], none, PolicyLoss(), self._settings.temperature, unused
            )
            self._reference.loss(idx, objective, keep=False, count=1)
            logps[rows] = objective.logps
            first = rows.stop
        return run.world.rows(logps[start:first])

    # ---- figures ---------------------------------------------------------------------------------

    def _metrics(self, found: Sampled) -> dict[str, float]:
        """Return the figures of completions, under TRL's names."""
        rollouts, scores, passed = found
        lengths, rewards = rollouts.lengths, scores.total
        deviations = deviation(rewards.reshape(passed.shape))
        ended = lengths[~rollouts.truncated]
        metrics = {
            "reward": float(np.nanmean(rewards)),
            "reward_std": float(deviation(rewards.reshape(1, -1))[0, 0]),
            "frac_reward_zero_std": float(np.mean(np.isclose(deviations, 0))),
            "pass@1": pass_at_k(passed, 1),
            f"pass@{passed.shape[1]}": pass_at_k(passed, passed.shape[1]),
            "entropy": float(np.concatenate(rollouts.entropies).mean()),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(rollouts.truncated.mean()),
            "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
        }
        for name, values in scores.each.items() if len(scores.each) > 1 else ():
            told = values[~np.isnan(values)]
            metrics[f"rewards/{name}/mean"] = float(told.mean()) if len(told) else math.nan
            metrics[f"rewards/{name}/std"] = float(deviation(values[None])[0, 0])
        return metrics

    def _figures(self, batch: Experience, logps: Floats, update: int) -> dict[str, float]:
        """Return the figures of an update, under TRL's names."""
        live = np.flatnonzero(batch.targets >= 0)
        figures: dict[str, float] = {}
        if not len(live):
            return figures
        terms = self._settings.policy_loss(batch.tokens.at(live), logps[live])
        if not update:
            gap = np.abs(logps[live] - batch.sampled[live])
            figures["sampling/sampling_logp_difference/mean"] = float(gap.mean())
            figures["sampling/sampling_logp_difference/max"] = float(gap.max())
        if batch.tokens.sampled is not None:
            old = logps if batch.tokens.old is None else batch.tokens.old
            ratios = truncated_ratio(old[live], batch.sampled[live])
            for name in ("min", "mean", "max"):
                figures[f"sampling/importance_sampling_ratio/{name}"] = float(
                    getattr(ratios, name)()
                )
        if batch.tokens.old is not None:
            figures["clip_ratio/low_mean"] = float(terms.low.mean())
            figures["clip_ratio/high_mean"] = float(terms.high.mean())
            figures["clip_ratio/region_mean"] = float((terms.low | terms.high).mean())
        if self._settings.beta:
            figures["kl"] = float(terms.kl.mean())
        return figures

    def evaluate(self, run: Run, check: Check | None) -> dict[str, float]:
        settings, held, G = self._settings, self._held_out, self._settings.num_generations
        # The model that is saved, not its copy in fewer bits that samples what is learned from.
        asked = EVALUATION, run.world, check
        drawn = self._sample(run.model, held, G, settings.temperature, *asked)
        greedy = self._sample(run.model, held, 1, 0.0, *asked)
        self._passed = pass_at_k(drawn.passed, G)
        spread = deviation(drawn.scores.total.reshape(drawn.passed.shape))
        self._varied = float(np.mean(~np.isclose(spread, 0)))
        self._best = float(np.nanmax(drawn.scores.total))
        texts = self._texts(drawn.rollouts)[: min(G, SEEN)]
        self._seen = [*zip(drawn.scores.total.tolist(), texts, strict=False)]
        return {
            "val_reward": float(np.nanmean(drawn.scores.total)),
            "val_pass@1": pass_at_k(drawn.passed, 1),
            f"val_pass@{G}": self._passed,
            "val_greedy": pass_at_k(greedy.passed, 1),
            "val_entropy": float(np.concatenate(drawn.rollouts.entropies).mean()),
            "val_loss": 1 - pass_at_k(drawn.passed, 1),
        }


def grpo(
    base: str | os.PathLike[str],
    prompts: str | Path | Sequence[Mapping[str, object]] | None,
    out: str | os.PathLike[str],
    *,
    reward_funcs: str | Function | Sequence[str | Function] = (),
    resume: bool = False,
    overwrite: bool = False,
    **settings: Unpack[GRPOGiven],
) -> Result:
    """Train a model by the rewards of what it writes.

    Parameters
    ----------
    base : a directory of a model with its tokenizer, or a name on the hub
    prompts : a file (JSONL, a JSON list, CSV), or a list of dicts, of {"prompt"} or {"messages"};
        other fields go to the reward functions. None with the setting task, which makes prompts
    out : the directory of the run, which becomes a model's
    reward_funcs : functions of TRL's signature, or one, see `gpt2c.finetune.verifiers`, in place of
        the names in the setting reward
    resume : continue the run in `out`, with the same functions
    overwrite : `out` may exist and hold files
    settings : fields of `gpt2c.finetune.GRPOSettings`

    Raises
    ------
    OSError, ValueError, MemoryError : see `gpt2c.finetune.tune.tune`; a reward function fails, or
        too few completions of the base pass

    Examples
    --------
    >>> import tempfile
    >>> config = gpt2c.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=257)
    >>> def short(completions, **columns):
    ...     return [float(len(text) < 8) for text in completions]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gpt2c.GPT2(config, seed=1).save_pretrained(directory + "/base")
    ...     gpt2c.Tokenizer.from_name("bytes").save_pretrained(directory + "/base")
    ...     result = gpt2c.finetune.grpo(
    ...         *(directory + "/base", [{"prompt": "Hi"}, {"prompt": "Ho"}], directory + "/run"),
    ...         **dict(reward_funcs=[short], max_completion_length=16, max_iters=20),
    ...         **dict(learning_rate=0.01, val_fraction=0),
    ...     )  # doctest: +ELLIPSIS
    2 prompts, ...
    >>> result.after["val_reward"] > result.before["val_reward"]
    True
    """
    functions: list[str | Function] = (
        [reward_funcs]
        if isinstance(reward_funcs, str) or callable(reward_funcs)
        else [*reward_funcs]
    )

    def make(opened: Base, own: GRPOSettings) -> _GRPO:
        if bool(own.task) == (prompts is not None):
            raise ValueError(
                "name prompts or a task, not both" if own.task else "name prompts, or a task"
            )
        names = own.reward.split(" + ") if own.reward else ["exact"] * bool(own.task)
        weights = [_weight(text) for text in own.reward_weights.split()]
        return _GRPO(opened, own, prompts, find_rewards(functions or names, weights))

    return tune("grpo", GRPOSettings, make, base, out, settings, resume, overwrite, [prompts])


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"reward_weights must be numbers, got {text!r:.50}") from None
