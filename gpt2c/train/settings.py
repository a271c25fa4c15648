"""Settings of a run, from a TOML recipe or flags of the same names.

Names are nanoGPT's, and TRL's where nanoGPT has none. Each setting is declared once, with its
default, its table in a recipe, its range and its help: those of every run in `Settings`, those of
pretraining in `TrainSettings`. Knows of models only their configs, and of files only recipes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from gpt2c.files.names import check_named
from gpt2c.files.untrusted import decode, read_bytes, shown
from gpt2c.kernels.backend import PRECISIONS
from gpt2c.model.config import ModelConfig
from gpt2c.model.gpt2 import GPT2Config
from gpt2c.model.llama import LlamaConfig
from gpt2c.parallel.gradients import TRANSPORTS
from gpt2c.train.optimizer import SCHEDULES, Schedule, ScheduleKind

__all__ = [
    "Settings",
    "TrainSettings",
    "find_recipe",
    "read_recipe",
    "recipe_settings",
    "resumed",
    "setting",
]

T = TypeVar("T")
S = TypeVar("S", bound="Settings")
Value = bool | int | float | str  # of a setting

# of a recipe, before a method's own
TABLES = ("model", "data", "optimizer", "schedule", "run", "parallel")
ARCHS = ("gpt2", "llama")
LLAMA_NAMES = {  # of the settings
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
}
GREATEST = 2**31 - 1  # of whole numbers; no run has more steps
INNER = 64  # a Llama's inner channels are a multiple of this, for the kernels' sake
LARGEST_RECIPE = 1 << 20  # bytes


def setting(
    table: str,
    default: T,
    text: str,
    *,
    least: float | None = None,
    older: T | None = None,
    fixed: bool = False,
) -> T:
    """Make a field of settings.

    Parameters
    ----------
    table : its table in a recipe, one of TABLES or a method's name
    default : of a new run
    text : a line of help
    least : the smallest value
    older : its value in a resumed run that began before the setting existed. Each new setting needs
        it; only those of a method's first run.json have none
    fixed : a resumed run must keep it: it fixes the weights' shapes or the order of the data
    """
    metadata = {"table": table, "help": text, "least": least, "older": older, "fixed": fixed}
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that every run has, whatever it trains.

    Raises
    ------
    ValueError : a setting is out of range, or the schedule refuses it
    """

    dropout: float = setting(
        "model", 0.0, "the share of activations that are 0 in a training step", older=0.0
    )
    learning_rate: float = setting("optimizer", 1e-3, "the highest learning rate")
    weight_decay: float = setting("optimizer", 0.1, "AdamW's weight decay, of matrices only")
    beta1: float = setting("optimizer", 0.9, "AdamW's decay rate for the mean of gradients")
    beta2: float = setting(
        "optimizer", 0.95, "AdamW's decay rate for the mean of squared gradients"
    )
    grad_clip: float = setting(
        "optimizer", 1.0, "clip the global gradient norm to this; 0: no clipping", least=0
    )
    schedule: str = setting("schedule", "cosine", f"one of {', '.join(SCHEDULES)}")
    min_lr: float = setting("schedule", 1e-4, "the lowest learning rate, at the end")
    decay_fraction: float = setting(
        "schedule",
        0.2,
        "wsd: the share of all steps, the last ones, in which the learning rate falls",
    )
    step_size: int = setting("schedule", 1000, "step: steps between two drops of the learning rate")
    gamma: float = setting("schedule", 0.1, "step: the factor of each drop of the learning rate")
    max_iters: int = setting("run", 1000, "steps of the optimizer", least=1)
    eval_interval: int = setting(
        "run", 100, "steps between two evaluations; 0: only at the end", least=0
    )
    log_interval: int = setting(
        "run", 10, "steps between two lines, if no terminal shows a bar", least=1
    )
    save_interval: int = setting(
        "run", 0, "steps between two checkpoints; 0: only save-minutes counts", least=0
    )
    save_minutes: float = setting(
        *("run", 10.0, "minutes between two checkpoints; 0: only save-interval counts"),
        least=0,
        older=0.0,
    )
    keep: int = setting("run", 1, "how many checkpoints to keep, the newest ones", least=1)
    skip_nonfinite: bool = setting("run", False, "skip non-finite steps instead of stopping")
    tensorboard: bool = setting("run", False, "write TensorBoard's event files too")
    seed: int = setting(
        "run", 1337, "seed of the weights and of the order of the data", least=0, fixed=True
    )
    backend: str = setting("run", "auto", "auto, or a name that gpt2c info lists")
    threads: int = setting(
        "run", 0, "number of threads; 0: GPT2C_NUM_THREADS, else all usable cores", least=0, older=0
    )
    recompute: str = setting("run", "none", "none, light or full: save memory, take more time")
    precision: str = setting(
        "run", "fp32", "fp32, bf16, fp16 or auto: of the products of matrices", older="fp32"
    )
    zero: int = setting(
        *("parallel", 1, "1: each rank of mpiexec holds its share of AdamW's moments; 0: all"),
        least=0,
        older=1,
    )
    transport: str = setting(
        *("parallel", "fp32", "fp32, or bf16: ranks send each other gradients in half the bytes"),
        older="fp32",
    )
    mpi_timeout: float = setting(
        *("parallel", 600.0, "seconds that a rank of mpiexec waits for the others"),
        least=1,
        older=600.0,
    )

    def __post_init__(self) -> None:
        for name in self.fields():
            object.__setattr__(self, name, self.checked(name, getattr(self, name)))
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.zero not in (0, 1):
            raise ValueError(f"zero must be 0 or 1, got {self.zero}")
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"transport must be {' or '.join(TRANSPORTS)}, got {shown(self.transport)}"
            )
        if self.recompute not in ("none", "light", "full"):
            raise ValueError(f"recompute must be none, light or full, got {self.recompute!r}")
        if self.precision not in (*PRECISIONS, "auto"):
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be {known} or auto, got {shown(self.precision)}")

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Value]]:
        """Return name -> field.

        Examples
        --------
        >>> gpt2c.finetune.SFTSettings.fields()["lora_r"].default
        8
        """
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse names that are no settings.

        Raises
        ------
        ValueError : one is none; the message has the nearest, also for initials, such as lr

        Examples
        --------
        >>> gpt2c.finetune.SFTSettings.check_names(["seed", "lr"])
        Traceback (most recent call last):
        ValueError: no setting 'lr'; did you mean learning_rate?
        """
        fields = cls.fields()
        for name in names:
            if name in fields:
                continue
            initials = [one for one in fields if "".join(w[0] for w in one.split("_")) == name]
            near = initials or difflib.get_close_matches(name, fields, n=1)
            known = f"the settings are {', '.join(sorted(fields))}"
            hint = f"did you mean {near[0]}?" if near else known
            raise ValueError(f"no setting {shown(name)}; {hint}")

    @classmethod
    def tables(cls) -> dict[str, list[str]]:
        """Return the tables of a recipe, and the settings of each.

        Examples
        --------
        >>> gpt2c.finetune.SFTSettings.tables()["lora"]
        ['lora', 'lora_r', 'lora_alpha', 'lora_targets', 'quantize']
        """
        found: dict[str, list[str]] = {table: [] for table in TABLES}
        for name, field in cls.fields().items():
            found.setdefault(field.metadata["table"], []).append(name)
        return {table: names for table, names in found.items() if names}

    @classmethod
    def older(cls) -> dict[str, Value]:
        """Return the values of settings that older runs lack, see `setting`.

        Examples
        --------
        >>> gpt2c.finetune.SFTSettings.older()["precision"]
        'fp32'
        """
        values = {name: field.metadata["older"] for name, field in cls.fields().items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def checked(cls, name: str, value: object) -> Value:
        """Return a setting's value, converted to float for a float setting.

        Raises
        ------
        ValueError : the value has another type or is out of the setting's own range

        Examples
        --------
        >>> gpt2c.finetune.SFTSettings.checked("max_epochs", 2)
        2.0
        """
        field = cls.fields()[name]
        default: Any = field.default
        wanted, least = type(default), field.metadata["least"]
        if type(value) is int and value.bit_length() > 1000:  # to become a float, or to be printed
            raise ValueError(f"{name} is too large: a number of {value.bit_length():,} bits")
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            kind = type(value).__name__
            raise ValueError(f"{name} must be {wanted.__name__}, got {kind} {shown(value)}")
        own: Any = value  # of the wanted type
        if least is not None and not own >= least:  # also true for nan
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if wanted is int and own > GREATEST:
            least = 1 if least is None else least
            raise ValueError(
                f"{name} must be a whole number from {least} to {GREATEST}, got {shown(value)}"
            )
        if wanted is float and not math.isfinite(own):
            raise ValueError(f"{name} must be finite, got {value}")
        return cast(Value, value)

    @property
    def recomputation(self) -> str | None:
        """The argument `recompute` of GPT2."""
        return None if self.recompute == "none" else self.recompute

    @property
    def warmup(self) -> int:
        """The steps of linear warm-up."""
        raise NotImplementedError

    def learning_rates(self) -> Schedule:
        """Return the schedule of learning rates; a warm-up longer than the run is cut to it.

        Examples
        --------
        >>> rates = gpt2c.finetune.SFTSettings(learning_rate=1.0, max_iters=10).learning_rates()
        >>> [round(rates(step), 1) for step in (0, 5, 10)]
        [1.0, 0.6, 0.0]
        """
        return Schedule(
            cast(ScheduleKind, self.schedule),  # refused there if it is none
            self.learning_rate,
            self.max_iters,
            min(self.warmup, self.max_iters),
            self.min_lr,
            self.decay_fraction,
            self.step_size,
            self.gamma,
        )


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """The settings of a pretraining run.

    The defaults are a model of about 4 million parameters on short text.

    Raises
    ------
    ValueError : a setting is out of range, or the model's config or the schedule refuses it
    """

    arch: str = setting("model", "gpt2", f"one of {', '.join(ARCHS)}", older="gpt2", fixed=True)
    n_layer: int = setting("model", 4, "layers", fixed=True)
    n_head: int = setting("model", 4, "heads of attention", fixed=True)
    n_kv_head: int = setting(
        *("model", 0, "llama: heads of keys and values; 0: as many as n_head"),
        least=0,
        older=0,
        fixed=True,
    )
    n_embd: int = setting("model", 256, "channels", fixed=True)
    block_size: int = setting(
        "model", 256, "tokens in a row of a batch, and the model's n_positions", least=1, fixed=True
    )
    batch_size: int = setting("data", 8, "rows in a batch", least=1, fixed=True)
    gradient_accumulation_steps: int = setting(
        "data", 1, "batches in a step of the optimizer", least=1, fixed=True
    )
    batch_order: int = setting(
        "data", 2, "2: an epoch has every token; 1: as in older runs", older=1, fixed=True
    )
    warmup_iters: int = setting(
        *(
            "schedule",
            100,
            "steps of linear warm-up, at most all; a recipe's keep their share of max-iters",
        ),
        least=0,
    )
    eval_iters: int = setting(
        "run", 0, "batches of an evaluation; 0: all validation tokens", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {shown(self.arch)}")
        if self.n_kv_head and self.arch != "llama":
            raise ValueError(f"n_kv_head is for arch llama, got arch {self.arch}")
        if self.batch_order not in (1, 2):
            raise ValueError(f"batch_order must be 1 or 2, got {self.batch_order}")
        self.learning_rates()
        self.model_config(vocab_size=1)

    @property
    def windows_per_step(self) -> int:
        """Rows of a batch in a step of the optimizer, of all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step of the optimizer."""
        return self.windows_per_step * self.block_size

    @property
    def warmup(self) -> int:
        """The steps of linear warm-up."""
        return self.warmup_iters

    def model_config(self, vocab_size: int, eos_token_id: int | None = None) -> ModelConfig:
        """Return the model's config for a tokenizer.

        A Llama's MLP has three matrices in place of two, so 8/3 C inner channels in place of 4 C
        give it as many parameters. Its table of tokens is also its lm_head, as GPT-2's.
        """
        if self.arch == "llama":
            given = {name: getattr(self, own) for name, own in LLAMA_NAMES.items()}
            given["num_key_value_heads"] = self.n_kv_head or None
            try:
                return LlamaConfig(
                    vocab_size=vocab_size,
                    intermediate_size=-(-8 * self.n_embd // (3 * INNER)) * INNER,
                    rms_norm_eps=1e-5,
                    tie_word_embeddings=True,
                    eos_token_id=eos_token_id,
                    bos_token_id=eos_token_id,
                    **given,
                )
            except ValueError as error:
                text = str(error)
                for name, own in LLAMA_NAMES.items():
                    text = text.replace(name, own)
                raise ValueError(text) from None
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.block_size,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            eos_token_id=eos_token_id,
        )


def find_recipe(name: str) -> Path:
    """Return the TOML file of this name, or else the recipe of this name that comes with gpt2c.

    Raises
    ------
    OSError : neither exists
    ValueError : the name is empty
    """
    check_named("the name of the recipe", name)
    path, shipped = Path(name), Path(__file__).parents[1] / "recipes"
    recipe = shipped / f"{name}.toml"
    if path.exists() and not (path.is_dir() and recipe.is_file()):  # demo/ may be a run
        return path
    if not recipe.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in shipped.glob("*.toml")))
        raise FileNotFoundError(f"{name}: no such recipe; gpt2c comes with {known}")
    return recipe


def read_recipe(path: Path, kind: type[Settings] = TrainSettings) -> dict[str, Any]:
    """Read a TOML file's settings of a kind, in their tables or outside of them: name -> value.

    Raises
    ------
    OSError : the file is missing or unreadable
    ValueError : it is not TOML; a table or setting is unknown; a setting is in another table than
        its own, is there twice, or has an invalid value
    """
    text = decode(read_bytes(path, LARGEST_RECIPE), str(path))
    try:
        entries = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for too many digits
        raise ValueError(f"{path} is not TOML: {error}") from None
    try:
        return _of_tables(entries, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of_tables(entries: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    fields, tables = kind.fields(), kind.tables()
    for key, value in entries.items():
        table = key if isinstance(value, dict) else None  # schedule is a table and a setting
        if table is not None and table not in tables:
            raise ValueError(f"no table {shown(table)}; the tables are {', '.join(tables)}")
        for name, entry in ({key: value} if table is None else value).items():
            kind.check_names([name])
            own = fields[name].metadata["table"]
            if table not in (None, own):
                raise ValueError(f"{name} belongs in [{own}], not in [{table}]")
            if name in found:
                raise ValueError(f"{name} is there twice: in [{own}] and in no table")
            found[name] = kind.checked(name, entry)
    return found


def recipe_settings(
    name: str, given: Mapping[str, Any], kind: type[Settings] = TrainSettings
) -> dict[str, Any]:
    """Return a recipe's settings of a kind, replaced by those in `given`.

    If `given` changes the number of steps but not the warm-up, the warm-up keeps its share of them.

    Raises
    ------
    OSError, ValueError : see `find_recipe` and `read_recipe`; the number of steps is out of range
    """
    recipe = read_recipe(find_recipe(name), kind)
    settings = recipe | dict(given)
    if "warmup_iters" in recipe and "warmup_iters" not in given and "max_iters" in given:
        steps = kind.checked("max_iters", given["max_iters"])
        of = recipe.get("max_iters", kind.fields()["max_iters"].default)
        settings["warmup_iters"] = min(recipe["warmup_iters"] * steps // of, GREATEST)
    return settings


def resumed(kind: type[S], stored: Mapping[str, Any], given: Mapping[str, Any], source: str) -> S:
    """Return the settings of a resumed run of a kind: its own, replaced by those in `given`.

    A setting that the run lacks, because it is older than the setting, has the value of that time.

    Raises
    ------
    ValueError : the run's settings are damaged, or `given` changes one that a run must keep;
        `source` names the run
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"{source}: its settings must be an object, got {shown(stored)}")
    fields = kind.fields()
    unknown = sorted(stored.keys() - fields.keys())
    if unknown:
        raise ValueError(
            f"{source}: its settings have {shown(unknown[0])}, which this version of gpt2c lacks:"
            " continue with the version that wrote it, or start a new run"
        )
    stored = {**kind.older(), **stored}
    lacking = [name for name in fields if name not in stored]
    if lacking:
        raise ValueError(
            f"{source}: its settings lack {lacking[0]}: put it back, or start a new run"
        )
    try:
        kind(**stored)
    except ValueError as error:
        raise ValueError(f"{source}: its settings are invalid: {error}") from None
    for name, field in fields.items():
        if field.metadata["fixed"] and name in given and given[name] != stored[name]:
            raise ValueError(
                f"{source}: the run was trained with {name}={stored[name]}, so it cannot continue"
                f" with {given[name]}; drop that setting, or train into another directory"
            )
    return kind(**{**stored, **given})
