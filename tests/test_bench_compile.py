"""What is counted in a compiled program."""

import pytest

from bitnet_jax.fields import UserError
from experiments import bench_compile

HLO = """HloModule chunk

%fused (a: s8[4,8], b: s8[8,2]) -> s32[4,2] {
  %a = s8[4,8]{1,0} parameter(0)
  %b = s8[8,2]{1,0} parameter(1)
  ROOT %dot.1 = s32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%called (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  ROOT %dot.2 = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%block (state: (f32[4,4])) -> (f32[4,4]) {
  %state.3 = (f32[4,4]{1,0}) parameter(0)
  %x.1 = f32[4,4]{1,0} get-tuple-element(%state.3), index=0
  %call.1 = f32[4,4]{1,0} call(%x.1), to_apply=%called
  ROOT %tuple.2 = (f32[4,4]{1,0}) tuple(%call.1)
}

%step (state: (s32[], s8[4,8])) -> (s32[], s8[4,8]) {
  %state = (s32[], s8[4,8]{1,0}) parameter(0)
  %codes = s8[4,8]{1,0} get-tuple-element(%state), index=1
  %fusion.1 = s32[4,2]{1,0} fusion(%codes, %codes), kind=kCustom, calls=%fused
  %while.3 = (f32[4,4]) while(%codes), condition=%more, body=%block, "known_trip_count":{"n":"3"}
  %copy.1 = s8[4,8]{1,0} copy(%codes)
  ROOT %tuple.1 = (s32[], s8[4,8]{1,0}) tuple(%codes, %copy.1)
}

%small (state: (s32[])) -> (s32[]) {
  %state.1 = (s32[]) parameter(0)
  ROOT %copy.2 = (s32[]) copy(%state.1)
}

%more (state: (s32[])) -> pred[] {
  %state.2 = (s32[]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: (s32[], s8[4,8])) -> (s32[], s8[4,8]) {
  %p = (s32[], s8[4,8]{1,0}) parameter(0)
  %while.1 = (s32[]) while(%p), condition=%more, body=%small
  ROOT %while.2 = (s32[], s8[4,8]{1,0}) while(%p), condition=%more, body=%step
}
"""


def test_operations_and_products_of_the_loop_over_steps():
    """The fusion, which holds a product of int8, the copy, and three times the called product."""
    assert bench_compile.count(HLO) == {"operations": 5, "products": {"f32": 3, "s8": 1}}


def test_a_device_without_a_compiler_here_is_named():
    with pytest.raises(UserError, match="no compiler"):
        bench_compile.run(bench_compile.parse(["--topology", "gpu:1"]))
