"""The history of a run that another trainer logged: its numbers by what they mean.

A log has other names for its numbers (`ROLES`), some of them twice, and some not finite.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitnet_jax import foreign, metrics
from bitnet_jax.fields import UserError, nearest, shown
from bitnet_jax.foreign import Log

RUN_NAMES = ("replicate", "run", "run_id", "run_name", "Name", "seed")  # columns
RESUMED = 0.05  # share of rows at which the steps go back; more is no order at all
OFTEN = 3  # a loss that is judged has as many values, since some faults are told by a row of them


class Role(NamedTuple):
    """A number that a log may hold: the metric it stands for, its names there, what it is."""

    metric: str
    names: str  # separated by spaces, lower case, every other character `_`; the first is ours
    meaning: str


ROLES = {
    "step": Role(
        "step",
        "step global_step train_global_step trainer_global_step _step iter iteration "
        "current_steps steps update num_updates",
        "updates of the parameters so far",
    ),
    "loss": Role(
        metrics.TRAIN_LOSS,
        "loss train_loss training_loss lm_loss train_lm_loss train_crossentropyloss "
        "train_cross_entropy train_ce_loss cross_entropy ce_loss train_loss_step",
        "training loss, nats per token",
    ),
    "eval_loss": Role(
        metrics.LOSS,
        "eval_loss val_loss valid_loss validation_loss test_loss dev_loss held_out_loss "
        "lm_loss_validation eval_lm_loss eval_crossentropyloss loss_val loss_eval",
        "held-out loss, nats per token",
    ),
    "lr": Role(
        metrics.LEARNING_RATE,
        "lr learning_rate train_learning_rate train_lr optim_lr lr_adamw lr_adam lr_pg1 "
        "optim_learning_rate_group0",
        "learning rate",
    ),
    "grad_norm": Role(
        metrics.GRAD_NORM,
        "grad_norm train_grad_norm gradient_norm gnorm train_gnorm optim_total_grad_norm",
        "norm of the gradient",
    ),
    "entropy": Role(
        metrics.ENTROPY,
        "entropy eval_entropy val_entropy collapse_entropy train_entropy",
        "mean entropy of the predictions, nats",
    ),
    "mutual_information": Role(
        metrics.MUTUAL_INFORMATION,
        "mutual_information eval_mutual_information collapse_mutual_information",
        "H(mean prediction) - mean entropy, nats",
    ),
    "logit_std": Role(
        metrics.LOGIT_STD,
        "logit_std logits_std eval_logit_std collapse_logit_std",
        "spread of the logits over the vocabulary",
    ),
    "unigram_kl": Role(
        metrics.UNIGRAM_KL,
        "unigram_kl collapse_unigram_kl",
        "KL from the word frequencies to the mean prediction, nats",
    ),
    "head_norm": Role(
        f"{metrics.NORM_RATIO}head",
        "head_norm lm_head_norm output_norm norm_lm_head_weight decay_norm_ratio_head",
        "norm of the output matrix, logged from the first step on",
    ),
}
SETTINGS = (  # of transformers' TrainingArguments, and of a model's configuration
    *("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "warmup_steps", "max_steps"),
    *("hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings"),
    "initializer_range",
)


@dataclass(frozen=True)
class Column:
    """A number of a log over the steps, in their order: [N], and what it is called there."""

    name: str
    steps_N: np.ndarray
    values_N: np.ndarray

    def finite(self) -> "Column":
        keep = np.isfinite(self.values_N)
        return Column(self.name, self.steps_N[keep], self.values_N[keep])

    def at(self, steps_N: np.ndarray) -> np.ndarray:
        """The last value up to each step; NaN before the first."""
        place = np.searchsorted(self.steps_N, steps_N, side="right") - 1
        return np.where(place < 0, np.nan, self.values_N[place])


@dataclass(frozen=True)
class History:
    """A log whose columns are known: by role, what was not read, settings, what is odd.

    `settings` are what the log, or whoever has it, says of the optimiser, by transformers' names;
    a prediction of what its decay does reads them.
    """

    log: Log
    columns: dict[str, Column]
    unread: list[str]
    settings: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> str:
        """The role of the loss that is judged: held out, where it was evaluated often enough."""
        held_out = self.columns.get("eval_loss")
        enough = held_out is not None and len(held_out.steps_N) >= OFTEN
        return "eval_loss" if enough or "loss" not in self.columns else "loss"

    @property
    def last_step(self) -> int:
        return int(max(column.steps_N[-1] for column in self.columns.values()))

    @property
    def broken(self) -> tuple[int, str] | None:
        """The step from which on a loss, or the gradient's norm OFTEN times, is not finite; how.

        transformers' Trainer logs 0 for such a loss (`logging_nan_inf_filter`).
        """
        for role, last in (("loss", 1), ("eval_loss", 1), ("grad_norm", OFTEN)):
            if column := self.columns.get(role):
                sound_N = np.isfinite(column.values_N)
                if role == "loss" and (column.values_N[-OFTEN:] == 0).all():
                    sound_N &= column.values_N != 0
                if not sound_N[-last:].any():
                    sound = np.flatnonzero(sound_N)
                    first = int(column.steps_N[sound[-1] + 1 if len(sound) else 0])
                    return first, f"{column.name} is {column.values_N[-1]:g} from step {first} on"
        return None


# ------------------------------------------------------------------------------------ reading it


def read(path: Path, named: Sequence[str] = (), settings: dict | None = None) -> History:
    """The history in a log; `named` are ROLE=COLUMN, `settings` go before those of the log.

    Raises UserError for what is no log, and where its step or its loss is not found.
    """
    log = foreign.read(path)
    for name in RUN_NAMES:
        runs = list(dict.fromkeys(str(row[name]) for row in log.rows if name in row))
        if len(runs) > 1:
            raise UserError(
                f"--log {path}: holds {len(runs)} runs by its column {name}: "
                f"{shown(', '.join(runs))}; give a file of one run"
            )
    chosen = choose(log, named)
    losses = chosen.keys() & {"loss", "eval_loss"}
    if missing := ["step"] * ("step" not in chosen) + ["loss"] * (not losses):
        raise _missing(log, missing)
    kept, note = in_order(log, chosen["step"])
    columns, notes = {}, [note] if note else []
    for role, name in chosen.items():
        if role != "step":
            columns[role], odd = _column(log, kept, chosen["step"], name)
            notes += odd
    unread = [name for name in log.columns if name not in chosen.values()]
    said = {key: row[key] for row in log.rows for key in row if key in unread} | log.settings
    own = {key: said[key] for key in SETTINGS if key in said}
    return History(log, columns, unread, own | (settings or {}), tuple(notes))


def choose(log: Log, named: Sequence[str]) -> dict[str, str]:
    """The column of each role: as `named`, else the first of the role's names that is there.

    A chart that was exported from W&B puts `RUN - ` before a name, and beside it columns of the
    least and the greatest value, which are not read.
    """
    chosen = {}
    for text in named:
        role, equals, name = text.partition("=")
        if not equals or role not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(
                f"--map {shown(text)}: write NAME=COLUMN with NAME one of {known}"
                f"{nearest(role, ROLES)}"
            )
        if name not in log.columns:
            raise UserError(
                f"--map {shown(text)}: {log.path} has no such column{nearest(name, log.columns)}; "
                f"it has {shown(', '.join(log.columns), 300)}"
            )
        chosen[role] = name
    plain: dict[str, list[str]] = {}
    for name in log.columns:
        if name not in chosen.values() and not name.endswith(("__MIN", "__MAX")):
            plain.setdefault(_plain(name), []).append(name)
    for role, (_, names, _) in ROLES.items():
        candidates = [plain[alias] for alias in names.split() if alias in plain]
        if role not in chosen and candidates:
            if len(candidates[0]) > 1:
                several = shown(", ".join(map(repr, candidates[0])), 300)
                raise UserError(
                    f"--log {log.path}: several columns may be the {role}: {several}; choose with "
                    f"--map {role}=COLUMN"
                )
            chosen[role] = candidates[0][0]
    return chosen


def _plain(name: str) -> str:
    """A column's name as `ROLES` has it."""
    return re.sub(r"[^a-z0-9]+", "_", name.rpartition(" - ")[2].strip().lower())


def _missing(log: Log, roles: list[str]) -> UserError:
    wanted = [alias for role in roles for alias in ROLES[role].names.split()]
    near = sorted(log.columns, key=lambda name: not nearest(_plain(name), wanted))
    how = " ".join(f"--map {role}=COLUMN" for role in roles)
    return UserError(
        f"--log {log.path}: no column is the {' or the '.join(roles)}: {how}; it has "
        f"{shown(', '.join(near), 300)}"
    )


def in_order(log: Log, step: str) -> tuple[list[int], str]:
    """Places of the rows that count, by their steps, and what is odd about these.

    Where steps go back a run was resumed: what was logged from there on counts. Where they go back
    all the time there is no order, and they are sorted.
    """
    places = [i for i, row in enumerate(log.rows) if step in row]
    steps_N = np.array([_number(log, i, step) for i in places])
    if not np.isfinite(steps_N).all():
        raise UserError(f"--log {log.path}: a {step} is not finite")
    back, note = np.flatnonzero(np.diff(steps_N) < 0), ""
    if len(back) > max(1, RESUMED * len(steps_N)):
        note = "the steps are in no order: sorted"
    elif len(back):
        at = ", ".join(f"{steps_N[i + 1]:.0f}" for i in back[:3])
        note = f"steps go back to {at}: resumed there, what was logged from there on counts"
        keep = np.minimum.accumulate(steps_N[::-1])[::-1] >= steps_N
        places, steps_N = np.array(places)[keep].tolist(), steps_N[keep]
    return [places[i] for i in np.argsort(steps_N, kind="stable")], note


def _number(log: Log, place: int, name: str) -> float:
    value = log.rows[place][name]
    if isinstance(value, str):
        where = f"--log {log.path}: {log.places[place]}"
        raise UserError(f"{where}: {name} is no number: {shown(value)}")
    return value


def _column(log: Log, kept: list[int], step: str, name: str) -> tuple[Column, list[str]]:
    """A column over the `kept` rows; of a step that stands there twice the last value counts."""
    rows = [i for i in kept if name in log.rows[i]]
    if not rows:
        raise UserError(f"--log {log.path}: no row has both {step} and {name}")
    steps_N = np.array([log.rows[i][step] for i in rows])
    values_N = np.array([_number(log, i, name) for i in rows])
    last, notes = np.append(np.diff(steps_N) > 0, True), []
    if np.sum(~last) > 1:  # one is where a run was resumed
        notes.append(
            f"{name} has {np.sum(~last)} more values at steps that it had: the last counts"
        )
    holes = ~np.isfinite(values_N[last])
    if holes.any() and not holes[-1]:
        first = int(steps_N[last][holes][0])
        notes.append(f"{name} is not finite {holes.sum()} times, first at step {first}")
    return Column(name, steps_N[last], values_N[last]), notes
