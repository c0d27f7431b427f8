"""What is wrong with this checkpoint?

Ten tests of one replicate of a checkpoint (its logits, displacement, decay, gradients, quantisers,
batches and what a few steps on one batch give), then the causes that they point to, the best
supported first, with the evidence. Nothing is trained but the one batch; data, recipe and seed are
the checkpoint's. Expected: no cause for a healthy run.

    python -m experiments.triage runs/train-1234abcd
    python -m experiments.triage runs/train-1234abcd@500:1
    python -m experiments.triage runs/train-1234abcd --all
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from bitnet_jax import checkpoint, log, triage
from bitnet_jax import program as programs
from bitnet_jax.config import UserError
from experiments import common, page

NEEDED_LR = 0.02  # sum of learning rates that a healthy run needs to learn word frequencies
LATE = 0.05  # from this sum on, symptoms count
ADRIFT = 1e-3  # relative error of a decay factor, and of a loss, that rounding does not explain


class Cause(NamedTuple):
    """What may be wrong; `score` is 1 where an identity of sound code is violated outright."""

    name: str
    score: float
    evidence: str


NEXT = {
    "repeated batches": "look at how batches follow from the step; train on fresh windows",
    "shifted labels": "look where targets are cut from the window: shift them once",
    "padding is scored": "give padding and end of text weight 0 in the loss",
    "another loss": "compare the loss of a step with the cross-entropy of x[t + 1], term by term",
    "no straight-through gradient": "give the quantiser its identity gradient",
    "logits scaled down": "remove the factor on the logits, or the division by sqrt(d)",
    "decay through Adam": "decouple: add the decay after Adam (optax.adamw), not to the gradient",
    "decay not scaled by the learning rate": "multiply the decay by the learning rate",
    "output matrix not updated": "look for the output matrix in the optimiser's masks and rates",
    "latent weights out of reach": "initialise latent weights near 1/sqrt(fan-in) or 0.02",
    "learning rate too small": "raise the peak rate or train longer; print the schedule's sum",
    "learning rate too high": "lower the peak rate, lengthen the warm-up, enlarge the batch",
    "no gradient for the ternary weights": "look for a stop_gradient or dead activations",
    "logits too small": "run the decay audit on the other groups; compare norms with the start",
    "context ignored": "look at norms, attention mask and order of the targets",
    "only the last token used": "look at attention and at code flips: is the trunk learning?",
    "cannot overfit one batch": "switch parts off until 200 steps on one batch end below 2 nats",
}


def rank_causes(m: dict) -> list[Cause]:
    """Causes that the numbers of `triage.measure` support, the best supported first; pure.

    Violations of identities score up to 1, symptoms 0.4 or less: a symptom is the cause only when
    no mechanism is seen. Equal scores keep the order of data, loss, model, optimiser, in which one
    fault makes the next. No cause: nothing is wrong that ten tests can see.
    """
    groups = [key.removeprefix("moved_") for key in m if key.startswith("moved_")]
    out = "head" if "head" in groups else "embedding"
    late, above = m["sum_lr"] >= LATE, m["loss"] - m["unigram_loss"]
    reach = m["planned_lr"] / m["start_latent"]
    g = max(groups, key=lambda g: abs(math.log(_ratio(m, g))))
    excess, multiplies = abs(math.log(_ratio(m, g))), m[f"decay_spread_{g}"] < ADRIFT
    audit = (
        f"{triage.AUDIT_STEPS} updates without gradients leave {m[f'decay_factor_{g}']:.3g} of the "
        f"{g}, {m[f'decay_expected_{g}']:.3g} expected, "
        + ("all weights by one factor" if multiplies else "small weights by more than large ones")
    )
    still = m[f"update_{out}"] == 0 or (m[f"moved_{out}"] < ADRIFT < m["moved_matrix"] / 10)
    found = [
        (
            "repeated batches",
            m["repeated"] > 0.1 and m["repeated"] / 0.5,
            f"{m['repeated']:.0%} of the windows of the first batches were served before",
        ),
        (
            "shifted labels",
            m["offset"] != 1,
            f"the training loss is that of x[t + {m['offset']}], {m['loss_error']:.2g} nats from "
            "that of x[t + 1]",
        ),
        (
            "padding is scored",
            m["end_of_text_scored"] > 0.02 and m["end_of_text_scored"] / 0.1,
            f"{m['end_of_text_scored']:.0%} of the scored targets are end of text",
        ),
        (
            "another loss",
            m["loss_error"] > ADRIFT and 0.5,
            f"the training loss is {m['loss_error']:.2g} nats from the one computed here",
        ),
        (
            "no straight-through gradient",
            max(m["ste_weight"], m["ste_activation"]) > ADRIFT,
            f"gradient of the quantiser is off by {max(m['ste_weight'], m['ste_activation']):.2g}",
        ),
        (
            "logits scaled down",
            m["start_gain"] < 0.5 and math.log(1 / m["start_gain"], 4),
            f"at the start logits spread {m['start_gain']:.3g} times as far as hidden state and "
            f"output matrix give; their best scale now is {m['scale']:.2g}",
        ),
        ("decay through Adam", excess > ADRIFT and not multiplies and 10 * excess, audit),
        (
            "decay not scaled by the learning rate",
            excess > ADRIFT and multiplies and 10 * excess,
            audit,
        ),
        (
            "output matrix not updated",
            still,
            f"the {out} has moved by {m[f'moved_{out}']:.2g} of its norm, ternary weights by "
            f"{m['moved_matrix']:.2g}; its next update is {m[f'update_{out}']:.2g} of its size",
        ),
        (
            "latent weights out of reach",
            reach < 1 <= m["planned_lr"] / NEEDED_LR and math.log(1 / reach, 4),
            f"all learning rates sum to {reach:.2g} of the mean latent weight at the start; "
            f"{m['codes_changed']:.1%} of the codes have changed",
        ),
        (
            "learning rate too small",
            m["planned_lr"] < NEEDED_LR and math.log(NEEDED_LR / m["planned_lr"], 4),
            f"all learning rates sum to {m['planned_lr']:.2g}, {NEEDED_LR} are needed for word "
            "frequencies alone",
        ),
        (
            "no gradient for the ternary weights",
            m["zeros_matrix"] > 0.99 and 0.4,
            f"the gradient of {m['zeros_matrix']:.0%} of them is exactly zero",
        ),
        (
            "learning rate too high",
            late and above > 0 and 0.4 * (m["overconfidence"] > 0.5),
            f"loss is {m['overconfidence']:.2f} above the entropy, {above:.2f} above the unigram's",
        ),
        (
            "logits too small",
            late and above > 0 and 0.3 * (m["scale_gain"] > 0.3),
            f"logits times {m['scale']:.2g} gain {m['scale_gain']:.2f} nats",
        ),
        (
            "context ignored",
            late and 0.3 * (m["mutual_information"] < 0.05),
            f"mutual information {m['mutual_information']:.3f} nats",
        ),
        (
            "only the last token used",
            late and 0.2 * (m["mutual_information"] > 0.1 and m["earlier_tokens"] < 0.02),
            f"earlier tokens are worth {m['earlier_tokens']:.3f} nats",
        ),
        (
            "cannot overfit one batch",
            0.2 * (m["overfit_loss"] > triage.OVERFIT_LOSS),
            f"loss {m['overfit_loss']:.2f} after {m['overfit_steps']} steps on it alone",
        ),
    ]
    causes = [Cause(name, min(1.0, float(score)), text) for name, score, text in found if score]
    return sorted(causes, key=lambda cause: -cause.score)


def _ratio(m, group) -> float:
    """What is left after zero gradients, over what should be."""
    return max(m[f"decay_factor_{group}"], 1e-9) / max(m[f"decay_expected_{group}"], 1e-9)


def table(m: dict) -> page.Table:
    """The ten tests: what was measured, and how it reads."""
    groups = [key.removeprefix("moved_") for key in m if key.startswith("moved_")]
    gap, above = m["overconfidence"], m["loss"] - m["unigram_loss"]
    out = "head" if "head" in groups else "embedding"

    def each(key, spec=".2g"):
        return ", ".join(f"{g} {m[f'{key}_{g}']:{spec}}" for g in groups)

    sound = all(abs(_ratio(m, g) - 1) < ADRIFT for g in groups)
    audited = ", ".join(
        f"{g} {m[f'decay_factor_{g}']:.4g} / {m[f'decay_expected_{g}']:.4g}" for g in groups
    )
    where = "below" if above < 0 else "above"
    rows = [
        (
            "T1 calibration",
            f"loss {m['loss']:.2f}, entropy {m['entropy']:.2f}",
            f"{'overconfident' if gap > 0.5 else 'underconfident' if gap < -0.3 else 'calibrated'}"
            f", {abs(above):.2f} {where} the unigram's {m['unigram_loss']:.2f}",
        ),
        (
            "T2 temperature",
            f"best scale {m['scale']:.2g}, gain {m['scale_gain']:.2f}; at the start logits "
            f"{m['start_gain']:.2g} of theory",
            "logits too small"
            if m["scale_gain"] > 0.3 and m["scale"] > 1
            else "scale is right"
            if m["scale_gain"] < 0.1
            else "scale is off",
        ),
        (
            "T3 unigram bias",
            f"best bias {m['bias']:.2g}, gain {m['bias_gain']:.2f}",
            "knows word frequencies"
            if m["bias_gain"] - m["scale_gain"] < 0.1
            else "lacks word frequencies",
        ),
        (
            "T4 displacement",
            each("moved") + f"; codes changed {m['codes_changed']:.1%}",
            f"norm of the {out} {m[f'norm_{out}']:.2g} of the start",
        ),
        ("T5 decay audit", audited, "decoupled and scaled" if sound else "not prod(1 - lr decay)"),
        (
            "T6 gradients",
            f"update / weight: {each('update')}",
            f"zero: {each('zeros', '.0%')}",
        ),
        (
            "T7 straight-through",
            f"off by {m['ste_weight']:.2g} (weights), {m['ste_activation']:.2g} (activations)",
            "identity" if max(m["ste_weight"], m["ste_activation"]) < ADRIFT else "no identity",
        ),
        (
            "T8 data",
            f"repeated {m['repeated']:.0%}, end of text {m['end_of_text_scored']:.1%} of targets, "
            f"their entropy {m['target_entropy']:.2f}",
            f"training scores x[t + {m['offset']}], its loss is off by {m['loss_error']:.1g}",
        ),
        (
            "T9 one batch",
            f"loss {m['overfit_loss']:.2f} after {m['overfit_steps']} steps",
            "can be fitted" if m["overfit_loss"] < triage.OVERFIT_LOSS else "cannot be fitted",
        ),
        (
            "T10 context",
            f"mutual information {m['mutual_information']:.3f}, earlier tokens worth "
            f"{m['earlier_tokens']:.3f} nats",
            "used" if m["earlier_tokens"] > 0.02 else "the last token alone, at most",
        ),
    ]
    return page.Table("Tests", ["test", "measured", "reads as"], [list(row) for row in rows])


def examine(workdir: Path, step: int, index: int, **limits) -> dict:
    """Name, seed, step, measurements and ranked causes of one replicate of a checkpoint."""
    cfg, replicate, state = programs.load_replicate(workdir, step, index)
    program = programs.build(cfg, [replicate])
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    with jax.set_mesh(program.mesh), jax.default_matmul_precision(precision):
        numbers = triage.measure(program, state, **limits)
    return {
        "replicate": index,
        "name": replicate.name,
        "seed": replicate.seed,
        "step": step,
        "measured": numbers,
        "causes": [cause._asdict() for cause in rank_causes(numbers)],
    }


def show(found: dict) -> str:
    """The table, the causes, and the next thing to do."""
    lines = [
        f"replicate {found['replicate']} ({found['name']}, seed {found['seed']}), "
        f"step {found['step']}",
        page.text_table(table(found["measured"])),
        "",
    ]
    for rank, cause in enumerate(found["causes"], 1):
        lines.append(f"{rank}. {cause['name']} ({cause['score']:.2f}): {cause['evidence']}")
    first = found["causes"][0]["name"] if found["causes"] else None
    lines.append(f"next: {NEXT[first]}" if first else "no cause found: nothing to repair")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Examine, print and write triage.json into the workdir; raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.triage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="WORKDIR[@STEP[:REPLICATE]]; default: last step, 0")
    parser.add_argument("--all", action="store_true", help="every replicate, not one")
    args = parser.parse_args(argv)
    workdir, step, index = programs.checkpoint_place(args.checkpoint)
    if args.all and index is not None:
        raise UserError(f"{args.checkpoint} --all: name one replicate, or all")
    members = len(checkpoint.load_config(workdir, step)["replicates"]) if args.all else 1
    found = [examine(workdir, step, i) for i in (range(members) if args.all else [index or 0])]
    print("\n\n".join(map(show, found)))
    log.write_json(workdir / "triage.json", found)
    print(f"\nwritten: {workdir / 'triage.json'}")


if __name__ == "__main__":
    common.guard(lambda: main(sys.argv[1:]))
