"""Figures over held-out items: sharded, exact, and without a trace in the training."""

from ddp_streammon.evaluation.activations import activation_moments
from ddp_streammon.evaluation.items import Items
from ddp_streammon.evaluation.measure import EvalStats, measure
from ddp_streammon.evaluation.scores import Score, classification
from ddp_streammon.evaluation.values import overfitting_values, split_values

__all__ = [
    "EvalStats",
    "Items",
    "Score",
    "activation_moments",
    "classification",
    "measure",
    "overfitting_values",
    "split_values",
]
