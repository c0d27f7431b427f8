"""The frame of the questions: statistics, studies, claims, what is told."""

import dataclasses
import types

import numpy as np
import pytest
from lab_rows import REFERENCES, make_rows

from bitnet_jax import charts, presets
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import LOSS
from experiments.lab import (
    arms,
    build,
    claims,
    exhibits,
    experiment,
    headline,
    pages,
    rows,
    stats,
    studies,
)
from experiments.lab.arms import Arm, Request
from experiments.lab.claims import FAILS, HOLDS, UNDECIDED, Claim
from experiments.lab.stats import NotEnough
from experiments.lab.studies import QUICK, Study


def request(**more) -> Request:
    cfg = presets.preset("tiny")
    return Request("toy", "tiny", cfg, {}, [0, 1], workdir="unused", at_once=9, **more)


# ---------------------------------------------------------------------------------- statistics


def test_a_t_interval_is_that_of_a_table():
    interval = stats.interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)  # t of 2 degrees of freedom, standard deviation 1
    assert (interval.mean, interval.n) == (2.0, 3)
    np.testing.assert_allclose((interval.low, interval.high), (2 - half, 2 + half))
    assert stats.interval([5.0]).high == np.inf and stats.interval([None]).n == 0


def test_differences_are_paired_within_seeds_that_both_have():
    df = rows.frame(make_rows({"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0, 2.0, 99.0]}))
    difference = stats.difference(df, "a", "b")
    assert (difference.mean, difference.low, difference.high, difference.n) == (1.0, 1.0, 1.0, 3)


def test_a_claim_about_too_few_seeds_is_not_decided():
    df = rows.frame(make_rows({"a": [1.0, 2.0]}))
    with pytest.raises(NotEnough):
        _ = stats.mean(df, "a", LOSS).below
    with pytest.raises(NotEnough):
        stats.of(df, "b")
    with pytest.raises(NotEnough):
        stats.ended(df, "a")


def test_learned_needs_a_margin_and_the_context():
    df = rows.frame(make_rows({"far": [3.83] * 3, "near": [3.85] * 3}))
    assert stats.ended(df, "far").all() and not stats.ended(df, "near").any()
    blind = rows.frame(make_rows({"far": [3.0] * 3}, context=0.05))
    assert not stats.ended(blind, "far").any()


def test_shares_of_unequal_evaluations_are_not_averaged():
    mixed = make_rows({"a": [1.0]}) + make_rows({"a": [1.0]}, run__eval_every=10)
    with pytest.raises(ValueError, match="every"):
        stats.severe_share(rows.frame(mixed), "a")
    assert stats.severe_share(rows.frame(mixed[:1]), "a").mean == 0.25


def test_holm_steps_down():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


# ------------------------------------------------------------------------------- rows and studies


def test_a_study_is_split_by_width_and_text_and_not_by_bookkeeping_length_or_seed():
    plain = make_rows({"a": [1.0, 2.0]})
    same = make_rows({"a": [1.0]}, run__eval_every=10, data__gather="host", steps=40)
    wide = make_rows({"a": [1.0]}, model__d_model=64)
    other = [row | {"references": REFERENCES | {"text_sha256": "cd" * 32}} for row in plain]
    assert len(rows.by_study(plain + same)) == 1
    assert len(rows.by_study(plain + wide + other)) == 3


def test_what_an_arm_changes_belongs_to_the_arm():
    plain, wide = make_rows({"a": [1.0]}), make_rows({"wide": [1.0]}, model__d_model=64)
    wide = [row | {"base": {"model.d_model": 32}} for row in wide]
    assert len(rows.by_study(plain + wide)) == 1


def test_folders_do_not_split_a_study():
    identities = [
        rows.study(make_rows({"a": [1.0]}, data__validation=f"text:{place}b.txt")[0])
        for place in ("", "/somewhere/")
    ]
    assert identities[0] == identities[1]


def test_a_remade_row_replaces_the_one_of_its_study_arm_seed_and_length(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    rows.append("toy", make_rows({"a": [1.0, 2.0]}) + make_rows({"a": [5.0]}, steps=40))
    rows.append("toy", make_rows({"a": [3.0]}))
    stored = [(row["seed"], row["config"]["run"]["steps"], row["final"][LOSS])
              for row in rows.read("toy")]  # fmt: skip
    assert stored == [(0, 20, 3.0), (1, 20, 2.0), (0, 40, 5.0)]


def test_numbers_of_extra_become_columns():
    df = rows.frame(make_rows({"a": [1.0]}, extra={"count": {"all": 3, "of": {"x": 4}}}))
    assert (df["count/all"].item(), df["count/of/x"].item(), df["unigram"].item()) == (3, 4, 4.0)


# --------------------------------------------------------------------------------------------- arms


def test_values_of_an_arm_may_depend_on_its_length():
    arm = Arm("late", "decoupled", quant_warmup_steps=lambda cfg: cfg.run.steps // 5,
              fields={"model.d_ff": lambda cfg: 2 * cfg.model.d_ff})  # fmt: skip
    cfg, replicates, base = arms.replicates(request(), arm, 10)
    assert (cfg.run.steps, cfg.model.d_ff, base) == (200, 128, {"model.d_ff": 64})
    assert [(rep.name, rep.seed) for rep in replicates] == [("late", 0), ("late", 1)]
    assert replicates[0].hyper.quant_warmup_steps == 40 and replicates[0].hyper.decoupled_1 == 0.1


def test_arms_of_one_shape_share_a_program_whose_configuration_lists_their_recipes():
    wanted = [Arm("a"), Arm("b", "decoupled"), Arm("wide", fields={"model.d_ff": 128}),
              Arm("c", extra={"weight": 2.0})]  # fmt: skip
    narrow, wide = arms.groups(request(), wanted)
    assert [rep.name for rep in narrow.replicates] == ["a", "a", "b", "b", "c", "c"]
    assert narrow.cfg.run.recipes == ("coupled", "decoupled")
    assert [rep.hyper.extra for rep in narrow.replicates[::2]] == [{"weight": 0.0}] * 2 + [
        {"weight": 2.0}
    ]
    assert wide.cfg.run.recipes == ("coupled",)


def test_what_an_arm_sets_cannot_be_set_by_the_user():
    wanted = [Arm("a"), Arm("matrices", decay_rest=0.0), Arm("wide", fields={"model.d_ff": 128})]
    for path, name in (("hyper.decay_rest", "matrices"), ("model.d_ff", "wide")):
        with pytest.raises(UserError, match=f"{path}.*{name}"):
            arms.groups(request(assigned=(path,)), wanted)
    assert len(arms.groups(request(assigned=("hyper.decay_rest",), only=("a",)), wanted[:1])) == 1


def test_only_and_recipes_choose_arms():
    wanted = [Arm("ac"), Arm("abc", "decoupled"), Arm("c")]
    assert [arm.name for arm in arms.chosen(request(only=("a",)), wanted)] == ["ac", "abc"]
    assert [arm.name for arm in arms.chosen(request(only=("c",)), wanted)] == ["c"]
    assert [arm.name for arm in arms.chosen(request(only=("c", "b")), wanted)] == ["abc", "c"]
    assert [arm.name for arm in arms.chosen(request(recipes=("decoupled",)), wanted)] == ["abc"]
    with pytest.raises(UserError, match="among ac; abc; c"):
        arms.chosen(request(only=("z",)), wanted)


def test_an_unknown_number_of_an_arm_is_named():
    with pytest.raises(UserError, match="decay_rest"):
        Arm("a", decay_rset=0.0)


def test_the_command_line_of_a_question():
    argv = ["--preset", "tiny", "--seeds", "1-2", "--lengths", "1,10", "--only", "a,b",
            "--set", "run.recipes=decoupled", "--set", "hyper.lr_peak=1e-3"]  # fmt: skip
    parsed = experiment.parse("doc", "toy", argv, lengths="1,10,20")
    assert (parsed.seeds, parsed.lengths, parsed.only) == ([1, 2], (1, 10), ("a", "b"))
    assert (parsed.recipes, parsed.hyper) == (("decoupled",), {"lr_peak": 1e-3})
    with pytest.raises(UserError, match="use some of 1,10,20"):
        experiment.parse("doc", "toy", ["--preset", "tiny", "--lengths", "2"], lengths="1,10,20")


# ------------------------------------------------------------------------------------------- claims

TINY = Study("tiny", "tiny", ("model.vocab_size=300",), "ab" * 4)
LOWER = Claim("lower", "b is lower", lambda df: stats.difference(df, "b", "a").below, TINY)


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", (TINY,))


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ({"a": [2.0, 2.1, 2.2], "b": [1.0, 1.1, 1.2]}, HOLDS),
        ({"a": [2.0, 2.1, 2.2], "b": [3.0, 3.1, 3.2]}, FAILS),
        ({"a": [2.0, 2.1], "b": [1.0, 1.1]}, UNDECIDED),
        ({"a": [2.0, 2.1, 2.2]}, UNDECIDED),
    ],
)
def test_a_claim_holds_or_not_or_lacks_rows(named, losses, status):
    (part,) = pages.analyse((LOWER,), lambda df, shown: shown.table(df), make_rows(losses))
    assert (part.study, part.findings[0].status) == (TINY, status)


def test_a_length_of_few_seeds_decides_nothing_beside_one_of_enough(named):
    run_rows = make_rows({"a": [2.0, 2.1, 2.2], "b": [1.0, 1.1, 1.2]})
    longer = make_rows({"a": [3.0], "b": [9.0], "only longer": [9.0]}, steps=40)
    claim = Claim("all", "b is lower in every row", lambda df: set(df["steps"]) == {20}, TINY)
    (part,) = pages.analyse((claim,), lambda df, shown: shown.table(df), run_rows + longer)
    assert (part.findings[0].status, part.findings[0].seeds) == (HOLDS, 3)
    assert "b, 40 steps" in [row[0] for row in part.exhibits.tables[0].rows]


def test_rows_of_another_width_leave_the_study_alone(named):
    good = make_rows({"a": [2.0, 2.1, 2.2], "b": [1.0, 1.1, 1.2]})
    bad = make_rows({"a": [2.0, 2.1, 2.2], "b": [3.0, 3.1, 3.2]}, model__d_model=64)
    parts = pages.analyse((LOWER,), lambda df, shown: None, good + bad)
    findings = build.complete((LOWER,), parts)
    assert [(f.is_stated, f.status) for f in findings] == [(True, HOLDS), (False, FAILS)]


def test_a_study_without_rows_is_not_decided(named):
    (finding,) = build.complete((LOWER,), [])
    assert finding.is_stated and finding.status == UNDECIDED


@pytest.mark.parametrize(("loss_of_b", "status"), [(1.0, 0), (3.0, 1)])
def test_the_build_fails_when_the_index_tells_what_does_not_hold(
    named, tmp_path, monkeypatch, capsys, loss_of_b, status
):
    run_rows = make_rows({"a": [2.0, 2.1, 2.2], "b": [loss_of_b + 0.1 * i for i in range(3)]})
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    rows.append("toy", run_rows)
    module = types.SimpleNamespace(
        __doc__="Is b lower?",
        CLAIMS=(LOWER,),
        show=lambda df, shown: shown.table(df),
    )
    monkeypatch.setattr(experiment, "load", lambda name: module)
    for name, text in (
        ("INDEX", "<!-- index: -->\n<!-- end -->\n"),
        ("README", "<!-- table: 20 -->\n<!-- end -->\n<!-- claims: toy/lower -->\n<!-- end -->\n"),
    ):
        path = tmp_path / f"{name}.md"
        path.write_text(text)
        monkeypatch.setattr(build, name, path)
    monkeypatch.setattr(build, "PAGES", tmp_path)
    panel = charts.Panel([charts.Series("a", [0, 1], [0, 1])], "a", "b")
    monkeypatch.setattr(headline, "PICTURES", {20: tmp_path / "answer.svg"})
    monkeypatch.setattr(headline, "read", lambda: None)
    monkeypatch.setattr(headline, "picture", lambda df, steps: [panel])
    monkeypatch.setattr(headline, "table", lambda df, steps: (["arm"], [[str(steps)]]))
    monkeypatch.setattr(build, "QUESTIONS", ("toy",))
    assert build.main() == status
    texts = [(tmp_path / f"{name}.md").read_text() for name in ("INDEX", "README")]
    assert all("is lower" in text and (FAILS in text) == bool(status) for text in texts)
    assert "| 20 |" in texts[1]
    before = list(texts)
    build.main()
    assert [(tmp_path / f"{name}.md").read_text() for name in ("INDEX", "README")] == before


def test_a_claim_is_short():
    with pytest.raises(ValueError, match="120"):
        Claim("long", 121 * "x", lambda df: True, TINY)


def test_marked_parts_are_rebuilt_and_an_unknown_claim_is_refused():
    finding = claims.Finding(LOWER, TINY, HOLDS, 3)
    text = "head\n<!-- claims: toy/lower -->\nold\n<!-- end -->\ntail\n"
    once = build.rebuild(text, {"toy": [finding]}, None)
    assert "B is lower" in once and "old" not in once and once.startswith("head\n")
    assert build.rebuild(once, {"toy": [finding]}, None) == once
    with pytest.raises(UserError, match="lower"):
        build.rebuild(text.replace("toy/lower", "toy/lowre"), {"toy": [finding]}, None)


# ----------------------------------------------------------------------------------------- exhibits


def test_a_table_has_a_line_per_arm_and_length_and_the_predictors():
    run_rows = make_rows({"a": [2.0, 2.2], "b": [1.0, 1.2]}) + make_rows(
        {"a": [1.0, 1.0]}, steps=40
    )
    shown = exhibits.Exhibits(rows.frame(run_rows))
    shown.table(rows.frame(run_rows), [LOSS], control="a")
    shown.dots(rows.frame(run_rows))
    shown.curves(rows.frame(run_rows))
    (table,) = shown.tables
    names = [row[0] for row in table.rows]
    assert names == ["a, 20 steps", "b, 20 steps", "a, 40 steps", "bigram predictor",
                     "unigram predictor", "uniform predictor", "the text"]  # fmt: skip
    assert table.rows[1][2] == "-1.00 [-1.00, -1.00]" and table.rows[4][1] == "4.000"
    assert len({len(row) for row in [table.columns, *table.rows]}) == 1
    assert len(shown.figures) == 2


def test_a_page_names_the_claims_and_escapes_text(named, tmp_path):
    run_rows = make_rows({"a": [2.0, 2.1, 2.2], "b": [1.0, 1.1, 1.2]})
    parts = pages.tell("toy", "Is it <b>?\n\nAbout.", (LOWER,), lambda df, shown: shown.table(df),
                       run_rows, tmp_path / "page.html")  # fmt: skip
    html = (tmp_path / "page.html").read_text()
    assert "Is it &lt;b&gt;?" in html and LOWER.text in html and parts[0].study == TINY


def test_quick_is_the_study_of_the_quick_preset():
    cfg, _ = presets.override(presets.preset("quick"), list(studies.SMALL))
    config = dataclasses.asdict(cfg)
    config["model"] = config["model"] | {"vocab_size": 2048}
    assert rows.identity(config, {}, studies.STDLIB_TEXT) == QUICK.identity
