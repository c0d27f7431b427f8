"""What the numbers of `audit` point to: causes, the best supported first. Pure.

Scores: 1 is an identity that is violated outright, symptoms have 0.4 or less. Equal scores are
ordered by how many other causes one explains, then as in `signatures`: data, loss, model,
optimiser. What a listed cause explains is not listed itself. A number that is missing (its test was
left out) leaves out the causes that need it; where nobody knows whether the model has learned, only
identities are looked at.
"""

from dataclasses import dataclass

from bitnet_jax import signatures
from bitnet_jax.signatures import CAUSES, IDENTITY, MECHANISM, SYMPTOM, late


@dataclass(frozen=True)
class Finding:
    """A cause that the numbers support, and the causes that it explains, which are not listed."""

    name: str
    score: float
    evidence: str
    next: str
    explains: tuple[str, ...] = ()


def learned(m: dict) -> bool | None:
    """Whether the model has learned; None where its predictions were not measured."""
    return signatures.learned(m) if "minus_unigram" in m else None


def supported(m: dict) -> dict[str, float]:
    """Scores in (0, 1] of the causes that the numbers support, in the order of `CAUSES`."""
    kinds = {IDENTITY} | ({MECHANISM} if learned(m) is False else set())
    if MECHANISM in kinds and late(m):
        kinds |= {SYMPTOM}
    scores = {
        c.name: min(1.0, float(c.score(m)))
        for c in CAUSES
        if c.kind in kinds and all(key in m for key in c.needs)
    }
    return {name: score for name, score in scores.items() if score > 0}


def rank(m: dict) -> list[Finding]:
    """The causes that the numbers of `audit.measure` support and that no better one explains.

    Empty: nothing is wrong that these tests can see.
    """
    scores = supported(m)
    fired = [c for c in CAUSES if c.name in scores]
    explained = {c.name: [name for name in scores if name in c.explains] for c in fired}
    fired.sort(key=lambda c: (c.kind == SYMPTOM, -scores[c.name], -len(explained[c.name])))
    findings, known = [], set()
    for cause in fired:
        if cause.name not in known:
            known |= set(explained[cause.name])
            findings.append(
                Finding(
                    cause.name,
                    scores[cause.name],
                    cause.evidence(m),
                    cause.next,
                    tuple(explained[cause.name]),
                )
            )
    return findings


def render(m: dict, findings: list[Finding]) -> list[str]:
    """`1. NAME (score): evidence` for each finding and what to do about the first, or that no
    cause was found."""
    if not findings:
        verdict = {
            True: "the model has learned",
            False: "these tests do not say why it has not learned",
            None: "whether the model has learned needs a text",
        }
        return [f"no cause found: {verdict[learned(m)]}"]
    numbered = []
    for place, f in enumerate(findings, 1):
        explains = f" (explains: {', '.join(f.explains)})" if f.explains else ""
        numbered.append(f"{place}. {f.name} ({f.score:.2f}): {f.evidence}{explains}")
    return [*numbered, f"next: {findings[0].next}"]
