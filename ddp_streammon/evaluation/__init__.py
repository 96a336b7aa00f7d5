"""Figures over held-out items: sharded, exact, and without a trace in the training; and what may be said of them."""

from ddp_streammon.evaluation.ablate import Replacement, each_alone
from ddp_streammon.evaluation.activations import activation_moments
from ddp_streammon.evaluation.claims import Claim, Evidence, Figure, Statement, claims, look_of, margin
from ddp_streammon.evaluation.evaluate import ITEMS, Evaluation, Request, affordable, evaluate
from ddp_streammon.evaluation.evidence import Past
from ddp_streammon.evaluation.exchange import Swap
from ddp_streammon.evaluation.intervals import (
    Estimate,
    bounds,
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
from ddp_streammon.evaluation.measure import EvalStats, Plan, measure
from ddp_streammon.evaluation.probe import Known, Labelled, Probe, ProbeStats, probe_streams
from ddp_streammon.evaluation.readings import LOSS, MOST_COALITIONS, TRAIN, Reduce, exchanges, uses
from ddp_streammon.evaluation.scores import Score, classification
from ddp_streammon.evaluation.shapley import redundancy, shapley
from ddp_streammon.evaluation.table import Table
from ddp_streammon.evaluation.values import overfitting_values

__all__ = [
    "ITEMS",
    "LOSS",
    "MOST_COALITIONS",
    "TRAIN",
    "Claim",
    "Estimate",
    "EvalStats",
    "Evaluation",
    "Evidence",
    "Figure",
    "Items",
    "Known",
    "Labelled",
    "Past",
    "Plan",
    "Probe",
    "ProbeStats",
    "Reduce",
    "Replacement",
    "Request",
    "Score",
    "Statement",
    "Swap",
    "Table",
    "activation_moments",
    "affordable",
    "bounds",
    "claims",
    "classification",
    "difference",
    "each_alone",
    "evaluate",
    "exchanges",
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
    "uses",
    "wilson",
]
