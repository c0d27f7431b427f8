"""The report page says what the rows say, and survives what runs leave behind."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from bitnet_jax import charts, collapse, report
from bitnet_jax.config import UserError

REFERENCES = {
    "positions": 1024,
    "tracked_positions": 1024,
    "targets": {"distinct": 310},
    "uniform": {"loss": 8.318, "entropy": 8.318, "distinct": 1},
    "unigram": {"loss": 5.89, "entropy": 5.95, "distinct": 1},
    "bigram": {"loss": 4.71, "entropy": 4.43, "distinct": 121},
}
HYPER = {"warmup_steps": 25.0, "lr_peak": 1.5e-3, "coupled_1": 0.0, "decoupled_1": 0.1}


def make_config(names=("report", "b158"), seeds=(0,), **changes):
    pi = 1 / np.arange(1, 4097) ** 1.1
    scales = np.linspace(0, 1.5, 31)
    q = pi[None] ** scales[:, None]
    q /= q.sum(1, keepdims=True)
    curve = {
        "scale": scales.tolist(),
        "loss": (-(np.log(q) * pi / pi.sum()).sum(1)).tolist(),
        "entropy": (-(np.log(q) * q).sum(1)).tolist(),
    }
    hyper = {"report": {**HYPER, "coupled_1": 0.1, "decoupled_1": 0.0}}
    return {
        "model": {"layout": "b158", "vocab_size": 4096, "d_model": 256, "tied_embedding": True},
        "data": {"corpus": "stdlib", "tokenizer": "bpe:4096", "seq_len": 64, "batch_size": 8},
        "optim": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0},
        "run": {"steps": 500, "recipes": list(names), "eval_every": 20, "init": None},
        "replicates": [
            {"name": name, "seed": seed, "data_seed": 0, "hyper": hyper.get(name, HYPER)}
            for name in names
            for seed in seeds
        ],
        "provenance": {
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
            "versions": {"jax": "0.10.2", "flax": "0.12.0"},
            "device": "cpu (2 cores)",
            "argv": ["-m", "experiments.quick", "--seeds", "0"],
        },
        "corpus": {
            "source": "stdlib",
            "sha256": "ab" * 32,
            "train": {"tokens": 3_052_118, "bytes": 10_912_004, "documents": 571},
            "validation": {"tokens": 160_201, "bytes": 581_002, "documents": 30},
        },
        "references": {**REFERENCES, "curve": curve},
        "n_params": 28_360_448,
        **changes,
    }


def judged(name, warnings=()):
    """The columns of a verdict; its evidence holds what HTML would take for a tag."""
    keys = ("verdict", "evidence", "next", "warnings")
    values = (name, f"why {name}: loss < 7", collapse.LABELS[name][-1], list(warnings))
    return {f"collapse/{key}": value for key, value in zip(keys, values, strict=True)}


def make_rows(config, *, every=20, until=None):
    """Plausible curves: `report` fades to the uniform distribution, the others learn."""
    rows, steps = [], config["run"]["steps"]
    for i, rep in enumerate(config["replicates"]):
        noise = np.random.default_rng(i)
        for step in range(0, (until or steps) + 1, every):
            t, wiggle = step / steps, noise.normal(0, 0.02)
            fades = rep["name"] == "report"
            learning = 8.4 - 3.0 * (1 - math.exp(-4 * t)) - 0.8 * t
            loss = learning if not fades else 8.4 - 2.2 * t * 2 * math.exp(1 - 5 * t)
            std = 0.58 * (1 - t) ** 2 + 0.05 if fades else 0.58 + 2.2 * (1 - math.exp(-3 * t))
            entropy = 8.318 - std**2 / 2 if fades else max(loss - 0.1, 8.318 - std**2 / 1.6)
            unique = (118 if t == 0 else 9 * math.exp(-4 * t) + 1.6) if fades else 118
            unique = unique if fades or t == 0 else 6 + 208 * t**1.3
            values = {
                "eval/loss": loss + wiggle,
                "eval/bits_per_byte": (loss + wiggle) * 0.405,
                "collapse/unique_tokens": round(unique),
                "collapse/unique_targets": 310,
                "collapse/concentration": 0.001 + 0.2 * t * (not fades),
                "collapse/mode_share": min(0.97, 0.2 + t) if fades else 0.1,
                "collapse/entropy": entropy,
                "collapse/logit_std": std,
                "collapse/mutual_information": 0.15 * (1 - t) ** 4 if fades else 0.15 + t,
                "collapse/unigram_kl": 3.9 - 1.2 * t if fades else 3.9 * math.exp(-6 * t),
                "collapse/overconfidence": loss + wiggle - entropy,
                **judged(("underscaled" if fades else "healthy") if t > 0.1 else "init"),
                "quant/zero_rate": 0.31 + 0.02 * t,
                "quant/flip_rate": 0.02 * math.exp(-2 * t),
            }
            rows.append({"step": step, "replicate": i, "kind": "eval", **values})
            if step:
                train = {
                    "train/loss": loss + 3 * wiggle,
                    "train/grad_norm": 0.4 * math.exp(-t) * (1 + 5 * abs(wiggle)),
                    "train/lr": 1.5e-3 * min(1, step / 25) * (1 - t),
                    "decay/update_weight_cosine_embedding": -0.97 if fades else 0.03 + wiggle,
                    "decay/update_share_embedding": 0.9 if fades else 0.1,
                    "decay/norm_ratio_embedding": 1 - 0.6 * t if fades else 1 + 0.2 * t,
                }
                rows.append({"step": step, "replicate": i, "kind": "train", **train})
    return rows


def make_workdir(folder, config, rows):
    continuations = {
        "report": [
            {"prompt": "def main(", "text": ", , , , , , , , , , , , , , , , , , , ,"},
            {"prompt": "import ", "text": ", , , , , , , , , , , , , , , , , , , , , ,"},
        ],
        "b158": [
            {
                "prompt": "def main(",
                "text": "self):\n        if x <b>& y:\n            return None",
            },
            {
                "prompt": "import ",
                "text": "sys\nimport os\nimport re\n\nclass Test(unittest.TestCase):",
            },
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finals = {row["replicate"]: row for row in rows if row["kind"] == "eval"}
    summary = {
        "step": 500,
        "finished": True,
        "wall_seconds": 187.0,
        "tokens_per_second": 2741.0,
        "replicates": [
            {
                "name": rep["name"],
                "seed": rep["seed"],
                "verdict": finals[i].get("collapse/verdict"),
                "continuations": continuations[rep["name"]],
            }
            for i, rep in enumerate(config["replicates"])
        ],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def ending(replicate=0, loss=7.61, unique=2, verdict="underscaled", step=500):
    values = {"eval/loss": loss, "collapse/unique_tokens": unique, "collapse/verdict": verdict}
    return {"step": step, "replicate": replicate, "kind": "eval", **values}


@pytest.fixture
def workdir(tmp_path):
    config = make_config()
    return make_workdir(tmp_path / "run", config, make_rows(config))


class Cells(HTMLParser):
    """Collects ids, and the tooltips and texts of the table cells that have a tooltip."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.cells, self._full = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self._full = attrs.get("title") if tag == "td" else None

    def handle_data(self, data):
        if self._full is not None:
            self.cells.append((self._full, data))
            self._full = None


def test_headline_tells_collapse_from_learning():
    finals = [ending(), ending(1, 4.31, 214, "healthy")]
    beside = (
        "distinct predictions where the text has 310, a bigram predictor 121 and a unigram one 1."
    )
    assert report.headline(make_config(), finals) == (
        "report collapsed: held-out loss 7.61 is 1.72 above the unigram reference (5.89), "
        f"2 {beside} b158 learned: held-out loss 4.31 is 0.40 below the bigram reference (4.71), "
        f"214 {beside}"
    )


def test_distinct_counts_decide_nothing():
    for name in collapse.LABELS:
        assert len({report.outcome(ending(0, 7.0, n, name)) for n in (1, 20, 310)}) == 1


@pytest.mark.parametrize(
    ("loss", "verdict", "told"),
    [
        (5.0, "healthy", "learned"),
        (7.0, "underscaled_decayed", "collapsed"),
        (7.0, "unigram_transit", "is still learning word frequencies"),
        (7.0, "slow", "has not passed word frequencies"),
        (float("nan"), "healthy", "diverged"),
        (None, None, "diverged"),
        (6.0, "nonfinite", "diverged"),
        (6.0, None, "cannot be judged"),
    ],
)
def test_outcome_needs_verdict_and_loss(loss, verdict, told):
    assert report.outcome(ending(0, loss, 9, verdict)) == told


def test_headline_of_an_unfinished_run_says_where_it_is():
    text = report.headline(make_config(["report"]), [ending(step=240)])
    assert text.startswith("At step 240 of 500: report collapsed")
    assert report.headline(make_config(), []) == "No evaluation yet."


def test_headline_of_several_seeds_gives_mean_range_and_n():
    config = make_config(["b158"], seeds=range(3))
    finals = [ending(i, 4.9 + i / 10, 100 + i, "healthy") for i in range(3)]
    text = report.headline(config, finals)
    assert text.startswith("b158 learned (n = 3 seeds): mean held-out loss 5.00 (4.90 to 5.10) is")
    assert "0.89 below the unigram reference (5.89) and 0.29 above the bigram" in text
    assert "101.0 (100 to 102) distinct predictions" in text
    finals[2] = ending(2)
    assert "b158 (n = 3 seeds): 2 learned, 1 collapsed:" in report.headline(config, finals)


def test_table_holds_the_last_rows_and_the_references(workdir):
    page = report.write_report(workdir).read_text()
    last = {r["replicate"]: r for r in make_rows(make_config()) if r["kind"] == "eval"}
    cells = Cells(page).cells
    for row in last.values():
        for key, _, spec in report.COLUMNS:
            assert (repr(row[key]), f"{row[key]:{spec}}") in cells
    for name in ("uniform", "unigram", "bigram"):
        assert (repr(REFERENCES[name]["loss"]), f"{REFERENCES[name]['loss']:.2f}") in cells
    assert ("310", "310") in cells


def test_page_is_deterministic_and_self_contained(workdir):
    page = report.write_report(workdir).read_bytes()
    assert report.write_report(workdir).read_bytes() == page
    text = page.decode()
    assert len(re.findall("<svg ", text)) == len(report.CHARTS)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "<script" not in text
    assert [p.name for p in workdir.iterdir() if p.suffix == ".tmp"] == []


def test_ids_are_unique_and_references_resolve(workdir):
    text = report.write_report(workdir).read_text()
    ids = Cells(text).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_continuations_are_escaped(workdir):
    text = report.write_report(workdir).read_text()
    assert "if x &lt;b&gt;&amp; y:" in text
    assert "<b>&" not in text


def test_verdicts_stand_under_the_headline_the_worst_first(tmp_path):
    config = make_config(["b158", "report"])
    rows = make_rows(config)
    rows[-1 if rows[-1]["kind"] == "eval" else -2].update(judged("dead", ["norm <= 0.5", "drifts"]))
    text = report.write_report(make_workdir(tmp_path / "run", config, rows)).read_text()
    first, second = re.findall(r'<p class="card judged">.*?</p>', text, re.DOTALL)
    assert text.index("</h1>") < text.index(first) < text.index("<figure>")
    assert "report" in first and "why dead: loss &lt; 7" in first
    assert collapse.LABELS["dead"][-1] in first
    assert re.findall(r'"warning">(.*?)<', first) == ["norm &lt;= 0.5", "drifts"]
    assert "b158" in second and "why healthy" in second and "warning" not in second
    assert ("alarm" in first, "alarm" in second) == (True, False)


def test_torn_last_line_is_dropped_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "na\xc3')
    assert [row["step"] for row in report.read_rows(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        report.read_rows(path)
    assert report.read_rows(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("rows", ["none", "bare", "gaps"])
def test_page_survives_missing_keys_and_gaps(tmp_path, rows):
    config = make_config()
    made = make_rows(config)
    if rows == "bare":
        for key in ("references", "corpus", "provenance", "n_params"):
            del config[key]
        keep = {"step", "replicate", "kind", "eval/loss"}
        made = [{k: row[k] for k in keep if k in row} for row in made]
    if rows == "gaps":
        made[8].update({"eval/loss": None, "collapse/entropy": math.nan})
        made[-2].update({"eval/loss": math.inf, "collapse/unique_tokens": None})
    workdir = make_workdir(tmp_path / "run", config, made)
    if rows == "none":  # a run that has just started
        (workdir / "metrics.jsonl").unlink()
        (workdir / "summary.json").unlink()
    text = report.write_report(workdir).read_text()
    assert text.count("<svg ") == {"none": 0, "bare": 1, "gaps": len(report.CHARTS)}[rows]
    assert ("No evaluation yet." in text) == (rows == "none")


def test_a_folder_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        report.write_report(tmp_path)


def test_long_series_keep_their_ends():
    series = charts.Series("a", list(range(4001)), [0.0] * 4000 + [9.0])
    x, y = charts._points(series)
    assert (len(x), x[0], x[-1], y[-1]) == (charts.MAX_POINTS, 0, 4000, 9.0)


def test_charts_keep_text_and_label_stage_and_references(tmp_path):
    series = [charts.Series("a & b", [0, 10], [1.0, 2.0]), charts.Series("c", [], [])]
    panel = charts.Panel(series, "Loss", "nats", 5, (("unigram", 1.5),))
    for text in (
        charts.line_chart(
            series, title="Loss", ylabel="nats", boundary=5, references=[("unigram", 1.5)]
        ),
        charts.save_figure(tmp_path / "figure.svg", [panel, panel]).read_text(),
    ):
        for word in (">a &amp; b<", ">c<", ">Loss<", ">nats<", ">stage 2<", ">unigram<"):
            assert word in text
