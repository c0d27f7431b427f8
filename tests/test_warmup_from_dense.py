"""What the warm-up experiment trains, and what it concludes from rows."""

from pathlib import Path

import pytest

from bitnet_jax import presets
from bitnet_jax.config import Hyper, UserError
from experiments import common
from experiments import warmup_from_dense as warmup

SHORT, LONG = warmup.WARMUPS
LOSSES = {"dense": 5.0, "from scratch": 5.5, "no warm-up": 5.2, "still dense": 4.9}


def row(arm, seed, loss, peak=None, index=0):
    """A row whose loss differs a little between seeds."""
    loss += 0.001 * seed
    final = {"eval/loss": loss, "collapse/entropy": 5.0, "collapse/verdict": "healthy"}
    predictor = {"loss": 6.0, "entropy": 6.0, "distinct": 1}
    return {
        "id": f"run/{index}",
        "arm": arm,
        "seed": seed,
        "steps": 300,
        "final": final,
        "curve": {"step": [0, 150, 300], "eval/loss": [peak or loss, loss, loss]},
        "references": dict.fromkeys(("bigram", "unigram", "uniform"), predictor)
        | {"targets": {"distinct": 9}, "tracked_positions": 99},
    }


def study(short, long, jitter=0.0005):
    """The analysis of three seeds; the differences of the warm-ups vary by `jitter`."""
    rows = []
    for seed in range(3):
        rows += [row(arm, seed, loss) for arm, loss in LOSSES.items()]
        rows += [row(arm, seed, 5.2 + d + jitter * (seed - 1), peak=7.0 + seed)
                 for arm, d in ((SHORT, short), (LONG, long))]  # fmt: skip
    return warmup.analyse(rows)


@pytest.mark.parametrize(
    ("short", "long", "told"),
    [
        (-0.1, -0.2, (f"{SHORT} helps: -0.100 [", f"{LONG} helps: -0.200 [")),
        (-0.1, 0.2, (f"{SHORT} helps: -0.100 [", f"{LONG} hurts: +0.200 [")),
        (0.0, 0.2, (f"{SHORT}: no effect seen (n=3)", f"{LONG} hurts: +0.200 [")),
    ],
)
def test_only_an_interval_without_zero_helps_or_hurts(short, long, told):
    conclusion = study(short, long).conclusion
    assert conclusion.startswith(told[0]) and f"; {told[1]}" in conclusion


def test_a_difference_within_the_spread_of_the_seeds_is_no_effect():
    told = study(-0.1, -0.2, jitter=1.0).conclusion
    assert f"{SHORT}: no effect seen" in told and f"{LONG}: no effect seen" in told


def test_the_dense_start_and_the_cost_of_becoming_ternary_are_told():
    told = study(0.0, 0.0)
    assert "the dense start is worth -0.30 [" in told.conclusion
    assert "becoming ternary costs +0.30 [" in told.conclusion
    assert told.n == 3 and "from scratch" in told.tables[0].rows[1][0]


def test_the_rise_is_measured_from_each_seeds_own_dense_model():
    """Peaks 7, 8, 9 above 5.000, 5.001, 5.002."""
    rows = [row("dense", seed, 5.0) for seed in range(3)]
    rows += [row(SHORT, seed, 5.2, peak=7.0 + seed) for seed in range(3)]
    assert warmup.worst_after(rows, SHORT, warmup.dense_loss(rows)).mean == pytest.approx(2.999)


def test_arms_differ_in_strength_and_warm_up_only():
    """Over 1000 steps, the published warm-up, where T is 10,000."""
    arms = warmup.continuations(10_000, Path("some/folder"))
    numbers = {arm.name: Hyper(**arm.hyper) for arm in arms}
    assert {arm.run["init"] for arm in arms} == {"hf:some/folder"}
    assert {name: h.quant_warmup_steps for name, h in numbers.items()} == {
        "no warm-up": 0, SHORT: 1000, LONG: 5000, "still dense": 0
    }  # fmt: skip
    assert [h.weight_quant + h.act_quant for h in numbers.values()] == [2, 2, 2, 0]
    for arm in arms:
        presets.check_hyper(presets.preset("125m").run, Hyper(**arm.hyper))


def test_every_seed_continues_from_its_own_folder(monkeypatch, tmp_path):
    """As one program per seed: the folder belongs to the configuration."""
    calls, concluded = [], []

    def train_arms(name, request, arms, **rest):
        calls.append((request.seeds, [arm.run.get("init") for arm in arms], rest))
        seeds = enumerate(request.seeds)
        return [row(arm.name, s, 5.0, index=i) for i, s in seeds for arm in arms]

    monkeypatch.setattr(warmup.sweep, "train_arms", train_arms)
    monkeypatch.setattr(common, "conclude", lambda *arguments: concluded.append(arguments[3]))
    argv = ["--preset", "quick", "--seeds", "3,5", "--workdir", str(tmp_path)]
    request = common.parse("", warmup.NAME, "quick", argv, quick=warmup.QUICK, sweep=True)
    for i in range(2):
        (tmp_path / f"run-{i}-hf").mkdir()  # exported before: not written again
    warmup.body(request)
    assert calls[0] == ([3, 5], [None, None], {"keep_checkpoints": True})
    assert [seeds for seeds, _, _ in calls[1:]] == [[3], [5]]
    assert [set(init) for _, init, _ in calls[1:]] == [
        {f"hf:{tmp_path / f'run-{i}-hf'}"} for i in range(2)
    ]
    assert len(concluded[0]) == 2 * 2 + 2 * 4


def test_a_dense_run_without_its_checkpoint_is_named(tmp_path):
    request = common.parse("", warmup.NAME, "quick", ["--workdir", str(tmp_path)], sweep=True)
    with pytest.raises(UserError, match="no checkpoint of step 300"):
        warmup.export(request, row("dense", 0, 5.0))
