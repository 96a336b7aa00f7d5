"""The monitor: it wires the street together and owns the History, nothing else."""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook, _JoinConfig

from ddp_streammon import keys, noise
from ddp_streammon.collective import Collective
from ddp_streammon.config import MonitorConfig, RuleSet
from ddp_streammon.described import describe
from ddp_streammon.evaluation import (
    ITEMS,
    Evaluation,
    Items,
    Labelled,
    Past,
    Plan,
    Probe,
    ProbeStats,
    Reduce,
    Replacement,
    Request,
    Score,
    Swap,
    activation_moments,
    affordable,
    classification,
    each_alone,
    evaluate,
    measure,
    overfitting_values,
    probe_streams,
)
from ddp_streammon.history import History
from ddp_streammon.measurement import GradientMeter
from ddp_streammon.plan import Measurement
from ddp_streammon.report import Outcome, Report, RunInfo, Sink, in_words, summary_text
from ddp_streammon.rules import evaluated, evidence, guide
from ddp_streammon.rules.engine import Engine, Preflight
from ddp_streammon.rules.finding import Action, Finding, StreamSettings
from ddp_streammon.sinks import ConsoleSink, FanOut, WandbSink, active_wandb_run
from ddp_streammon.stats import Figures, ScalarLike, Total
from ddp_streammon.steps import Steps
from ddp_streammon.streams import StreamLike, StreamSet, unwrap
from ddp_streammon.weights import weight_figures

_log = logging.getLogger("ddp_streammon")

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
Mean = float | tuple[float, float] | None
"""A rank's mean, or its (sum, weight); None: the whole model's, from the evaluation at hand."""


class StreamMonitor(Joinable):
    """Watches every stream of `model` on every rank.

    The three-line face: `monitor = watch(model, optimizer)`, `monitor.step(loss=loss, samples=n)` after backward and
    before clipping, `monitor.evaluate(loader)`. The guide's face: `compute_stream_gradients()` and its like,
    `log_metrics`, `get_recommendations`, `get_summary`, `history[key]`.

    Build it after the model is wrapped (DDP, torch.compile) and on every rank; calls that say "Comm" are made by
    all ranks or by none. Works the same without a process group. It draws no random number and changes neither
    weights nor gradients nor modes.

    `optimizer`: one or several, for learning rates and the GradScaler's stage; by default the model's own `optimizer`,
    if it has one. `streams`: see `StreamSet.resolve`. `sinks` are used on rank 0 only; `name` and `run` (its
    configuration) describe the run to them. `wording` says what a finding's action sets, as the loop's owner would
    write it, wherever findings go; it is to say the same on every rank.

    Sharded models (FSDP2, HSDP, tensor parallel, mixed stream by stream) are measured as they are. `model_peers`: the
    ranks of the group that see the same data as this one, itself included, where the meshes of the parameters do not
    say so (`shards.model_peers`). `group`: the ranks to sum over, by default all; a rank in a finding is its number
    there.

    Building it is three all_gather_object: what each rank holds, what the training is made of and what is declared of
    it (rank 0's counts), and whether the sinks could be opened.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers = None,
        streams: Mapping[str, StreamLike] | None = None,
        *,
        config: MonitorConfig | None = None,
        sinks: Iterable[Sink] = (),
        group: dist.ProcessGroup | None = None,
        name: str | None = None,
        run: Mapping[str, Any] | None = None,
        model_peers: Sequence[int] | None = None,
        wording: Callable[[Action], str] = in_words,
    ) -> None:
        super().__init__()
        self._wording = functools.lru_cache(maxsize=256)(wording)
        self.config = config or MonitorConfig()
        self.model = model
        self._optimizers = _optimizers(model, optimizer)
        self.streams = StreamSet.resolve(model, streams, self._optimizers)
        self.history = History(self.config.history_limit)
        self.epoch: float | None = None
        self._collective = Collective(group)
        self._meter = GradientMeter(
            self.streams,
            model,
            self._collective,
            self._optimizers,
            update_every=self.config.update_every,
            local_gradients=self.config.local_gradients,
            evidence=self.config.rules is RuleSet.evidence,
            every=self.config.every,
            peers=model_peers,
        )
        self._engine = self._make_engine()
        self._noise: deque[dict[str, noise.NoiseStep]] = deque(maxlen=noise.WINDOW)
        self._hooks = [o.register_step_post_hook(lambda *_: self._steps.gradients_are_used()) for o in self._optimizers]
        self._steps = Steps(self.streams, self._meter, self._collective, self.config)
        self._spent = 0.0
        self._noise_told = 0
        self._claimed: dict[str, list[Finding]] = {}
        self._past: dict[str, Past] = {}
        self._pace_of_trials = 0.0
        self._findings: dict[str, Finding] = {}
        self._closed = self._changed = False
        self._sink = FanOut(sinks if self._collective.topology.rank == 0 else ())
        sizes = {s.name: sum(item.parameter.numel() for item in s.parameters) for s in self.streams.streams}
        described = {**(run or {}), "monitor": asdict(self.config), "parameters": sizes}
        described["setup"] = self._engine.setup.to_dict()
        self._open(RunInfo(self.streams.user_names, described, self.inventory(), name))

    def _make_engine(self) -> Engine:
        """The rules over rank 0's view of the training. Comm: one all_gather_object."""
        setup = describe(
            self.streams,
            self.model,
            self._optimizers,
            world=self._collective.topology.world_size,
            data_ranks=self._collective.topology.first_ranks,
            replicated=self._meter.replicated,
            whole=self._meter.whole,
        )
        setup, intent = self._collective.gather((setup, self.config.intent))[0]
        return Engine(
            (*evidence.RULES, *self.config.extra_rules),
            setup,
            intent,
            mute=(*self.config.mute, *evidence.quiet(self.config.rules)),
            thresholds=self.config.thresholds,
            parameters=[item.name for stream in self.streams.streams for item in stream.parameters],
        )

    def _open(self, run: RunInfo) -> None:
        """Open the sinks; what goes wrong on rank 0 is raised on every rank, or the others would wait for it."""
        failure: Exception | None = None
        try:
            self._sink.open(run)
        except Exception as error:
            failure = error
        errors = self._collective.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if errors[0] is not None:
            raise RuntimeError(f"a sink could not be opened on rank 0: {errors[0]}")

    def inventory(self) -> str:
        """The streams with their tensors, parameters, learning rates and dtypes, as a table."""
        return self.streams.inventory(self._optimizers)

    @property
    def calls(self) -> int:
        """How often `step` was called: the step that figures are filed under."""
        return self._steps.calls

    # The three-line face ---------------------------------------------------------------------------------------

    def step(
        self,
        *,
        loss: ScalarLike | None = None,
        samples: float | Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        epoch: float | None = None,
        **scalars: ScalarLike | None,
    ) -> Figures:
        """Measure the gradients of this step: after backward, before clipping, once an optimizer step.

        `loss` is this rank's mean over its `samples`. `present` maps streams to masks [samples], true where the
        stream has data. `scaler` is the GradScaler, if there is one: norms are unscaled. Any other number rides
        along: a float is averaged over samples, a count (int) or a `Total` added up, a pair is (sum, weight).
        Names are fixed at the first call; one that a rank leaves out then counts for nothing in that step.

        Returns the figures of this step (stats.step_keys), empty on steps that `every` leaves out. They enter
        `history` at call n + `delay`.

        Comm: one all_reduce(SUM) on a monitored step; at the first call also an all_gather_object of the names.
        Sync: none but for the sum of call n - `delay`, so that the host runs at most so many steps ahead; reading the
        result waits. Errors: ValueError for what is no number, by name; KeyError for a stream that is not there.
        """
        begun = time.perf_counter()
        Join.notify_join_context(self)
        if epoch is not None:
            self.epoch = epoch
        numbers: dict[str, ScalarLike | None] = {"loss": loss, **scalars}
        numbers["samples"] = None if samples is None else Total(samples)
        for name, mask in (present or {}).items():
            self.streams[name]
            if not isinstance(mask, Tensor):
                raise ValueError(f"present[{name!r}] must be a mask [samples] in a tensor, got {mask!r}")
            numbers[keys.of_stream(name, keys.PRESENT)] = (mask.sum(), float(mask.numel()))
        figures = self._step(numbers, samples, scaler)
        self._spent += time.perf_counter() - begun
        return figures

    def _step(
        self,
        numbers: Mapping[str, ScalarLike | None],
        samples: float | Tensor | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Figures:
        figures = self._steps.take(numbers, samples, scaler, self.epoch, joined=self._join_config.enable)
        self._bring_in(self._steps.due())
        return figures

    def clip_grad_norm_(
        self, max_norm: float, *, per_stream: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Clip the gradients in place like `torch.nn.utils.clip_grad_norm_`, by the norms that `step` has just summed.

        Call it after `step` and before the optimizer's. Where this call of `step` was not measured (`every`), it
        measures by itself. `per_stream`: each stream (and `shared`) is clipped to `max_norm` by its own norm. Under a
        `GradScaler` call `scaler.unscale_(optimizer)` before, as with PyTorch's; a `scaler` given is checked for that.

        Returns the norm before clipping, [] float64, or with `per_stream` one a stream, [S], in the order of
        `streams.names`; inf or nan where a gradient is. Works where streams are laid out differently.
        Comm: none after a measured step, else one all_reduce(SUM). Sync: none on CUDA with NCCL.
        Errors: ValueError for a limit that is not positive, and for gradients that still carry the loss scale.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        if self._meter.is_scaled(scaler):
            raise ValueError(
                "the gradients still carry the loss scale: call scaler.unscale_(optimizer) before clipping"
            )
        if self._join_config.enable:
            return self._meter.clip_alone_(max_norm, per_stream=per_stream)
        return self._meter.clip_(self._steps.fresh(), max_norm, per_stream=per_stream)

    def evaluate(
        self,
        items: Items | Iterable[Any],
        score: Score | None = None,
        *,
        split: str = "val",
        sharded: bool | None = None,
        max_batches: int | None = None,
        train: Items | Iterable[Any] | None = None,
        swap: Swap | None = None,
        reduce: Mapping[str, Reduce] | None = None,
        limit: int | None = ITEMS,
        seconds: float | None = None,
    ) -> Evaluation:
        """Evaluate the whole model over a sharded set of items, and what its head uses of each stream.

        `items`: a DataLoader (re-made over this rank's batches), or any iterable of batches with `sharded` (see
        `evaluation.Items`). `score(model, batch)` gives figures of each item (`evaluation.Score`), by default the loss
        and correctness of a classifier. `full_val_loss` and its like are over all items. Of the first `limit` of a
        fixed choice each stream's input is exchanged with another item's: `<stream>_val_uses` is how much the loss
        rises, in its own unit, by item; `_low` and `_high` bound it with 95 %, `_detectable` is what would be seen with
        80 % power; `<stream>_val_uses_acc` is the fall of accuracy. Encoders run once where nothing but their features
        goes on. `swap` says where a stream's input lies in a batch, for one that is not the input of its own modules.
        `reduce` are figures of all items that are no means (mAP), from the score's `record`s, by name.

        `train`: training items without augmentation. With them also `<stream>_val_ablated` (features at their training
        mean), `full_loss_gap`, `full_acc_gap` and `<stream>_alone_...` (validation against training), `<a>_to_<b>_val
        _cover` and `<stream>_val_shapley` for few streams, and what a closed-form probe finds: `<stream>_knows`
        beyond the majority class, `<stream>_complement`, `full_head_gap` (`evaluation.probe`).

        `seconds` is what trying exchanged inputs may take: from the second evaluation on the items are as many as the
        last one's pace allows. At evaluations 1, 2, 4, 8, ... of a split claims are made (`evaluation.claims`), which
        stand as findings until the next ones.

        Comm: a broadcast of the buffers, an all_gather_object, one all_reduce(SUM), with `train` three times and a few
        more; with sharded parameters also one all_reduce a batch, and one for each replayed call. Sync: blocks.
        Errors: see `evaluation.measure`; ValueError for a place in `swap` that a batch does not have.
        """
        held_out = items if isinstance(items, Items) else Items(items, "items", sharded, max_batches)
        shown = train if train is None or isinstance(train, Items) else Items(train, "train", sharded, max_batches)
        if seconds is not None:
            limit = affordable(limit, seconds, self._pace_of_trials)
        request = Request(split, shown, swap or {}, reduce or {}, limit)
        past = self._past.get(split, Past())
        found = evaluate(self.streams, self._collective, held_out, score or classification(), request, past)
        self._past[split] = found.past
        self._pace_of_trials = found.seconds / max(found.tried, 1)
        if found.look is not None:
            self._claimed[split] = evaluated.findings(found, self.calls)
            self._engine.claim(claim for claims in self._claimed.values() for claim in claims)
        self._record_epoch(found)
        return found

    def probe(self, probe: Probe, train: Labelled, held_out: Labelled) -> ProbeStats:
        """What each stream's features know of the target: a closed-form ridge probe, alone, without it, and of all.

        `train` and `held_out` are this rank's items: features that you took from the encoders, targets, and the model's
        own predictions for the head gap. Intervals are 95 %. See `evaluation.probe_streams`; `evaluation.claims` says
        what may be said of the figures. Comm: one all_gather_object, two all_reduce(SUM). Sync: blocks.
        """
        return probe_streams(probe, self._collective, train, held_out)

    # The guide's face ------------------------------------------------------------------------------------------

    def compute_stream_gradients(self, scaler: torch.amp.GradScaler | None = None) -> Figures:
        """Each stream's (and `shared`'s) gradient now: `X_grad_norm`, `X_grad_max`, `X_params` (tensors with a
        gradient), `X_grad_mean`, `X_grad_share`, and for two streams `stream1_to_stream2_ratio`.

        Norms and their ratios change when a layer is scaled up and the next one down, though the function stays the
        same: see `compute_gradient_power`. Call it between backward and zero_grad. The figures are yours: they enter
        `history` by `log_metrics`. Comm: one all_reduce(SUM). Sync: none until a figure is read.
        """
        if not self._meter.any_gradient():
            warnings.warn(
                "no gradients: no parameter has one, so norms are nan; call this after backward() and before "
                "zero_grad()",
                stacklevel=2,
            )
        return self._steps.gradients(scaler).figures()

    def compute_gradient_power(self, scaler: torch.amp.GradScaler | None = None) -> Figures:
        """Each stream's (and `shared`'s) `X_grad_power` now: |g| |w| summed over tensors, which does not change when a
        layer is scaled up and the next one down, as norms and their ratios do (`power.gradient_power`).

        Call it where `compute_stream_gradients` is called. Comm: one all_reduce(SUM). Sync: none until a figure is
        read.
        """
        return self._meter.power(scaler)

    def compute_stream_weights(self) -> Figures:
        """Each stream's weights now: `X_weight_norm`, `X_weight_mean`, `X_weight_element_mean`, and their ratio.

        Biases are left out; see `weights.weight_figures` for what each mean is over. They change when a layer is scaled
        up and the next one down, though the function stays the same.
        Comm: one all_reduce(SUM). Sync: none until a figure is read.
        """
        return weight_figures(self.streams, self._meter.weight_shares, self._collective, self._meter.device)

    def compute_stream_activations(self, *inputs: Any) -> Figures:
        """Mean and standard deviation of the outputs of each stream's stages for `inputs` (one a stream).

        Runs one forward in eval mode without gradient and leaves no trace.
        Comm: a broadcast of the buffers, one all_reduce(SUM). Sync: blocks.
        """
        values = activation_moments(self.streams, self._collective, inputs)
        return Figures(values, lambda: values)

    def compute_stream_overfitting_indicators(
        self,
        train_loss: Mean,
        val_loss: Mean,
        train_acc: Mean,
        val_acc: Mean,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        max_batches: int | None = None,
        train_loader_no_aug: Iterable[Any] | None = None,
        *,
        score: Score | None = None,
        sharded: bool | None = None,
    ) -> Figures:
        """Each stream alone on training and validation items, the other streams' features replaced by zeros.

        `X_train_acc`, `X_val_acc`, `X_train_loss`, `X_val_loss`, `X_acc_gap` (train - val), `X_loss_gap` (val - train),
        `X_overfitting_score` (their sum), `stream1_vs_stream2_overfit_ratio` (nan unless both scores are positive),
        from three streams on `X_without_val_acc` and its like; the whole model's as `full_...`; and from the four
        numbers passed (this rank's means, or (sum, weight), or None: the evaluated ones) `full_model_loss_gap` and
        `full_model_acc_gap`.

        Features of zero depend on where zero is: a shift of a stream's features that the next bias takes back changes
        these figures. `evaluate(train=...)` has ones that it does not change.

        Every item counts once, whatever the number of ranks; `max_batches` None is all of them. Pass
        `train_loader_no_aug` where `train_loader` augments, or the gap compares two kinds of items.

        Comm: a broadcast of the buffers, an all_gather_object, one all_reduce(SUM); with sharded parameters also one
        all_reduce a batch, and one for each replayed call. Sync: blocks.
        """
        train = train_loader if train_loader_no_aug is None else train_loader_no_aug
        name = "train_loader" if train_loader_no_aug is None else "train_loader_no_aug"
        splits = {
            "train": Items(train, name, sharded, max_batches),
            "val": Items(val_loader, "val_loader", sharded, max_batches),
        }
        numbers = {
            keys.TRAIN_LOSS: train_loss,
            keys.VAL_LOSS: val_loss,
            keys.TRAIN_ACC: train_acc,
            keys.VAL_ACC: val_acc,
        }
        pairs = {
            key: number if isinstance(number, tuple) else (float(number), 1.0)
            for key, number in numbers.items()
            if number is not None
        }
        plan = Plan(each_alone(self.streams.user_names, Replacement.zero))
        result = measure(self.streams, self._collective, splits, score or classification(), plan, scalars=pairs)
        values = overfitting_values(result, self.streams.user_names)
        return Figures(values, lambda: values)

    def log_metrics(self, epoch: float, metrics: Mapping[str, float]) -> None:
        """Remember `metrics` as those of `epoch`, and report them with the recommendations of the moment.

        Comm: none, so the numbers should be the same on every rank (those of the methods above are).
        Errors: ValueError for a value that is no number, before anything is remembered.
        """
        values = {}
        for key, value in metrics.items():
            try:
                values[key] = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"metric {key!r} must be a number, got {value!r}") from None
        self.epoch = epoch
        self.history.append(self.calls, epoch, {keys.EPOCH: float(epoch)})
        self._record_epoch(values)

    def get_recommendations(self) -> list[Finding]:
        """What stands now, as sentences with fields (`finding.rule`, `.severity`, `.stream`, `.evidence`, `.action`).

        The rules' findings and an evaluation's claims from raised to cleared, reasons before consequences; of the
        evidence rules, where there is none, how many looked and which could not; then the guide's own sentences.
        Equal on every rank. Comm: none."""
        findings = self._engine.findings
        if self.config.rules is RuleSet.evidence:
            findings = findings or [self._engine.nothing_found()]
        elif self.config.rules is RuleSet.guide:
            names, severity = self.streams.user_names, self.config.rule_severity
            findings += guide.recommend(self.history, names, self._settings(), severity=severity)
        return self._worded(findings)

    def preflight(self) -> Preflight:
        """What does not train, after the first steps (50, say): frozen, absent from the optimizer, at learning rate 0,
        without gradients, not synchronised, fed the same data, lost to rounding, in eval mode; and which rules could
        not be evaluated, and why. Print it. Comm: none. Sync: waits for what is under way.

        Errors: ValueError with another rule set than `evidence`.
        """
        if self.config.rules is not RuleSet.evidence:
            raise ValueError(f"a preflight needs rules=evidence, the monitor has rules={self.config.rules.value}")
        self.flush()
        return self._engine.preflight()

    def declare_frozen(self, streams: Iterable[str]) -> None:
        """From now on these streams, and no others, are frozen on purpose beside those of the configuration's intent.

        To be called alike on every rank. Errors: KeyError for a stream that is not there. Comm: none."""
        names = [self.streams[name].name for name in streams]
        self._engine.declare_frozen(names)

    def noise_scale(self) -> dict[str, noise.NoiseScale]:
        """Each stream's gradient noise scale in samples, over the last `noise.WINDOW` measured steps that arrived: from
        `local_gradients` and the `samples` given to `step`. Opt-in; no rule reads it. Not determined where ranks see
        the same data (tensor parallel), since each holds a part of its data's gradient. Comm: none."""
        if self._collective.topology.model_peers > 1:
            why = "some ranks see the same data on purpose: none of them holds the whole gradient of its data"
            return dict.fromkeys(self.streams.names, noise.undetermined(why))
        steps = self._noise
        return {name: noise.noise_scale([of[name] for of in steps if name in of]) for name in self.streams.names}

    def get_summary(self) -> str:
        """A text table of the gradient norms, weight norms and overfitting scores logged so far. Comm: none."""
        return summary_text(self.history, self.streams.user_names)

    # State and end ---------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Bring every measured step into `history`. Comm: none. Sync: waits for what is under way."""
        self._bring_in(self._steps.rest())

    def state_dict(self) -> dict[str, Any]:
        """History, counters, findings and which replicas are equal, as plain values (torch.load reads them with
        `weights_only`); equal on every rank. Waits for what is under way."""
        self.flush()
        return {
            "calls": self.calls,
            "epoch": self.epoch,
            "history": self.history.state_dict(),
            "findings": {key: finding.to_dict() for key, finding in self._findings.items()},
            "replicas": self._meter.proof(),
            "claimed": {split: [finding.to_dict() for finding in own] for split, own in self._claimed.items()},
            "evaluations": {split: asdict(past) for split, past in self._past.items()},
            "rules": self._engine.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, with any number of ranks."""
        self.flush()
        self._steps.go_on_from(state["calls"])
        self.epoch = state["epoch"]
        self._meter.trust(state["replicas"])
        self.history.load_state_dict(state["history"])
        if state.get("rules") is not None:
            self._engine.load_state_dict(state["rules"])
        self._findings = {key: Finding.from_dict(finding) for key, finding in state["findings"].items()}
        self._claimed = {split: [Finding.from_dict(one) for one in own] for split, own in state["claimed"].items()}
        self._past = {split: Past(**past) for split, past in state["evaluations"].items()}

    def close(self, exit_code: int = 0) -> None:
        """Bring in what is under way, tell the sinks how it ended, and close them. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._bring_in(self._steps.rest_that_arrives() if exit_code else self._steps.rest())
        except Exception as error:  # another rank is gone: what arrived is still reported
            _log.warning("the last steps could not be collected (%s: %s)", type(error).__name__, error)
        self._meter.stop()
        for hook in self._hooks:
            hook.remove()
        summary = {key: self.history.latest(key) for key in self.history}
        self._sink.close(Outcome(summary, tuple(self._findings.values()), self.get_summary(), exit_code))

    def __enter__(self) -> StreamMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    # torch's Join: a rank that ran out of data shadows the others' collectives -----------------------------------

    def join_hook(self, **_: Any) -> JoinHook:
        """For `Join([ddp_model, monitor])`: sends an empty packet for each step of the ranks still training."""
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """The model's device."""
        return self._meter.device

    @property
    def join_process_group(self) -> Any:
        """The group over which figures are summed."""
        return self._collective.group or dist.group.WORLD

    # Wiring ----------------------------------------------------------------------------------------------------

    def _bring_in(self, measurements: Iterable[Measurement]) -> None:
        for measured in measurements:
            self._arrive(measured)

    def _arrive(self, pending: Measurement) -> None:
        """A measured step enters History and the sinks."""
        step = pending.read()
        if pending.audit:
            self._warn_of_changes()
        if pending.shadow:
            self.epoch = step.epoch
        self._noise.append(noise.steps_of(step))
        values = step.values()
        self.history.append(step.step, step.epoch, values)
        standing = self._worded(self._engine.take(step))
        self._remember(standing)
        spent, self._spent = self._spent, 0.0
        self._sink.write(Report("step", step.step, step.epoch, values, tuple(standing), step, spent))

    def _worded(self, findings: Iterable[Finding]) -> list[Finding]:
        return [finding.worded(self._wording) for finding in findings]

    def _warn_of_changes(self) -> None:
        """Say once that the model has other parameters than it had."""
        if self._changed or self._meter.shards_parameters:  # FSDP2 puts others in their place for a forward
            return
        new, gone = self.streams.changes()
        self._changed = bool(new or gone)
        if self._changed:
            warnings.warn(
                "the model's parameters are not those that it had when the monitor was built, which go on being "
                f"watched: new {_few(new)}, gone {_few(gone)}. Close this monitor and build another one after such a "
                "change; its load_state_dict takes over this one's state_dict",
                stacklevel=4,
            )

    def _record_epoch(self, values: Mapping[str, float]) -> None:
        self._warn_of_changes()
        self.flush()
        values = {**values, **self._noise_figures()}
        self.history.append(self.calls, self.epoch, values)
        findings = self.get_recommendations()
        self._remember(findings)
        self._sink.write(Report("epoch", self.calls, self.epoch, values, tuple(findings)))

    def _noise_figures(self) -> dict[str, float]:
        """The noise scales that are determined, once for the same steps."""
        if not self.config.local_gradients or self._noise_told == self.calls:
            return {}
        self._noise_told = self.calls
        values: dict[str, float] = {}
        for name, scale in self.noise_scale().items():
            if scale.determined:
                key = keys.of_stream(name, keys.NOISE_SCALE)
                bounds = {keys.bound(key, keys.LOW): scale.low, keys.bound(key, keys.HIGH): scale.high}
                values |= {key: scale.value, **bounds}
        return values

    def _remember(self, findings: Iterable[Finding]) -> None:
        """Keep the latest finding of each rule, stream and rank for the outcome."""
        for finding in findings:
            self._findings[f"{finding.rule}/{finding.stream}/{finding.rank}"] = finding

    def _settings(self) -> dict[str, StreamSettings]:
        """Each stream's learning rate and weight decay, from the first group that holds any of its tensors.

        Where a scheduler is at work the rate is the base rate, which is what a user sets; 0 stays 0 (frozen).
        """
        settings = {}
        for stream in self.streams.streams:
            wanted = {id(item.parameter) for item in stream.parameters}
            for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
                if any(id(parameter) in wanted for parameter in group["params"]):
                    lr = float(group.get("lr", math.nan))
                    base = float(group.get("initial_lr", lr)) if lr else 0.0
                    settings[stream.name] = StreamSettings(base, float(group.get("weight_decay", math.nan)))
                    break
        return settings

    def _shadow_step(self) -> None:
        """What a step of a rank without data looks like to the others."""
        self._steps.shadow()
        self._bring_in(self._steps.due())


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])]) or "none"


def _optimizers(model: nn.Module, given: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers given, or the one that the model holds as its `optimizer`, as the guide's compiled models do."""
    if given is None:
        found = getattr(unwrap(model), "optimizer", None)
        return (found,) if isinstance(found, torch.optim.Optimizer) else ()
    several = tuple(given) if isinstance(given, Sequence) else (given,)
    for one in several:
        if not hasattr(one, "param_groups"):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, or several of them, got {_kind(one)}")
    return several


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


class _Shadow(JoinHook):
    def __init__(self, monitor: StreamMonitor) -> None:
        self._monitor = monitor

    def main_hook(self) -> None:
        self._monitor._shadow_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks are done: what is under way arrives on all of them, before a rank knows of another epoch."""
        self._monitor.flush()
        # Join leaves its mark on a Joinable for ever (torch/distributed/algorithms/join.py); the next steps are whole.
        self._monitor._join_config = _JoinConfig.construct_disabled_join_config()  # type: ignore[no-untyped-call]


def watch(
    model: nn.Module,
    optimizer: Optimizers = None,
    streams: Mapping[str, StreamLike] | None = None,
    *,
    config: MonitorConfig | None = None,
    sinks: Iterable[Sink] | None = None,
    group: dist.ProcessGroup | None = None,
    name: str | None = None,
    run: Mapping[str, Any] | None = None,
    model_peers: Sequence[int] | None = None,
    wording: Callable[[Action], str] = in_words,
) -> StreamMonitor:
    """A `StreamMonitor`, whose streams are printed on rank 0.

    Unless `sinks` are given, warnings and errors are printed when they are raised, and an active W&B run is logged
    into.
    """
    if sinks is None:
        sinks = [ConsoleSink(alarms_only=True), *([WandbSink()] if active_wandb_run() is not None else [])]
    monitor = StreamMonitor(
        *(model, optimizer, streams),
        config=config,
        sinks=sinks,
        group=group,
        name=name,
        run=run,
        model_peers=model_peers,
        wording=wording,
    )
    if monitor._collective.topology.rank == 0:
        print(monitor.inventory(), flush=True)
    return monitor
