"""Figures over held-out items: sharded, exact, and without a trace in the training; and what may be said of them."""

from ddp_streammon.evaluation.activations import activation_moments
from ddp_streammon.evaluation.claims import Claim, Evidence, Figure, Statement, claims, look_of, margin
from ddp_streammon.evaluation.intervals import (
    Estimate,
    difference,
    mean_sums,
    paired_bootstrap,
    paired_proportions,
    ratio,
    ratio_sums,
    samples_for,
    wilson,
)
from ddp_streammon.evaluation.items import Items
from ddp_streammon.evaluation.measure import EvalStats, measure
from ddp_streammon.evaluation.probe import Known, Labelled, Probe, ProbeStats, probe_streams
from ddp_streammon.evaluation.scores import Score, classification
from ddp_streammon.evaluation.shapley import redundancy, shapley
from ddp_streammon.evaluation.values import overfitting_values, split_values

__all__ = [
    "Claim",
    "Estimate",
    "EvalStats",
    "Evidence",
    "Figure",
    "Items",
    "Known",
    "Labelled",
    "Probe",
    "ProbeStats",
    "Score",
    "Statement",
    "activation_moments",
    "claims",
    "classification",
    "difference",
    "look_of",
    "margin",
    "mean_sums",
    "measure",
    "overfitting_values",
    "paired_bootstrap",
    "paired_proportions",
    "probe_streams",
    "ratio",
    "ratio_sums",
    "redundancy",
    "samples_for",
    "shapley",
    "split_values",
    "wilson",
]
