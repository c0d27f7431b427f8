"""Does the transition to stage 2 trigger the collapse?

The report's sixth recommendation. From a run's checkpoint at the stage boundary arms continue:

    stage 1 continued    learning rate held at its value at the end of stage 1, decay of stage 1
    stage 2              learning rate and decay of stage 2
    stage-2 LR only      learning rate of stage 2, decay of stage 1
    stage-2 decay only   learning rate held, decay of stage 2
    stage 2, Adam reset  stage 2 with both moments of Adam and its bias correction from 0

Arm "stage 2" must repeat the run that was not stopped bit by bit, or the command fails.

    python -m experiments.fork_transition              # 4 min on 2 cores

Goes when the report's recommendations are no longer asked about.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import log, presets
from bitnet_jax.config import Hyper, RunConfig
from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS, MUTUAL_INFORMATION, metric
from experiments.lab import rows
from experiments.lab.arms import Arm, Group, Request, check_free, chosen, groups, place, train_group
from experiments.lab.claims import Claim
from experiments.lab.exhibits import signed
from experiments.lab.experiment import experiment
from experiments.lab.finished import RunFailed
from experiments.lab.stats import difference, ended, mean, of
from experiments.lab.studies import FULL, QUICK, SMALL

KINDS = ("coupled", "decoupled")
UNFORKED = "not stopped"
CONTINUED, STAGE_2, RESET = "stage 1 continued", "stage 2", "stage 2, Adam reset"
LR_ONLY, DECAY_ONLY = "stage-2 LR only", "stage-2 decay only"
FORKS = (STAGE_2, CONTINUED, LR_ONLY, DECAY_ONLY, RESET)
BOUNDARY_KEYS = (LOSS, ENTROPY, MUTUAL_INFORMATION, LOGIT_STD, DISTINCT)


def changes(fork: str, hyper: Hyper) -> dict[str, float]:
    """Numbers of a recipe that an arm changes: all of stage 2."""
    held = {"lr_stage2_start": hyper.lr_stage1_end, "lr_final": hyper.lr_stage1_end}
    same = {f"{kind}_2": getattr(hyper, f"{kind}_1") for kind in KINDS}
    return {CONTINUED: held | same, LR_ONLY: same, DECAY_ONLY: held}.get(fork, {})


ARMS = tuple(
    Arm(f"{kind} {fork}", kind, **changes(fork, presets.RECIPES[kind](RunConfig(steps=1000))))
    for kind in KINDS
    for fork in (UNFORKED, *FORKS)
)


def measure(run) -> dict[str, list]:
    """`boundary`: the evaluation at the last step of stage 1; `fingerprint`: hashes of the numbers
    logged in stage 2, and of the state at the last step."""
    boundary, prints, at = run.cfg.run.boundary, [], []
    for i, evals in enumerate(run.evals):
        late = [row for row in (*run.trains[i], *evals) if row["step"] > boundary]
        leaves = jax.tree.leaves(run.replicate(run.states, i))
        state = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
        hashed = {"rows": json.dumps(late, sort_keys=True).encode(), "state": state}
        prints.append({key: hashlib.sha256(x).hexdigest()[:16] for key, x in hashed.items()})
        (row,) = (row for row in evals if row["step"] == boundary)
        at.append({key: float(f"{row[key]:.5g}") for key in BOUNDARY_KEYS})
    return {"boundary": at, "fingerprint": prints}


def train(request: Request, arms: list[Arm], measure) -> list[dict]:
    """Rows of the runs that are not stopped and of the chosen arms, which continue them."""
    wanted = chosen(request, arms)
    check_free(request, wanted)
    all_rows = []
    for group in groups(dataclasses.replace(request, only=(UNFORKED,)), arms):
        runs = train_group(request, group, measure, keep=True)
        source, step = place(request, group), group.cfg.run.boundary
        prepare = functools.partial(begin_log, source=source, step=step)
        for fork in FORKS:
            if any(arm.name.endswith(f" {fork}") for arm in wanted):
                runs += train_group(request, forked(group, source, fork), measure, prepare=prepare)
        if wrong := differing(rows.frame(runs)):
            raise RunFailed(f"restored at the boundary, {wrong[0]} differs from the run itself")
        all_rows += runs
    order = {arm.name: i for i, arm in enumerate(arms)}
    return sorted(all_rows, key=lambda row: (order[row["arm"]], row["seed"]))


def forked(group: Group, source: Path, fork: str) -> Group:
    """The replicates of a group, continued from its boundary as one arm."""
    replicates = [
        dataclasses.replace(
            rep,
            name=rep.name.replace(UNFORKED, fork),
            hyper=rep.hyper.replace(**changes(fork, rep.hyper)),
        )
        for rep in group.replicates
    ]
    run, init = group.cfg.run, f"fork:{source}@{group.cfg.run.boundary}"
    run = dataclasses.replace(run, init=init, reset_optimizer=fork == RESET)
    bases = [base | {"run.init": None, "run.reset_optimizer": False} for base in group.bases]
    return Group(dataclasses.replace(group.cfg, run=run), replicates, bases, group.seams)


def begin_log(workdir: Path, source: Path, step: int) -> None:
    """Start a fork's metrics.jsonl with the rows of its source up to `step`, unless it is there."""
    path = workdir / "metrics.jsonl"
    if path.exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    logged = [row for row in log.read_rows(source / "metrics.jsonl") if row["step"] <= step]
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in logged))
    os.replace(draft, path)


def differing(df) -> list[str]:
    """Arms and seeds whose restored stage 2 is not that of the run that was not stopped."""
    keys = ["fingerprint/rows", "fingerprint/state"]
    labels = []
    for kind in (x for x in KINDS if f"{x} {STAGE_2}" in set(df["arm"])):
        restored, whole = (of(df, f"{kind} {x}")[keys] for x in (STAGE_2, UNFORKED))
        wrong = (restored != whole.loc[restored.index]).any(axis=1)
        labels += [f"{kind} {STAGE_2}, seed {seed}" for seed in wrong.index[wrong]]
    return labels


def effect(df, kind: str, fork: str):
    """Paired difference of the loss of an arm from stage 1 continued."""
    return difference(df, f"{kind} {fork}", f"{kind} {CONTINUED}")


def before(df, key: str = f"boundary/{LOSS}"):
    """Paired difference coupled - decoupled of the runs that were not stopped."""
    return difference(df, f"coupled {UNFORKED}", f"decoupled {UNFORKED}", key)


def same_either_way(df) -> bool:
    coupled, decoupled = ([ended(df, f"{k} {x}") for x in (STAGE_2, CONTINUED)] for k in KINDS)
    return not any(x.any() for x in coupled) and all(x.all() for x in decoupled)


CLAIMS = (
    Claim(
        "trigger",
        "with stage 2 or without, the coupled recipe has not learned, and the decoupled one has",
        same_either_way,
        QUICK,
    ),
    Claim(
        "before",
        "at the stage boundary already, the coupled recipe's loss is 1 nat or more above decoupled",
        lambda df: before(df).within(1, np.inf),
        *(QUICK, FULL),
    ),
    Claim(
        "decay",
        "stage 2, and its decay alone, lower the coupled recipe's loss against stage 1 continued",
        lambda df: all(effect(df, "coupled", x).below for x in (STAGE_2, DECAY_ONLY)),
        QUICK,
    ),
    Claim(
        "restored",
        "a run restored at the stage boundary repeats the one that was not stopped, bit by bit",
        lambda df: all(len(of(df, f"{k} {STAGE_2}")) > 0 for k in KINDS) and not differing(df),
        *(QUICK, FULL),
    ),
)


def show(df, exhibits) -> None:
    columns = [(f"boundary/{key}", metric(key).title, metric(key).format) for key in BOUNDARY_KEYS]
    table = [
        [kind, *(mean(df, f"{kind} {UNFORKED}", key).text(spec) for key, _, spec in columns)]
        for kind in KINDS
    ]
    table.append(["coupled - decoupled", *(signed(before(df, k), spec) for k, _, spec in columns)])
    exhibits.grid("At the stage boundary", ["recipe", *(title for _, title, _ in columns)], table)
    arms = df[~df["arm"].str.endswith(UNFORKED)]
    exhibits.table(arms)
    pairs = [(f"{k} {x}", f"{k} {CONTINUED}") for k in KINDS for x in FORKS if x != CONTINUED]
    exhibits.differences(arms, pairs, title=f"Against {CONTINUED}")
    for kind in KINDS:
        for key in (LOSS, MUTUAL_INFORMATION):
            exhibits.curves(arms[arms["arm"].str.startswith(kind)], key)


if __name__ == "__main__":
    experiment(
        __doc__, ARMS, measure, CLAIMS, show, seeds="0-2", quick=(*SMALL, "run.eval_every=15"),
        train=train,
    )  # fmt: skip
