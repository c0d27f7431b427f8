"""A plan has the bytes of the run it is about, and what it proposes fits."""

import json
from dataclasses import replace

import jax
import pytest

from bitnet_jax import chips, plan, presets, program, shapes, sharding
from bitnet_jax.cli import plan as command_plan
from bitnet_jax.fields import UserError


def planned(sets=(), preset="tiny", topology="gpu:8", seeds=(0,)):
    cfg, _ = presets.override(presets.preset(preset), list(sets))
    replicates = presets.make_replicates(cfg, list(seeds), {})
    return plan.make(cfg, replicates, chips.parse_topology(topology), compiling=False)


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)


@pytest.mark.parametrize("track", ["validation", "first_batch"])
def test_the_program_is_that_of_a_run(tiny, track):
    """Same shapes, types and places as `program.build` makes, from the configuration alone."""
    changed = replace(tiny.data, track=track, gather="host", held_out_positions=100)
    cfg = replace(tiny, data=changed)
    replicates = presets.make_replicates(cfg, [0], {})
    built = program.build(cfg, replicates)
    ours = shapes.abstract_program(built.cfg, replicates, built.mesh, "cpu")
    assert described(ours.abstract_state) == described(built.abstract_state)
    assert described((ours.evals, ours.hyper)) == described((built.evals, built.hyper))
    batches = built.batches(0, 5)
    assert described(shapes.batches_of(ours)) == described(batches)
    assert ours.cfg == built.cfg


@pytest.mark.parametrize(("n_devices", "shape"), [(1, (1, 1)), (8, (2, 4))])
def test_bytes_are_those_of_the_arrays(n_devices, shape, monkeypatch):
    """Of a state that is really there, on a device and in all."""
    monkeypatch.setattr(sharding, "MIN_SHARDED", 2**10)  # so that a tiny model is split, too
    run_plan = planned(topology=f"gpu:{n_devices}")
    assert run_plan.program.mesh.axis_sizes == shape
    cfg, replicates = run_plan.program.cfg, run_plan.program.replicates
    mesh = sharding.make_mesh(len(replicates), cfg.data.batch_size, jax.devices()[:n_devices])
    real = shapes.abstract_program(cfg, replicates, mesh, "cpu")
    place = jax.jit(
        lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), real.abstract_state),
        out_shardings=real.state_sharding,
    )
    state = place()

    def on_first(tree):
        here = jax.devices()[0]
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == here)

    assert run_plan.memory.weights == on_first(state.params)
    assert run_plan.memory.moments == on_first(state.opt_state)
    assert run_plan.checkpoint == sum(x.nbytes for x in jax.tree.leaves(state))


def test_the_report_keeps_what_its_arrays_say():
    """Parameters [R], and Adam's two moments of each, all float32."""
    run_plan = planned(preset="report", topology="v5e:1x1")
    n_params = shapes.size_of(run_plan.program.abstract_state.params) // 4
    assert run_plan.memory.weights == 4 * n_params
    assert 0 <= run_plan.memory.moments - 8 * n_params < 100  # and counts of steps


def test_flops_are_six_per_weight_and_token_and_those_of_attention():
    run_plan = planned(["model.vocab_size=512", "model.n_layers=3"], topology="gpu:1")
    model, data = run_plan.program.cfg.model, run_plan.program.cfg.data
    tokens = data.batch_size * data.seq_len
    matrices = 3 * (4 * model.d_model**2 + 3 * model.d_model * model.d_ff)
    head = model.d_model * 512
    attention = 3 * 2 * data.seq_len * model.d_model
    products = 6 * tokens * (matrices + head + attention)
    assert run_plan.flops == len(run_plan.program.replicates) * products


@pytest.mark.slow
def test_compiled_memory_is_the_compilers():
    """On CPU devices that are there: the same numbers, from the program itself."""
    sets = ["run.recipes=published", "model.n_layers=1"]
    cfg, _ = presets.override(presets.preset("tiny"), sets)
    replicates = presets.make_replicates(cfg, [0], {})
    mesh = sharding.make_mesh(1, cfg.data.batch_size, jax.devices())
    compiled = plan.compile_program(shapes.abstract_program(cfg, replicates, mesh, "cpu"))
    state = planned(sets, topology="gpu:4").memory
    assert compiled.used > state.weights + state.moments + state.data
    assert compiled.step > 0 < compiled.evaluation
    # Every parameter of a model this small is on every device: gradients are summed, float32.
    assert compiled.traffic["all-reduce"].bytes >= state.weights


def with_memory(run_plan, size):
    """The plan on chips of another memory."""
    chip = replace(run_plan.topology.chip, memory=size)
    return replace(run_plan, topology=replace(run_plan.topology, chip=chip))


def test_an_estimate_that_may_be_too_low_is_not_certain():
    """What the arithmetic says fits for certain only with the margin that compilers have needed."""
    run_plan = planned(topology="gpu:1")
    tight = with_memory(run_plan, 1.5 * run_plan.used)
    assert tight.fits and not tight.certain
    assert with_memory(run_plan, plan.UNDERESTIMATED * run_plan.used).certain
    compiled = plan.Compiled(1.0, 1.0, run_plan.used, {}, 1.0)
    assert replace(tight, compiled=compiled).certain


def test_each_remedy_makes_it_fit():
    run_plan = planned(["data.batch_size=32"], topology="gpu:1")
    small = with_memory(run_plan, 0.6 * run_plan.used)
    assert run_plan.fits and not small.fits
    remedies = plan.remedies(small)
    assert any(text.startswith("data.batch_size=") for text in remedies)
    assert "run.recipes=coupled" in remedies and "--topology gpu:2" in remedies
    for change in remedies:
        if change.startswith("--topology"):
            changed = planned(["data.batch_size=32"], topology=change.split()[1])
        else:
            changed = planned(["data.batch_size=32", *change.split()], topology="gpu:1")
        assert changed.used <= small.topology.chip.memory
    assert plan.remedies(with_memory(run_plan, 1000)) == []


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:", "v5e:3x3", "v5e:8", "v5p:4x4", "gpu:0", "gpu:4x4", "gpu:x", "tpu:8"]
)
def test_a_wrong_topology_is_one_line_that_says_what_is_accepted(bitnet, text):
    with pytest.raises(UserError, match="; use ") as caught:
        chips.parse_topology(text)
    assert "\n" not in str(caught.value)
    status, out, err = bitnet("plan", "--topology", text)
    assert (status, out) == (2, "") and err.startswith("error: --topology ")


def test_topologies_count_their_devices():
    sizes = {text: chips.parse_topology(text).size for text in ("v5e:4x4", "v5p:2x2x4", "cpu:3")}
    assert sizes == {"v5e:4x4": 16, "v5p:2x2x4": 16, "cpu:3": 3}
    assert [t.text for t in chips.larger(chips.parse_topology("v6e:8x8"))] == [
        "v6e:8x16",
        "v6e:16x16",
    ]


def test_the_command_prints_80_columns_and_says_estimate(bitnet, tmp_path, monkeypatch):
    """Without text, tokenizer or a folder of its own."""
    monkeypatch.chdir(tmp_path)
    nowhere = ["--set", "data.corpus=text:/nowhere/*", "--set", "data.tokenizer=gpt2:/nowhere"]
    shallow = ["--preset", "700m", "--set", "model.n_layers=2", "--set", "model.remat=false"]
    shallow += ["--set", "data.batch_size=128"]
    arguments = ["--topology", "v5e:1x1", "--estimate", *shallow, *nowhere]
    status, out, err = bitnet("plan", *arguments)
    assert (status, err) == (0, "") and not any(tmp_path.iterdir())
    assert max(map(len, out.splitlines())) <= 80
    assert "estimate" in out.splitlines()[0] and "does not fit" in out
    assert "--set data.accumulate=" in out
    assert "--set data.batch_size=" in out and "11 checkpoints" in out


def test_idle_devices_are_told():
    run_plan = planned(["run.recipes=published"], topology="gpu:8")  # a batch of 4
    assert any("4 of 8 devices" in line for line in command_plan.terminal_lines(run_plan))
    assert json.dumps(command_plan.terminal_lines(run_plan)).isascii()


@pytest.mark.skipif(
    not chips.can_compile(chips.parse_topology("v5e:1x1")), reason="needs libtpu: make plan"
)
def test_the_compiler_of_tpus_says_what_fits():
    cfg, _ = presets.override(
        presets.preset("tiny"), ["run.recipes=published", "model.n_layers=1", "data.batch_size=8"]
    )
    replicates = presets.make_replicates(cfg, [0], {})
    try:
        run_plan = plan.make(cfg, replicates, chips.parse_topology("v5e:2x4"), compiling=True)
    except chips.Busy as busy:
        pytest.skip(str(busy))
    assert run_plan.fits and run_plan.program.mesh.devices.flat[0].platform == "tpu"
    assert (
        run_plan.compiled.traffic
        and run_plan.used > run_plan.memory.weights + run_plan.memory.moments
    )
