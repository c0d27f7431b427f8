"""Does a quantisation warm-up help a dense model that becomes ternary?

From every seed a dense model (layout b158 or llama without quantisation) trains for T steps and
leaves as a Hugging Face folder of master weights. With `--set run.init=hf:FOLDER` the dense model
is that folder's, a LlamaForCausalLM or a BitNetForCausalLM from elsewhere. From there, with a new
optimiser and the same schedule and batches, it trains for T steps more:

    no warm-up          ternary weights and int8 activations from the first step
    warm-up over T/10   both strengths grow as min(step / (T/10), 1): over 1000 steps for T = 10,000
    warm-up over T/2    the same over T/2
    still dense         neither, which is what becoming ternary costs

Beside it, `from scratch` is ternary for T steps from random weights: what the dense start, of T
steps more, is worth.

    python -m experiments.warmup_from_dense            # 3 min on 2 cores
    python -m experiments.warmup_from_dense --preset b158 --set run.steps=10000
    python -m experiments.warmup_from_dense --set run.init=hf:FOLDER --set data.tokenizer=hf:FOLDER

Goes when continued training from dense models is studied at a size that somebody would use.
"""

import math
from dataclasses import replace
from pathlib import Path

from bitnet_jax import hf, hf_config, restore
from bitnet_jax.config import Config, Hyper
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import LOSS
from experiments.lab.arms import Arm, Measure, Request, chosen, train_arms
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import difference, interval, of, values
from experiments.lab.studies import QUICK_B158, SIZE

DENSE, SCRATCH, ABRUPT, CEILING = "dense", "from scratch", "no warm-up", "still dense"
SHORT, LONG = WARMUPS = ("warm-up over T/10", "warm-up over T/2")
OFF = {"weight_quant": 0.0, "act_quant": 0.0}
FROM_RANDOM = (Arm(DENSE, "published", **OFF), Arm(SCRATCH, "published"))


def continuations(folder: Path | str) -> list[Arm]:
    """The arms that start from a folder of master weights."""
    start = {"run.init": f"hf:{folder}"}
    return [
        Arm(ABRUPT, "published", fields=start),
        Arm(SHORT, "published", fields=start, quant_warmup_steps=lambda cfg: cfg.run.steps // 10),
        Arm(LONG, "published", fields=start, quant_warmup_steps=lambda cfg: cfg.run.steps // 2),
        Arm(CEILING, "published", fields=start, **OFF),
    ]


ARMS = (*FROM_RANDOM, *continuations("FOLDER OF THE DENSE MODEL"))


def export(request: Request, row: dict) -> Path:
    """The folder with the last weights of a dense row's replicate, written unless it is there."""
    name, _, index = row["id"].rpartition("/")
    folder = request.workdir / f"{name}-{index}-hf"
    if not folder.exists():
        steps = row["config"]["run"]["steps"]
        model = restore.load_model(f"{request.workdir / name}@{steps}:{index}")
        # As master weights of a BitNet, which the dense ones are from now on: hence Hyper().
        hf.export(folder, model.cfg, model.params, Hyper(), model.tokenizer)
    return folder


def train(request: Request, arms: list[Arm], measure: Measure | None) -> list[dict]:
    """Rows of the chosen arms; of those that continue, each seed from its own dense model."""
    if folder := given(request.cfg):
        assigned = tuple(path for path in request.assigned if path != "run.init")
        scratch = Arm(SCRATCH, "published", fields={"run.init": None})
        request = replace(request, assigned=assigned)
        return train_arms(request, [scratch, *continuations(folder)], measure)
    wanted = {arm.name for arm in chosen(request, arms)}
    continued = wanted - {arm.name for arm in FROM_RANDOM}
    first = [arm for arm in FROM_RANDOM if arm.name in wanted or (continued and arm.name == DENSE)]
    request = replace(request, only=(), recipes=())
    rows = train_arms(request, first, measure, keep=True)
    for row in [row for row in rows if continued and row["arm"] == DENSE]:
        started = [arm for arm in continuations(export(request, row)) if arm.name in continued]
        rows += train_arms(replace(request, seeds=[row["seed"]]), started, measure)
    return rows


def given(cfg: Config) -> str | None:
    """The folder of a dense model that is there already."""
    kind, _, folder = (cfg.run.init or "").partition(":")
    return folder if kind == "hf" else None


def check(cfg: Config) -> None:
    """Raise UserError for a model that cannot leave as a folder, or does not come from one."""
    if cfg.model.layout not in hf_config.TYPES:
        layout = f"model.layout={cfg.model.layout}: the dense model leaves as a Hugging Face folder"
        raise UserError(f"{layout}; use {' or '.join(hf_config.TYPES)}")
    if cfg.run.init and not given(cfg):
        raise UserError(f"run.init={cfg.run.init}: the dense model comes from hf:FOLDER, or is new")


def rise(df, arm: str):
    """How far the held-out loss of an arm rises above its seed's dense model at most."""
    highest = of(df, arm)["curve"].map(lambda curve: max(curve[LOSS]))
    return interval((highest - values(df, DENSE, LOSS)).dropna())


CLAIMS = (
    Claim(
        "start",
        "T ternary steps after T dense ones end 0.4 nats or more below T ternary from scratch",
        lambda df: difference(df, ABRUPT, SCRATCH).within(-math.inf, -0.4),
        QUICK_B158,
    ),
    Claim(
        "warm-up",
        "from a dense model, a warm-up over T/10 or T/2 moves the loss by less than 0.1 nats",
        lambda df: all(difference(df, x, ABRUPT).within(-0.1, 0.1) for x in WARMUPS),
        QUICK_B158,
    ),
    Claim(
        "cost",
        "a dense model that becomes ternary ends within 0.1 nats of one that stays dense",
        lambda df: difference(df, ABRUPT, CEILING).within(-0.1, 0.1),
        QUICK_B158,
    ),
)


def show(df, exhibits) -> None:
    starts = (ABRUPT, *WARMUPS)
    pairs = [(x, y) for y in (ABRUPT, SCRATCH, CEILING) for x in starts if x != y]
    exhibits.differences(df, pairs, (LOSS,), "At the last step")
    exhibits.table(df)
    exhibits.curves(df[df["arm"] != DENSE], title="Held-out loss after the start")
    arms = [x for x in (*starts, CEILING) if {x, DENSE} <= set(df["arm"])]
    table_rows = [[x, rise(df, x).text("+.2f")] for x in arms]
    if table_rows:  # none beside a dense model from elsewhere
        exhibits.grid(
            "Largest loss after the start, above the dense model's", ["arm", "nats"], table_rows
        )


if __name__ == "__main__":
    quick = (*SIZE, "run.eval_every=15")
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=quick, train=train, check=check)
