"""The page of a run says what the rows say, and survives what runs leave behind."""

import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from bitnet_jax import charts, log, metrics, page
from bitnet_jax.fields import UserError
from bitnet_jax.verdict import LABELS

REFERENCES = {
    "positions": 1024,
    "tracked_positions": 1024,
    "targets": {"distinct": 310},
    "uniform": {"loss": 8.318, "entropy": 8.318, "distinct": 1},
    "unigram": {"loss": 5.89, "entropy": 5.95, "distinct": 1},
    "bigram": {"loss": 4.71, "entropy": 4.43, "distinct": 121},
}
HYPER = {"warmup_steps": 25.0, "lr_peak": 1.5e-3, "coupled_1": 0.0, "decoupled_1": 0.1,
         "decay_rest": 0.0, "extra": {"z_loss": 0.0}}  # fmt: skip


def make_config(names=("coupled", "published"), seeds=(0,), **changes):
    pi = 1 / np.arange(1, 4097) ** 1.1
    scales = np.linspace(0, 1.5, 31)
    q = pi[None] ** scales[:, None]
    q /= q.sum(1, keepdims=True)
    curve = {
        "scale": scales.tolist(),
        "loss": (-(np.log(q) * pi / pi.sum()).sum(1)).tolist(),
        "entropy": (-(np.log(q) * q).sum(1)).tolist(),
    }
    hyper = {"coupled": {**HYPER, "coupled_1": 0.1, "decoupled_1": 0.0}}
    return {
        "model": {"layout": "b158", "vocab_size": 4096, "d_model": 256, "tied_embedding": True},
        "data": {"corpus": "stdlib", "tokenizer": "bpe:4096", "seq_len": 64, "batch_size": 8},
        "optim": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0},
        "run": {"steps": 500, "recipes": list(names), "eval_every": 20, "init": None},
        "replicates": [
            {"name": name, "seed": seed, "hyper": hyper.get(name, HYPER)}
            for name in names
            for seed in seeds
        ],
        "provenance": {
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
            "versions": {"jax": "0.10.2", "flax": "0.12.0"},
            "device": "cpu (2 cores)",
            "argv": ["-m", "bitnet_jax", "train", "--seeds", "0"],
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
    values = (name, f"why {name}: loss < 7", LABELS[name].next, list(warnings))
    return {f"collapse/{key}": value for key, value in zip(keys, values, strict=True)}


def make_rows(config, *, every=20, until=None):
    """Plausible curves: `coupled` fades to the uniform distribution, the others learn."""
    rows, steps = [], config["run"]["steps"]
    for i, rep in enumerate(config["replicates"]):
        noise = np.random.default_rng(i)
        for step in range(0, (until or steps) + 1, every):
            t, wiggle = step / steps, noise.normal(0, 0.02)
            fades = rep["name"] == "coupled"
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


def large_block(step, replicate=0):
    """A row of the large block, as at the stage boundary and at the end."""
    values = {"loss": 5.0, "loss_se": 0.021, "minus_unigram": -0.9, "minus_unigram_se": 0.01,
              "minus_bigram": 0.3, "minus_bigram_se": 0.02, "positions": 16384}  # fmt: skip
    values = {f"held_out/{key}": value for key, value in values.items()}
    return {"step": step, "replicate": replicate, "kind": "eval", **values}


def make_workdir(folder, config, rows, **changes):
    folder.mkdir(exist_ok=True)
    log.write_sealed(folder / "config.json", config)
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
                "decode": {"decode/greedy_rep_4": 0.9, "decode/text_rep_4": 0.02},
                "continuations": [
                    {"prompt": "def main(", "text": "\n" * 30, "sampled": "if x <b>& y:\n  pass"},
                    {"prompt": "import ", "text": "os\nimport re\n\nclass Test:"},
                ],
            }
            for i, rep in enumerate(config["replicates"])
        ],
        **changes,
    }
    log.write_sealed(folder / "summary.json", summary)
    return folder


def ending(replicate=0, loss=7.61, verdict="underscaled", step=500):
    values = {"eval/loss": loss, **judged(verdict)} if verdict else {"eval/loss": loss}
    return {"step": step, "replicate": replicate, "kind": "eval", **values}


def outcomes(config, finals, **summary):
    rows = log.Rows(finals, {row["replicate"]: row for row in finals}, {}, {})
    return page.outcomes("runs/a", config, rows, summary)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of two replicates, with its page."""
    config = make_config()
    workdir = make_workdir(tmp_path_factory.mktemp("runs") / "run", config, make_rows(config))
    page.write_page(workdir)
    return workdir


@pytest.fixture(scope="module")
def text(workdir):
    return (workdir / "report.html").read_text()


class Cells(HTMLParser):
    """Collects ids, and the tooltips and texts of the table cells that have a tooltip."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.cells, self._full = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self._full = attrs.get("title") if tag == "td" else self._full

    def handle_data(self, data):
        if self._full is not None:
            self.cells.append((self._full, data))

    def handle_endtag(self, tag):
        self._full = None if tag == "td" else self._full


# ----------------------------------------------------------------------------------- the verdicts


@pytest.mark.parametrize(
    ("loss", "verdict", "shown", "state"),
    [
        (5.0, "healthy", "healthy", "good"),
        (7.0, "underscaled_decayed", "underscaled_decayed", "alarm"),
        (7.0, "slow", "slow", "open"),
        (5.0, "insufficient_data", "insufficient_data", "caution"),
        (float("nan"), "healthy", "nonfinite", "alarm"),
        (None, "healthy", "nonfinite", "alarm"),
        (6.0, None, None, "caution"),
    ],
)
def test_a_verdict_has_one_state_and_no_finite_loss_is_never_good(loss, verdict, shown, state):
    (group,) = outcomes(make_config(["coupled"]), [ending(0, loss, verdict)])
    assert (group["verdict"], group["state"]) == (shown, state)


def test_seeds_of_one_recipe_and_verdict_share_a_card():
    config = make_config(["coupled"], seeds=(0, 1, 2))
    finals = [ending(0), ending(1, 4.3, "healthy"), ending(2)]
    seeds = [[rep["seed"] for rep in group["replicates"]] for group in outcomes(config, finals)]
    assert seeds == [[0, 2], [1]]


def test_the_next_command_reads_the_replicate_at_the_last_step():
    config, finals = make_config(), [ending(), ending(1, 4.3, "healthy")]
    commands = [group["command"] for group in outcomes(config, finals, step=500)]
    assert commands == ["triage runs/a@500:0", 'generate runs/a@500:1 --prompt "..."']
    assert [group["command"] for group in outcomes(config, finals)] == [None, None]


def test_a_failed_replicate_says_where_and_what(tmp_path):
    config = make_config()
    rows = make_rows(config)
    workdir = make_workdir(tmp_path / "run", config, rows)
    summary = log.read_sealed(workdir / "summary.json")
    summary["replicates"][1]["failed"] = {"step": 123, "what": "the gradient of <head>"}
    log.write_sealed(workdir / "summary.json", summary)
    text = page.write_page(workdir).read_text()
    (card,) = re.findall(r'<section class="card outcome.*?published.*?</section>', text, re.DOTALL)
    card = card[card.rindex("<section") :]
    assert "alarm" in card and "nonfinite" in card
    assert "123" in card and "the gradient of &lt;head&gt;" in card


def test_an_unfinished_run_says_where_it_is_and_how_to_go_on(tmp_path):
    config = make_config()
    workdir = make_workdir(tmp_path / "run", config, make_rows(config, until=240), finished=False)
    (workdir / "summary.json").unlink()
    text = page.write_page(workdir).read_text()
    assert "step 240 of 500" in text and f"train --workdir {workdir} --resume" in text


def test_a_run_whose_replicates_all_failed_is_not_gone_on_with(tmp_path):
    config = make_config()
    workdir = make_workdir(tmp_path / "run", config, make_rows(config, until=240))
    path = workdir / "summary.json"
    log.write_sealed(path, log.read_sealed(path) | {"step": 240, "finished": True})
    assert "--resume" not in page.write_page(workdir).read_text()


def test_evidence_and_warnings_stand_above_the_charts_with_their_replicate(tmp_path):
    config = make_config(["published", "coupled"])
    rows = make_rows(config)
    rows[-2].update(judged("dead", ["norm <= 0.5", "drifts"]))
    text = page.write_page(make_workdir(tmp_path / "run", config, rows)).read_text()
    fine, dead = re.findall(r'<section class="card outcome.*?</section>', text, re.DOTALL)
    assert text.index(dead) < text.index("<figure>")
    assert "coupled" in dead and "why dead: loss &lt; 7" in dead
    assert escape(LABELS["dead"].next) in dead
    assert re.findall(r'"warning">(.*?)<', dead) == ["norm &lt;= 0.5", "drifts"]
    assert "why healthy" in fine and '"warning"' not in fine
    assert ("alarm" in dead, "alarm" in fine) == (True, False)


# ------------------------------------------------------------------------------------- the tables


def test_table_holds_the_last_rows_and_the_references(text):
    cells = Cells(text).cells
    last = {r["replicate"]: r for r in make_rows(make_config()) if r["kind"] == "eval"}
    for row in last.values():
        for key in row.keys() & metrics.METRICS.keys() - {metrics.DISTINCT_TARGETS}:
            assert (repr(row[key]), f"{row[key]:{metrics.METRICS[key].format}}") in cells
    for name in ("uniform", "unigram", "bigram"):
        assert (repr(REFERENCES[name]["loss"]), f"{REFERENCES[name]['loss']:.3f}") in cells
    assert ("310", "310") in cells  # the text itself
    assert ("0.9", "0.90") in cells  # decoding


def test_the_large_block_shows_standard_errors(tmp_path):
    config = make_config(["coupled"])
    rows = make_rows(config)
    rows.insert(20, large_block(250))
    text = page.write_page(make_workdir(tmp_path / "run", config, rows)).read_text()
    cells = Cells(text).cells
    for full, number, error in (
        ("5.0 \u00b1 0.021", "5.0000", "\u00b1 0.021"),
        ("-0.9 \u00b1 0.01", "-0.900", "\u00b1 0.010"),
    ):
        assert (full, number) in cells and (full, error) in cells
    assert "16,384 positions, step 250" in text


def test_hyper_parameters_that_differ_come_first_and_zeros_last():
    table = page.hyper_table(make_config(seeds=(0, 1))["replicates"])
    assert table["heads"] == [("coupled", "0, 1"), ("published", "0, 1")]
    assert table["differ"] == [("coupled_1", [0.1, 0.0]), ("decoupled_1", [0.0, 0.1])]
    assert [name for name, _ in table["same"]] == ["warmup_steps", "lr_peak"]
    assert [name for name, _ in table["zero"]] == ["decay_rest", "extra.z_loss"]


def test_long_runs_of_line_breaks_are_counted_instead_of_shown():
    assert page.cap_line_breaks("a\n\nb\n") == "a\n\nb"
    assert page.cap_line_breaks("a" + "\n  " * 32 + "b") == "a\n[32 line breaks]\n  b"


def test_a_prompt_is_shown_once_with_what_each_replicate_made_of_it(text):
    assert text.count("def main(") == 1
    assert text.count("[30 line breaks]") == 2


def test_charts_over_steps_mark_the_boundary(monkeypatch):
    config = make_config() | {"run": {"steps": 7}}
    marks = []
    monkeypatch.setattr(page, "line_chart", lambda *_, boundary, **__: marks.append(boundary))
    rows = [ending(step=7)]
    page.draw_charts(config, log.Rows(rows, {0: rows[0]}, {}, {}))
    assert marks == [3]


# -------------------------------------------------------------------------------------- the files


def test_page_is_deterministic_and_self_contained(workdir, text):
    assert page.write_page(workdir).read_text() == text
    assert len(re.findall("<svg ", text)) == len(page.CHARTS)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "<script" not in text
    assert [p.name for p in workdir.iterdir() if p.suffix == ".tmp"] == []


def test_ids_are_unique_and_references_resolve(text):
    ids = Cells(text).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_continuations_are_escaped(text):
    assert "if x &lt;b&gt;&amp; y:" in text
    assert "<b>&" not in text


def test_torn_last_line_is_dropped_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "na\xc3')
    assert [row["step"] for row in log.read_thinned(path, charts.MAX_POINTS).drawn] == [1, 2]
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        log.read_thinned(path, charts.MAX_POINTS)
    assert log.read_thinned(tmp_path / "absent.jsonl", 9).drawn == []


def test_of_a_long_run_the_first_the_last_and_the_large_block_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "replicate": r, "kind": k, "x/y": s}
            for s in range(3333) for k in ("train", "eval") for r in (0, 1)]  # fmt: skip
    rows.insert(777, large_block(190))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = log.read_thinned(path, charts.MAX_POINTS)
    evals = [row["step"] for row in read.drawn if row["kind"] == "eval" and row["replicate"]]
    assert (evals[0], evals[-1]) == (0, 3332)
    assert charts.MAX_POINTS / 2 <= len(evals) <= charts.MAX_POINTS + 1
    assert len(set(np.diff(evals[:-1]))) == 1
    assert {i: row["step"] for i, row in read.last.items()} == {0: 3332, 1: 3332}
    assert {i: row["step"] for i, row in read.large.items()} == {0: 190}


@pytest.mark.parametrize("rows", ["none", "bare", "gaps"])
def test_page_survives_missing_keys_and_gaps(tmp_path, rows):
    config = make_config()
    log_rows = make_rows(config)
    if rows == "bare":
        for key in ("references", "corpus", "provenance", "n_params"):
            del config[key]
        keep = {"step", "replicate", "kind", "eval/loss"}
        log_rows = [{k: row[k] for k in keep if k in row} for row in log_rows]
    if rows == "gaps":
        log_rows[8].update({"eval/loss": None, "collapse/entropy": math.nan})
        log_rows[-2].update({"eval/loss": math.inf, "collapse/unique_tokens": None})
    workdir = make_workdir(tmp_path / "run", config, log_rows)
    if rows == "none":  # a run that has just started
        (workdir / "metrics.jsonl").unlink()
        (workdir / "summary.json").unlink()
    text = page.write_page(workdir).read_text()
    assert text.count("<svg ") == {"none": 0, "bare": 1, "gaps": len(page.CHARTS)}[rows]
    assert ("No evaluation yet." in text) == (rows == "none")


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_file_that_was_edited_is_not_shown(tmp_path, name):
    config = make_config()
    workdir = make_workdir(tmp_path / "run", config, make_rows(config))
    path = workdir / name
    path.write_text(path.read_text().replace('"step', '"stop', 1).replace("4096", "4097", 1))
    with pytest.raises(UserError, match=re.escape(str(path))):
        page.write_page(workdir)


def test_a_folder_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        page.write_page(tmp_path)


# ------------------------------------------------------------------------------------- in a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PROBE = """
<!DOCTYPE html><title>probe</title><pre id="found"></pre><script>
const found = [], frame = document.createElement("iframe");
frame.style.cssText = "border: 0; height: 900px; width: WIDTHpx";
frame.onload = () => {
  const page = frame.contentDocument, root = page.scrollingElement;
  page.querySelectorAll("details").forEach(d => { d.open = true; });
  const style = (e, part) => frame.contentWindow.getComputedStyle(e, part);
  if (frame.contentWindow.innerWidth !== WIDTH) found.push("innerWidth");
  if (root.scrollWidth > WIDTH) found.push("sideways " + root.scrollWidth);
  const cells = [...page.querySelectorAll("th, td, dt, dd")].filter(e => e.innerText.trim());
  for (const e of cells) {
    if (e.closest("thead") && style(e.closest("thead")).display === "none") continue;
    const box = e.getBoundingClientRect(), around = e.closest(".card") ?? page.body;
    const a = around.getBoundingClientRect(), left = a.left + around.clientLeft;
    const reach = /auto|scroll/.test(style(around).overflowX) ? around.scrollWidth : a.width;
    const fits = box.width > 0 && box.left >= left && box.right <= left + reach + 1;
    if (!fits || e.scrollWidth > e.clientWidth + 1) found.push("cell " + e.innerText);
    if (a.right > WIDTH || a.left < 0) found.push("card of " + e.innerText);
  }
  for (const e of page.querySelectorAll("td[data-label]")) {
    const headless = style(e.closest("table").tHead).display === "none";
    const named = style(e, "::before").content.includes(e.dataset.label);
    if (e.innerText.trim() && headless && !named) found.push("unnamed " + e.innerText);
  }
  found.push(cells.length + " cells");
  document.getElementById("found").textContent = JSON.stringify(found);
};
frame.srcdoc = PAGE;
document.body.append(frame);
</script>
"""


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """The page of eight replicates, one recipe with a long name, with a large block."""
    config = make_config(("coupled", "a recipe with a long name"), seeds=range(4))
    rows = make_rows(config) + [large_block(500, i) for i in range(8)]
    return page.write_page(make_workdir(tmp_path_factory.mktemp("crowded"), config, rows))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_cut_off_and_nothing_complains(tmp_path, crowded, width):
    """A frame of this width holds the page: no window of a headless browser is as narrow."""
    probe = tmp_path / "probe.html"
    quoted = json.dumps(crowded.read_text()).replace("</", "<\\/")
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", quoted))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
         "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (probe_json,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    *faults, cells = json.loads(probe_json)
    assert faults == []
    assert int(cells.split()[0]) > 100
    assert "CONSOLE" not in done.stderr
