"""The program of a run with shapes in place of arrays: no text, no tokenizer, no devices needed."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from bitnet_jax import data, products, sharding, tokenizer, train
from bitnet_jax.config import Config, Replicate
from bitnet_jax.program import Program
from bitnet_jax.run import next_end


def vocabulary(cfg: Config) -> tuple[int, str]:
    """Size of the vocabulary, without a look at the corpus, and where it is from."""
    kind, _, argument = cfg.data.tokenizer.partition(":")
    if cfg.model.vocab_size is not None:
        return cfg.model.vocab_size, ""
    if kind == "bpe":
        return int(argument), " (fewer on a small corpus)"
    if kind == "hf":
        return tokenizer.load_folder(Path(argument)).vocab_size, ""
    return 50257, ""


def abstract_mesh(cfg: Config, n_replicates: int, n_devices: int) -> AbstractMesh:
    """The mesh that a run would have, without its devices."""
    shape = sharding.mesh_shape(n_replicates, cfg.data.batch_size // cfg.data.accumulate, n_devices)
    return AbstractMesh(shape, ("replicate", "data"), axis_types=(AxisType.Auto,) * 2)


def abstract_program(cfg: Config, replicates: list[Replicate], mesh, platform: str) -> Program:
    """The program of `program.build` with shapes in place of arrays; windows come from the host."""
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=vocabulary(cfg)[0]))
    everywhere, D = sharding.replicated(mesh), cfg.data

    def array(*shape, dtype=jnp.float32, where=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def batch(*lead):
        shape = (*lead, D.batch_size, D.seq_len)
        ids = array(*shape, dtype=jnp.int32)
        return data.Batch(ids, ids, array(*shape))

    n_large = -(-D.held_out_positions // (D.batch_size * D.seq_len))
    evals = train.EvalData(
        small=batch(D.eval_batches),
        large=batch(n_large),
        large_nats_NKBL=array(n_large, 2, D.batch_size, D.seq_len),
        tracked=batch(len(replicates)) if D.track == "first_batch" else None,
        unigram_V=array(cfg.model.vocab_size),
        token_bytes_V=array(cfg.model.vocab_size),
    )
    by_replicate = sharding.by_replicate(mesh)
    hyper = jax.tree.map(lambda _: array(len(replicates), where=by_replicate), replicates[0].hyper)
    used = products.choose((rep.hyper for rep in replicates), standard=True, on=platform)
    seams = replace(train.STANDARD, products=used)
    return Program(cfg, replicates, seams, None, {}, mesh, hyper, evals, None, None)


def batches_of(program: Program) -> data.Batch:
    """What the first chunk reads: [R, K, B, L]."""
    cfg = program.cfg
    lead = (len(program.replicates), next_end(cfg.run, 0))
    shape, where = (*lead, cfg.data.batch_size, cfg.data.seq_len), sharding.batches(program.mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    return data.Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where))


def size_of(tree) -> int:
    """Bytes of all arrays, each once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def size_on_device(tree) -> int:
    """Bytes of the parts of all arrays that one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def placed(shapes, mesh):
    """Shapes of a state with their places on a mesh."""
    where = sharding.state_sharding(mesh, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
