"""Rules without a threshold: what they say is so, or it is not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ddp_streammon.config import Severity
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules.finding import Finding
from ddp_streammon.stats import StepStats

NONFINITE, NO_GRADIENT, ZERO_GRADIENT = "NF", "DET", "DEAD"


def check(stats: StepStats, frozen: Collection[str] = (), parameters: Sequence[str] = ()) -> list[Finding]:
    """What is wrong with one monitored step, by stream.

    `parameters`: the names of all, in the order of their numbers. NF (error): a gradient, or a number that a rank sent,
    is not finite, with the rank and the parameter where local gradients were measured; under a GradScaler that step
    is skipped, which is its business. DET (warning): no parameter of a stream has a gradient. DEAD (warning): all of
    its gradients are exactly zero. Streams in `frozen` have no trainable parameter and are left out.
    """
    findings = []
    for number, (name, stream) in enumerate(stats.streams.items()):
        sound = stream.elements and not stream.nonfinite and (stream.grad_norm or stream.grad_max)
        if sound or name in frozen:
            continue
        origins = [rank for rank in stats.local if rank.nonfinite[number]]
        ranks = [rank.rank for rank in origins] or stats.nonfinite_ranks
        evidence = {"elements": float(stream.elements), "nonfinite": float(stream.nonfinite)}
        common = {"stream": name, "step": stats.step, "evidence": evidence}
        if stream.nonfinite and not stats.scaled:
            findings.append(
                Finding(
                    f"⚠️  {name}: {stream.nonfinite:,} of {stream.elements:,} gradient elements are not finite "
                    f"at step {stats.step}{_origin(origins, parameters)}{_culprits(stats)}",
                    rule=NONFINITE,
                    severity=Severity.error,
                    rank=ranks[0] if len(ranks) == 1 else None,
                    **common,
                )
            )
        elif not stream.elements:
            findings.append(
                Finding(
                    f"⚠️  {name}: no gradients at step {stats.step}: its parameters are detached from the loss, "
                    "or the gradients were cleared before they were measured",
                    rule=NO_GRADIENT,
                    severity=Severity.warning,
                    **common,
                )
            )
        elif stream.grad_norm == 0 and stream.grad_max == 0 and not stream.nonfinite:
            findings.append(
                Finding(
                    f"⚠️  {name}: every gradient is exactly zero at step {stats.step}: dead activations, "
                    "a fusion weight of zero, or an empty input",
                    rule=ZERO_GRADIENT,
                    severity=Severity.warning,
                    **common,
                )
            )
    if stats.nonfinite_ranks and not any(finding.rule == NONFINITE for finding in findings):
        findings.append(
            Finding(
                f"⚠️  a number sent at step {stats.step} is not finite{_culprits(stats)}",
                rule=NONFINITE,
                severity=Severity.error,
                rank=stats.nonfinite_ranks[0] if len(stats.nonfinite_ranks) == 1 else None,
                step=stats.step,
            )
        )
    return findings


def _origin(ranks: Sequence[LocalNorms], parameters: Sequence[str]) -> str:
    """Whose own gradient is not finite, and in which parameter that is seen first in the backward pass."""
    if not ranks:
        return ""
    whose = ", ".join(str(rank.rank) for rank in ranks)
    first = ranks[0].parameter
    where = f", first in {parameters[first]}" if first is not None and first < len(parameters) else ""
    return f" (in the own gradient of rank {whose}{where})"


def _culprits(stats: StepStats) -> str:
    """Which ranks sent a non-finite loss: the place to look, since averaging spreads a gradient to all ranks."""
    if not stats.nonfinite_ranks:
        return ""
    ranks = ", ".join(str(rank) for rank in stats.nonfinite_ranks)
    return f" (the loss or another number is not finite on rank {ranks})"
