"""The law against logs that follow it, or do not, by construction."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bitnet_jax import presets, shrink
from bitnet_jax.config import UserError
from experiments import common
from experiments import shrink_law as study


def request(tmp_path, layout="report", steps=300):
    cfg = presets.preset("tiny")
    cfg = replace(
        cfg,
        model=replace(cfg.model, layout=layout, d_model=64),
        run=replace(cfg.run, steps=steps, eval_every=5),
    )
    return common.Request("tiny", cfg, [0], {}, [], tmp_path, True, None)


def test_arms_change_one_number_and_name_it(tmp_path):
    arms = study.arms(request(tmp_path, steps=1000))
    assert [arm.name for arm in arms] == [
        "the report's", "warm-up 25", "warm-up 400", "decay 0.001", "decay 0.01", "decay 1",
        "decoupled",
    ]  # fmt: skip
    assert arms[1].hyper == {"warmup_steps": 25.0}
    assert arms[3].hyper == {"coupled_1": 0.001, "coupled_2": 0.0005}


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(UserError, match="law is for the uniform initialisation of layout report"):
        study.arms(request(tmp_path, layout="b158"))


def write_log(workdir, cfg, hyper, ratio):
    """A log whose spread of logits is 0.5 times `ratio(steps)`, and whose decay part is a half."""
    workdir.mkdir()
    steps = np.arange(0, cfg.run.steps + 1, cfg.run.eval_every)
    lines = []
    for step, r in zip(steps.tolist(), ratio(steps).tolist(), strict=True):
        std = 0.5 * r
        entropy = shrink.gaussian_entropy(300, std) - 0.01
        numbers = {"eval/loss": entropy - 0.7, "collapse/entropy": entropy}
        lines.append({"step": step, "replicate": 0, "kind": "eval", "collapse/logit_std": std})
        lines[-1] |= numbers
        shares = {f"decay/update_share_{g}": 0.5 for g in study.GROUPS}
        if step:
            lines.append({"step": step, "replicate": 0, "kind": "train", **shares})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    saved = {"replicates": [{"hyper": vars(hyper)}], "model": {"vocab_size": 300}}
    (workdir / "config.json").write_text(json.dumps(saved))


@pytest.fixture
def no_checkpoint(monkeypatch):
    counts = {"all": 990, "embedding": 990, "predicted": 1000.0}
    monkeypatch.setattr(study, "count_large", lambda *_: {"above_1.1": counts})


@pytest.mark.usefixtures("no_checkpoint")
def test_a_log_that_follows_the_law_is_measured_so(tmp_path):
    cfg = request(tmp_path).cfg
    hyper = presets.RECIPES["report"](cfg.run.steps)
    total = shrink.summed_rate(cfg.run, hyper)

    def law(steps):
        return shrink.spread_ratio(total[steps], 64**-0.5)

    write_log(tmp_path / "run", cfg, hyper, law)
    found = study.measure(tmp_path / "run", cfg, 0)["shrink"]
    assert found["law_error"] == pytest.approx(0, abs=1e-6)
    assert found["half_step"] == pytest.approx(found["half_step_predicted"], abs=0.3)
    assert found["late_entropy_gap"] == pytest.approx(-0.01, abs=1e-4)
    assert found["late_slope"] == pytest.approx(-0.7, abs=1e-4)
    assert found["mean_share"] == dict.fromkeys(study.GROUPS, 0.5)


@pytest.mark.usefixtures("no_checkpoint")
def test_a_log_that_keeps_its_spread_breaks_the_law(tmp_path):
    cfg = request(tmp_path).cfg
    hyper = presets.RECIPES["report_decoupled"](cfg.run.steps)
    write_log(tmp_path / "run", cfg, hyper, lambda steps: np.ones(len(steps)))
    found = study.measure(tmp_path / "run", cfg, 0)["shrink"]
    assert found["half_step"] is None
    assert 0.4 < found["law_error"] <= 0.5


def made_rows(error):
    """Two seeds of three arms; the report's arm is `error` off the law."""
    found = []
    for arm, off in ((study.REPORTED, error), ("warm-up 8", 0.01), (study.DECOUPLED, 0.4)):
        for seed in range(2):
            spread = {"step": [0, 300], "measured": [1, 0.3], "law": [1, 0.2]}
            head = 0.001 if arm == study.DECOUPLED else 0.8
            found.append({
                "arm": arm, "seed": seed, "steps": 300,
                "final": {"eval/loss": 7.0, "collapse/verdict": "slow"},
                "references": {
                    "tracked_positions": 128, "targets": {"distinct": 90},
                    **{k: {"loss": 7.0, "entropy": 7.0, "distinct": 1}
                       for k in ("uniform", "unigram", "bigram")},
                },
                "above_1.1": {"all": 990, "embedding": 990 + seed, "predicted": 1000.0},
                "shrink": {
                    "half_step": 40.0 + seed, "half_step_predicted": 41.0, "law_error": off,
                    "late_std": 0.1, "late_entropy": 7.5, "late_entropy_gap": -0.01,
                    "late_slope": -0.5, "spread": spread,
                    "share": {"step": [20, 300]} | {g: [head, 9.0] for g in study.GROUPS},
                    "mean_share": dict.fromkeys(study.GROUPS, head),
                },
            })  # fmt: skip
    return found


def test_the_text_says_whether_the_reports_recipe_follows_the_law():
    good, bad = study.analyse(made_rows(0.02)), study.analyse(made_rows(0.3))
    assert "shrink as (1 - summed rate / bound)^1.5" in good.conclusion
    assert "until then decay is 80% of the head's updates (decoupled 0.1%)" in good.conclusion
    assert "do not shrink as the law says: 0.300 of" in bad.conclusion
    assert "the report's: 41 predicted, 40" in good.result
