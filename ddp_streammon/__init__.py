"""Diagnostics for training multi-stream networks on many ranks.

import ddp_streammon as streammon

monitor = streammon.watch(model, optimizer)          # after wrapping the model
loss.backward(); monitor.step(loss=loss, samples=n)  # before clipping and optimizer.step()
monitor.evaluate(val_loader)                         # optional
"""

from ddp_streammon.config import Intent, MonitorConfig, RuleSet, Severity
from ddp_streammon.evaluation import EvalStats, Items, Score, classification
from ddp_streammon.history import History
from ddp_streammon.monitor import StreamMonitor, watch
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.stats import Figures, StepStats, Total
from ddp_streammon.streams import StreamSet, StreamSpec
from ddp_streammon.version import __version__

__all__ = [
    "Action",
    "EvalStats",
    "Figures",
    "Finding",
    "History",
    "Intent",
    "Items",
    "MonitorConfig",
    "RuleSet",
    "Score",
    "Severity",
    "StepStats",
    "StreamMonitor",
    "StreamSet",
    "StreamSpec",
    "Total",
    "__version__",
    "classification",
    "watch",
]
