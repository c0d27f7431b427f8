"""Configuration: a mistake is one clear line, a run has one name, a recipe makes a schedule."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from bitnet_jax import config, config_file, presets
from bitnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from bitnet_jax.fields import UserError

SECTIONS = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "run": RunConfig}


def test_overrides_are_parsed_to_the_type_of_the_field():
    cfg, hyper = presets.override(
        Config(),
        [
            "model.d_model=64",
            "model.rope_theta=1e4",
            "model.tied_embedding=False",
            "model.layout=report",
            "model.vocab_size=300",
            "run.recipes=coupled, decoupled",
            "run.init=fork:runs/a@10",
            "hyper.lr_peak=2e-3",
        ],
    )
    model = ModelConfig(
        layout="report", vocab_size=300, d_model=64, tied_embedding=False, rope_theta=10_000.0
    )
    run = RunConfig(recipes=("coupled", "decoupled"), init="fork:runs/a@10")
    assert cfg == Config(model=model, run=run)
    assert isinstance(cfg.model.rope_theta, float)
    assert hyper == {"lr_peak": 2e-3}


@pytest.mark.parametrize("text", ["none", "None", "null", ""])
def test_optional_fields_can_be_cleared(text):
    cfg, _ = presets.override(presets.preset("report"), [f"model.vocab_size={text}"])
    assert cfg.model.vocab_size is None


def test_a_value_may_contain_an_equals_sign():
    cfg, _ = presets.override(Config(), ["data.corpus=text:a=b/*.txt"])
    assert cfg.data.corpus == "text:a=b/*.txt"


def test_fields_of_a_section_change_together():
    """Five heads fit width 80 but not the default 256: checked once, after all overrides."""
    both = ["model.n_heads=5", "model.n_kv_heads=5", "model.d_model=80"]
    cfg, _ = presets.override(Config(), both)
    assert (cfg.model.n_heads, cfg.model.d_model) == (5, 80)
    with pytest.raises(UserError):
        presets.override(Config(), both[:2])


@pytest.mark.parametrize(
    ("assignment", "mentions"),
    [
        ("modle.d_model=64", ["modle", "model, data, optim, run, hyper"]),
        ("model.width=64", ["width", "d_model", "n_layers", "layout"]),
        ("hyper.lr=1", ["lr;", "lr_peak", "act_quant"]),
        ("model.d_model=wide", ["model.d_model", "wide", "a whole number"]),
        ("model.d_model=1.5", ["model.d_model", "1.5", "a whole number"]),
        ("model.rope_scaling=yarn:2", ["model.rope_scaling", "yarn:2", "llama3:8,1,4,8192"]),
        ("model.rope_scaling=llama3:8,4,1,9", ["model.rope_scaling", "LOW < HIGH"]),
        ("model.rope_theta=big", ["model.rope_theta", "big", "a number"]),
        ("model.vocab_size=many", ["model.vocab_size", "many", "a whole number"]),
        ("hyper.lr_peak=hot", ["hyper.lr_peak", "hot", "a number"]),
        ("data.score_last=yes", ["data.score_last", "yes", "true or false"]),
        ("model.layout=gpt", ["model.layout", "gpt", "b158 or llama or report"]),
        ("model.dtype=float16", ["model.dtype", "float16", "float32 or bfloat16"]),
        ("data.order=random", ["data.order", "random", "shuffled or sequential"]),
        ("model.d_model", ["model.d_model", "section.field=value"]),
        ("d_model=64", ["d_model=64", "section.field=value"]),
        ("=", ["section.field=value"]),
    ],
)
def test_a_bad_override_names_what_was_given_and_what_is_accepted(assignment, mentions):
    with pytest.raises(UserError) as caught:
        presets.override(Config(), [assignment])
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in mentions if part not in message] == []


@pytest.mark.parametrize(
    ("section", "values", "mentions"),
    [
        ("model", {"n_heads": 3, "n_kv_heads": 3}, ["n_heads=3", "d_model=256"]),
        ("model", {"d_model": 12}, ["n_heads=4", "d_model=12", "even"]),
        ("model", {"n_kv_heads": 3}, ["n_kv_heads=3", "n_heads=4"]),
        ("model", {"n_layers": 0}, ["n_layers=0", "1 .. "]),
        ("model", {"d_ff": -1}, ["d_ff=-1", "1 .. "]),
        ("model", {"n_kv_heads": 0}, ["n_kv_heads=0", "1 .. "]),
        ("model", {"vocab_size": 1}, ["vocab_size=1", "2"]),
        ("data", {"batch_size": 0}, ["batch_size=0", "1 .. "]),
        ("data", {"seq_len": 1}, ["seq_len=1", "2"]),
        ("data", {"holdout": 0.0}, ["holdout=0.0", ".. 0.999"]),
        ("data", {"holdout": math.nan}, ["holdout=nan", ".. 0.999"]),
        ("data", {"corpus": "wiki"}, ["corpus=wiki", "stdlib", "text:GLOB", "tfds:NAME"]),
        ("data", {"corpus": "text"}, ["corpus=text", "text:GLOB"]),
        ("data", {"corpus": "stdlib:x"}, ["corpus=stdlib:x", "stdlib"]),
        ("data", {"tokenizer": "word"}, ["tokenizer=word", "bpe:N", "gpt2"]),
        ("data", {"tokenizer": "bpe:many"}, ["tokenizer=bpe:many", "bpe:N"]),
        ("data", {"tokenizer": "bpe:256"}, ["tokenizer=bpe:256", "257"]),
        ("optim", {"eps": 0.0}, ["eps=0.0", "1e-30 .. 1"]),
        ("optim", {"clip_norm": -1.0}, ["clip_norm=-1.0", "1e-30 .. 1e+30"]),
        ("optim", {"beta2": 1.0}, ["beta2=1.0", "0 .. "]),
        ("run", {"steps": 1}, ["steps=1", "2"]),
        ("run", {"eval_every": 0}, ["eval_every=0", "1 .. "]),
        ("optim", {"eps": math.inf}, ["eps=inf", "1e-30 .. 1"]),
        ("model", {"norm_eps": math.inf}, ["norm_eps=inf", "1e-30 .. 1"]),
        ("data", {"tokenizer": f"bpe:{'9' * 5000}"}, ["tokenizer=bpe:99", "5004 characters"]),
        ("run", {"steps": 10**20}, ["steps=1000", "2 .. "]),
        ("run", {"recipes": ()}, ["run.recipes is empty"]),
        ("run", {"recipes": ("coupled", "coupled")}, ["coupled,coupled", "twice"]),
        ("run", {"init": "runs/a"}, ["init=runs/a", "fork:WORKDIR"]),
    ],
)
def test_an_impossible_value_is_refused_by_name(section, values, mentions):
    with pytest.raises(UserError) as caught:
        SECTIONS[section](**values)
    assert [part for part in mentions if part not in str(caught.value)] == []


def test_an_unknown_recipe_lists_the_known_ones():
    cfg, _ = presets.override(Config(), ["run.recipes=adam"])
    with pytest.raises(UserError, match=r"adam; known: coupled, decoupled, published"):
        presets.make_replicates(cfg, [0], {})


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError, match=r"huge.*tiny, quick, report, b158, 125m, 700m"):
        presets.preset("huge")


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_preset_makes_valid_replicates_and_survives_json(name):
    cfg = presets.preset(name)
    replicates = presets.make_replicates(cfg, [0, 1], {})
    assert len(replicates) == 2 * len(cfg.run.recipes)
    text = json.dumps(config_file.to_json(cfg, replicates))
    assert config_file.from_json(json.loads(text)) == (cfg, replicates)


def test_json_with_extra_keys_at_the_top_still_reads():
    cfg = presets.preset("tiny")
    replicates = presets.make_replicates(cfg, [3], {"lr_peak": 0.1})
    tree = config_file.to_json(cfg, replicates) | {"versions": {"jax": "0"}}
    assert config_file.from_json(tree) == (cfg, replicates)


def with_extra(extra):
    def change(tree):
        entry = tree["replicates"][0]
        return tree | {"replicates": [entry | {"hyper": entry["hyper"] | {"extra": extra}}]}

    return change


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (lambda t: [], ["saved.json", "dict", "[]"]),
        (lambda t: t | {"model": None}, ["saved.json: model", "dict", "null"]),
        (lambda t: t | {"data": t["data"] | {"seed": 0}}, ["seed", "saved.json: data"]),
        (lambda t: t | {"optim": {}}, ["saved.json: optim.beta1", "missing"]),
        (lambda t: t | {"run": t["run"] | {"steps": "20"}}, ["run.steps", "int", "20"]),
        (lambda t: t | {"run": t["run"] | {"steps": True}}, ["run.steps", "int", "true"]),
        (lambda t: t | {"run": t["run"] | {"recipes": [1]}}, ["run.recipes[0]", "str", "1"]),
        (lambda t: t | {"model": t["model"] | {"norm_eps": math.inf}}, ["model.norm_eps", "inf"]),
        (lambda t: t | {"replicates": []}, ["replicates", "empty"]),
        (with_extra({"x": math.inf}), ["replicates[0].hyper.extra.x", "inf"]),
        (with_extra({"x": "1"}), ["replicates[0].hyper.extra.x", "float"]),
        (lambda t: t | {"replicates": [{"name": "a"}]}, ["replicates[0].hyper", "dict"]),
    ],
)
def test_damaged_json_is_refused_by_the_field(change, mentions):
    cfg = presets.preset("tiny")
    tree = config_file.to_json(cfg, presets.make_replicates(cfg, [0], {}))
    with pytest.raises(UserError) as caught:
        config_file.from_json(change(tree), "saved.json")
    assert [part for part in mentions if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("assignment", "right"),
    [
        ("run.setps=4", "steps"),
        ("rnu.steps=4", "run"),
        ("model.layout=b15", "b158"),
        ("hyper.coupled1=1", "coupled_1"),
    ],
)
def test_a_near_miss_is_answered_with_the_right_name(assignment, right):
    with pytest.raises(UserError, match=rf"did you mean {right}\?$"):
        presets.override(Config(), [assignment])


def test_every_field_has_a_help_text():
    fields = [f for part in (*SECTIONS.values(), config.Hyper) for f in dataclasses.fields(part)]
    assert [f.name for f in fields if not f.metadata["help"]] == []


def test_replicates_run_through_the_seeds_of_one_recipe_before_the_next():
    cfg, _ = presets.override(Config(), ["run.recipes=published,coupled"])
    replicates = presets.make_replicates(cfg, [4, 5], {"logit_scale": 2.0})
    assert [(r.name, r.seed) for r in replicates] == [
        ("published", 4),
        ("published", 5),
        ("coupled", 4),
        ("coupled", 5),
    ]
    assert {r.hyper.logit_scale for r in replicates} == {2.0}


@pytest.mark.parametrize(
    ("recipe", "steps", "warmup"),
    [
        ("coupled", 1000, 375),
        ("coupled", 752, 375),  # the boundary is step 376: one step after warm-up
        ("coupled", 751, 75),  # the boundary is step 375: a tenth instead
        ("coupled", 2, 1),
        ("published", 1000, 50),
        ("published", 7500, 375),
        ("published", 100_000, 375),
        ("published", 2, 1),
    ],
)
def test_warmup_of_the_recipes(recipe, steps, warmup):
    hyper = presets.RECIPES[recipe](RunConfig(steps=steps))
    assert hyper.warmup_steps == warmup
    presets.check_hyper(RunConfig(steps=steps), hyper)


def test_coupled_decays_every_parameter_and_published_only_matrices_in_stage_1():
    """`coupled` and `decoupled` differ in nothing but where the same decay enters."""
    coupled, decoupled, published = (
        presets.RECIPES[name](RunConfig(steps=1000))
        for name in ("coupled", "decoupled", "published")
    )
    assert (coupled.coupled_1, coupled.coupled_2, coupled.decay_rest) == (0.1, 0.05, 1)
    swapped = coupled.replace(coupled_1=0.0, coupled_2=0.0, decoupled_1=0.1, decoupled_2=0.05)
    assert decoupled == swapped
    assert (published.decoupled_1, published.decoupled_2, published.decay_rest) == (0.1, 0, 0)
    assert (published.coupled_1, published.coupled_2) == (0, 0)


def test_a_peak_scales_the_rates_of_published_alone():
    low, high = RunConfig(1000, published_peak=1e-3), RunConfig(1000, published_peak=2e-3)
    for name, recipe in presets.RECIPES.items():
        factor = 2 if name == "published" else 1
        for rate in ("lr_peak", "lr_stage1_end", "lr_stage2_start", "lr_final"):
            assert getattr(recipe(high), rate) == factor * getattr(recipe(low), rate)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("warmup_steps", 11.0, "0 to 10"),
        ("lr_peak", 1e39, "0 .. 1000"),
        ("logit_scale", 0.0, "1e-06 .. "),
        ("lr_peak", -1e-3, "0 .. 1000"),
        ("lr_final", math.inf, "0 .. 1000"),
        ("coupled_1", math.nan, "must lie in"),
        ("weight_quant", 1.5, "0 .. 1"),
        ("act_quant", 2.0, "0 .. 1"),
    ],
)
def test_a_hyper_that_makes_no_schedule_is_refused(name, value, accepted):
    with pytest.raises(UserError, match=rf"hyper\.{name}=.*{accepted}"):
        presets.make_replicates(presets.preset("tiny"), [0], {name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", -1), ("seed", 2**32), ("seed", 10**25)),
        *(("name", ""), ("name", "../a"), ("name", "a\n"), ("name", "a" * 300)),
    ],
)
def test_a_replicate_needs_a_seed_and_a_name_of_a_folder(field, value):
    run = RunConfig()
    (rep,) = presets.make_replicates(Config(run=RunConfig(recipes=("coupled",))), [2**32 - 1], {})
    presets.check_replicate(run, rep)
    with pytest.raises(UserError, match=field) as caught:
        presets.check_replicate(run, dataclasses.replace(rep, **{field: value}))
    assert "\n" not in str(caught.value)


def test_warmup_may_end_at_the_boundary():
    presets.make_replicates(presets.preset("tiny"), [0], {"warmup_steps": 10.0})


def test_run_id_is_the_name_and_a_digest_that_does_not_change():
    cfg = presets.preset("tiny")
    replicates = presets.make_replicates(cfg, [0], {})
    name, digest = config_file.run_id("train", cfg, replicates).split("-")
    assert name == "train" and len(digest) == 8 and int(digest, 16) >= 0
    again = config_file.from_json(json.loads(json.dumps(config_file.to_json(cfg, replicates))))
    assert config_file.run_id("train", *again) == f"train-{digest}"


@pytest.mark.parametrize("name", config.HYPER_FIELDS)
def test_run_id_changes_with_every_hyper(name):
    cfg = presets.preset("tiny")
    (rep,) = presets.make_replicates(presets.override(cfg, ["run.recipes=published"])[0], [0], {})
    hyper = rep.hyper.replace(**{name: getattr(rep.hyper, name) + 1e-5})
    changed = dataclasses.replace(rep, hyper=hyper)
    assert config_file.run_id("a", cfg, [changed]) != config_file.run_id("a", cfg, [rep])


def test_run_id_changes_with_seeds_and_static_configuration():
    cfg = presets.preset("tiny")
    replicates = presets.make_replicates(cfg, [0], {})
    wider, _ = presets.override(cfg, ["model.d_ff=65"])
    longer, _ = presets.override(cfg, ["run.steps=21"])
    ids = {
        config_file.run_id("a", cfg, replicates),
        config_file.run_id("a", wider, replicates),
        config_file.run_id("a", cfg, presets.make_replicates(cfg, [1], {})),
        config_file.run_id("a", longer, presets.make_replicates(longer, [0], {})),
    }
    assert len(ids) == 4


def test_stacked_hypers_are_float32_vectors_in_replicate_order():
    replicates = presets.make_replicates(presets.preset("tiny"), [0, 1], {})
    stacked = config.stack_hypers(replicates)
    leaves = jax.tree.leaves(stacked)
    assert len(leaves) == len(config.HYPER_FIELDS)
    assert {(x.shape, str(x.dtype)) for x in leaves} == {((4,), "float32")}
    np.testing.assert_array_equal(stacked.coupled_1, np.float32([0.1, 0.1, 0, 0]))
    np.testing.assert_array_equal(stacked.decoupled_1, np.float32([0, 0, 0.1, 0.1]))
