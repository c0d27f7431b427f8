"""What the warm-up from a dense model trains, and what its claims say of rows."""

from dataclasses import replace

import pytest
from test_lab import make_rows

from bitnet_jax import presets
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import LOSS
from experiments import warmup_from_dense as study
from experiments.lab import arms, rows
from experiments.lab.arms import Request
from experiments.lab.claims import FAILS, HOLDS, judge
from experiments.lab.exhibits import Exhibits
from experiments.lab.studies import QUICK_B158

LOSSES = {
    "dense": 3.4,
    "from scratch": 3.5,
    "no warm-up": 2.9,
    study.SHORT: 2.9,
    study.LONG: 2.9,
    "still dense": 2.85,
}


def make(**losses):
    return make_rows({arm: [x + 0.1 * s for s in range(3)] for arm, x in (LOSSES | losses).items()})


def statuses(**losses):
    df = rows.frame(make(**losses))
    return {claim.name: judge(claim, QUICK_B158, df).status for claim in study.CLAIMS}


@pytest.mark.parametrize(
    ("losses", "wrong"),
    [
        ({}, set()),
        ({"from scratch": 3.3}, {"start"}),
        ({study.LONG: 3.05}, {"warm-up"}),
        ({study.SHORT: 2.75}, {"warm-up"}),
        ({"still dense": 2.7}, {"cost"}),
        ({"still dense": 3.05}, {"cost"}),
    ],
)
def test_claims_follow_from_the_rows(losses, wrong):
    expected = {claim.name: FAILS if claim.name in wrong else HOLDS for claim in study.CLAIMS}
    assert statuses(**losses) == expected


def test_the_rise_is_measured_from_each_seeds_own_dense_model():
    """Peaks 7, 8, 9 above 3.4, 3.5, 3.6."""
    run_rows = make()
    for row in run_rows:
        if row["arm"] == study.SHORT:
            row["curve"][LOSS] = [6.0, 7.0 + row["seed"], 5.0]
    assert study.rise(rows.frame(run_rows), study.SHORT).mean == pytest.approx(8 - 3.5)


def test_tables_of_a_part_of_the_arms_are_shown():
    run_rows = [row for row in make() if row["arm"] in ("dense", "no warm-up")]
    shown = Exhibits(rows.frame(run_rows))
    study.show(rows.frame(run_rows), shown)
    assert shown.tables[-1].rows == [["no warm-up", "+2.50 [+2.25, +2.75]"]]  # 6.0 at step 0


def request(tmp_path, **more):
    cfg = presets.preset("tiny")
    return Request("toy", "tiny", cfg, {}, [3, 5], workdir=tmp_path, at_once=9, **more)


def test_arms_differ_in_strength_and_warm_up_only(tmp_path):
    """Over 1000 steps, the published warm-up, where T is 10,000."""
    numbers = {}
    for arm in study.continuations("some/folder"):
        cfg, (rep, _), base = arms.replicates(request(tmp_path), arm, 500)
        assert (cfg.run.init, base) == ("hf:some/folder", {"run.init": None})
        numbers[arm.name] = rep.hyper
    assert {name: h.quant_warmup_steps for name, h in numbers.items()} == {
        "no warm-up": 0, study.SHORT: 1000, study.LONG: 5000, "still dense": 0
    }  # fmt: skip
    assert [h.weight_quant + h.act_quant for h in numbers.values()] == [2, 2, 2, 0]


@pytest.fixture
def trained(monkeypatch):
    """Calls of a stand-in for `train_arms`: seeds, names of arms, folders that they start from."""
    calls = []

    def train_arms(request, arms, measure, *, keep=False):
        starts = {arm.fields.get("run.init") for arm in arms}
        calls.append((request.seeds, [arm.name for arm in arms], starts, keep))
        run_rows = make_rows({arm.name: [5.0] * len(request.seeds) for arm in arms})
        return [row | {"seed": request.seeds[row["seed"]], "id": f"run/{row['seed']}"}
                for row in run_rows]  # fmt: skip

    monkeypatch.setattr(study, "train_arms", train_arms)
    return calls


def test_every_seed_continues_from_its_own_folder(trained, tmp_path):
    """As one program per seed: the folder belongs to the configuration."""
    for i in range(2):
        (tmp_path / f"run-{i}-hf").mkdir()  # exported before: not written again
    run_rows = study.train(request(tmp_path), list(study.ARMS), None)
    names = [arm.name for arm in study.ARMS]
    assert trained == [
        ([3, 5], names[:2], {None}, True),
        ([3], names[2:], {f"hf:{tmp_path / 'run-0-hf'}"}, False),
        ([5], names[2:], {f"hf:{tmp_path / 'run-1-hf'}"}, False),
    ]
    assert len(run_rows) == 2 * 2 + 2 * 4


@pytest.mark.parametrize(
    ("only", "names"),
    [("T/10", [["dense"], [study.SHORT], [study.SHORT]]), ("scratch", [["from scratch"]])],
)
def test_chosen_arms_train_with_the_dense_model_that_they_need(trained, tmp_path, only, names):
    for i in range(2):
        (tmp_path / f"run-{i}-hf").mkdir()
    study.train(request(tmp_path, only=(only,)), list(study.ARMS), None)
    assert [call[1] for call in trained] == names


def test_a_dense_run_without_its_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoints in"):
        study.export(request(tmp_path), make()[0])


def test_a_dense_model_from_elsewhere_starts_all_seeds_of_one_study(trained, tmp_path):
    """None is trained; the arm from scratch is told that it starts from none."""
    asked = request(tmp_path, assigned=("run.init",))
    cfg = replace(asked.cfg, run=replace(asked.cfg.run, init="hf:some/folder"))
    study.check(cfg)
    run_rows = study.train(replace(asked, cfg=cfg), list(study.ARMS), None)
    names = [study.SCRATCH, study.ABRUPT, *study.WARMUPS, study.CEILING]
    assert trained == [([3, 5], names, {None, "hf:some/folder"}, False)] and len(run_rows) == 10
    shown = Exhibits(rows.frame(run_rows))
    study.show(rows.frame(run_rows), shown)
    assert shown.tables
    with pytest.raises(UserError, match=r"run\.init=fork:runs/mine"):
        study.check(replace(cfg, run=replace(cfg.run, init="fork:runs/mine")))


def test_a_layout_that_no_folder_holds_is_refused_before_training():
    cfg = presets.preset("tiny")
    study.check(cfg)
    study.check(replace(cfg, model=replace(cfg.model, layout="llama")))
    with pytest.raises(UserError, match=r"model\.layout=report"):
        study.check(replace(cfg, model=replace(cfg.model, layout="report")))
