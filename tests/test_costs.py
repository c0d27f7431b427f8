"""Products and collectives are counted as they run: in loops, in branches, in parts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax import costs
from bitnet_jax.costs import Traffic

# As XLA:TPU 0.0.42 writes a loop: no count of its turns, a step of 2, and a gather of two parts.
TPU_LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused.1 (param_0.1: bf16[96,768]) -> bf16[768,768] {
  %param_0.1 = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[768,768]{1,0} all-gather(%param_0.1), channel_id=7, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%fused.2 (param_0.2: bf16[96,768]) -> bf16[768,768] {
  %param_0.2 = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[768,768]{1,0} all-gather(%param_0.2), channel_id=7, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%cond (arg.1: (f32[96,768], u32[])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(4)
  %arg.1 = (f32[96,768]{1,0}, u32[]{:T(128)}) parameter(0)
  %item.1 = u32[]{:T(128)} get-tuple-element(%arg.1), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%item.1, %constant.1), direction=LT
}

%body (arg.2: (f32[96,768], u32[])) -> (f32[96,768], u32[]) {
  %arg.2 = (f32[96,768]{1,0}, u32[]{:T(128)}) parameter(0)
  %constant.2 = u32[]{:T(128)} constant(2)
  %item.2 = f32[96,768]{1,0} get-tuple-element(%arg.2), index=0
  %item.3 = u32[]{:T(128)} get-tuple-element(%arg.2), index=1
  %start = (f32[96,768]{1,0}, f32[96,768]{1,0}, u32[]{:S(2)}) collective-permute-start(%item.2), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = f32[96,768]{1,0} collective-permute-done(%start)
  %add.1 = u32[]{:T(128)} add(%item.3, %constant.2)
  ROOT %tuple.1 = (f32[96,768]{1,0}, u32[]{:T(128)}) tuple(%done, %add.1)
}

ENTRY %main (p.1: f32[96,768], p.2: bf16[96,768]) -> f32[96,768] {
  %p.1 = f32[96,768]{1,0} parameter(0)
  %p.2 = bf16[96,768]{1,0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %first = bf16[768,768]{1,0} fusion(%p.2), kind=kCustom, calls=%fused.1
  %second = bf16[768,768]{1,0} fusion(%p.2), kind=kCustom, calls=%fused.2
  %in = (f32[96,768]{1,0}, u32[]{:T(128)}) tuple(%p.1, %zero)
  %while.1 = (f32[96,768]{1,0}, u32[]{:T(128)}) while(%in), condition=%cond, body=%body
  ROOT %out = f32[96,768]{1,0} get-tuple-element(%while.1), index=0
}
"""  # noqa: E501


def test_loops_turn_and_a_gather_in_parts_counts_once():
    gathered, moved = 768 * 768 * 2, 96 * 768 * 4
    assert costs.traffic(TPU_LOOP) == {
        "all-gather": Traffic(1, gathered, gathered * 7 / 8),
        "collective-permute": Traffic(2, 2 * moved, 2 * moved),
    }


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_a_sum_over_a_group_passes_each_link_twice(groups, size):
    hlo = f"""HloModule m, num_partitions=8

ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  ROOT %y = f32[10]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    assert costs.traffic(hlo) == {"all-reduce": Traffic(1, 40, 80 * (size - 1) / size)}


def test_a_compiled_program_on_eight_devices():
    """Five steps: weights [64, 32] gathered, the gradient reduced over the batch of 16."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, by_row = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "data"))

    def steps(w, x):
        def step(w, x):
            grad = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)
            return jax.lax.with_sharding_constraint(w - grad, split), None

        return jax.lax.scan(step, w, x)[0]

    shapes = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    batches = jax.ShapeDtypeStruct((5, 16, 64), jnp.float32, sharding=by_row)
    compiled = jax.jit(steps, out_shardings=split).lower(shapes, batches).compile()
    whole = 5 * 64 * 32 * 4
    traffic = costs.traffic(compiled.as_text())
    assert traffic["all-gather"] == Traffic(5, whole, whole * 7 / 8)
    assert (
        traffic["all-reduce"].bytes + traffic.get("reduce-scatter", Traffic(0, 0, 0)).bytes == whole
    )
    assert costs.flops(jax.make_jaxpr(steps)(shapes, batches).jaxpr) == 5 * 2 * (2 * 16 * 64 * 32)


def test_flops_of_branches_batches_and_what_is_computed_again():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    once = 2 * 3 * 4 * 5 * 6

    def branches(a, b):
        return jax.lax.cond(a[0, 0, 0] > 0, lambda: (a @ b) + (a @ b), lambda: a @ b)

    def again(a):
        return jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ b))(a))

    assert costs.flops(jax.make_jaxpr(jnp.matmul)(a, b).jaxpr) == once
    assert costs.flops(jax.make_jaxpr(branches)(a, b).jaxpr) == 2 * once
    assert costs.flops(jax.make_jaxpr(jax.grad(again))(a).jaxpr) == 3 * once
