"""Where reports go. A fan-out of sinks is a sink, and so is a guarded one."""

from ddp_streammon.sinks.console import ConsoleSink
from ddp_streammon.sinks.guard import FanOut, Guarded
from ddp_streammon.sinks.html import HtmlSink
from ddp_streammon.sinks.jsonl import JsonlSink, read_jsonl
from ddp_streammon.sinks.live import LiveSink, terminal_sink
from ddp_streammon.sinks.memory import MemorySink
from ddp_streammon.sinks.wandb import WandbSink, active_wandb_run

__all__ = [
    "ConsoleSink",
    "FanOut",
    "Guarded",
    "HtmlSink",
    "JsonlSink",
    "LiveSink",
    "MemorySink",
    "WandbSink",
    "active_wandb_run",
    "read_jsonl",
    "terminal_sink",
]
