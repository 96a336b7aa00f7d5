"""The multi-stream classifier: one encoder a stream, a fusion, dropout, one linear head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import (
    ITEMS,
    MOST_COALITIONS,
    Items,
    Plan,
    Replacement,
    Table,
    each_alone,
    exchanges,
    measure,
    uses,
)
from ddp_streammon.evaluation.scores import classified, split_batch
from ddp_streammon.keys import FULL, SHARED
from ddp_streammon.shards import model_peers
from ddp_streammon.stats import ratio
from ddp_streammon.streams import StreamSet
from ddp_streammon.train.models.fusion import make_fusion
from ddp_streammon.train.optim import (
    Schedule,
    StreamOptim,
    StreamSchedulers,
    build_optimizer,
    stream_param_groups,
)

LOSSES: dict[str, type[nn.Module]] = {"cross_entropy": nn.CrossEntropyLoss}
SEED_LABELS = {"color": "stream1", "brightness": "stream2"}
"""What `analyze_pathways` also calls the default streams, as the StreamMonitor guide does."""
_SPLIT = "items"


class MultiStreamModel(nn.Module):
    """encoders -> modality dropout (training only) -> fusion -> dropout -> fc.

    `encoders` maps the user's stream names, in the order of forward's arguments, to modules that give [B,
    features]; their parameters are named `encoders.<stream>.*`. `dropout_p` acts on the fused features.
    `modality_dropout` is a probability, or one per stream name (others 0): while training, a stream's
    features are zeroed per sample with that probability and the kept ones are not rescaled; a sample that
    would lose every stream keeps one, chosen uniformly.

    `criterion` is the loss; `optimizer` and `scheduler` are None until `compile` sets them.
    """

    criterion: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: StreamSchedulers | None

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        features: int,
        num_classes: int,
        fusion_type: str = "concat",
        dropout_p: float = 0.0,
        modality_dropout: float | Mapping[str, float] = 0.0,
    ) -> None:
        super().__init__()
        check_stream_names(encoders)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = make_fusion(fusion_type, len(encoders), features)
        self.dropout = nn.Dropout(dropout_p)
        self.fc = nn.Linear(len(encoders) * features, num_classes)
        self.modality_dropout = _per_stream(modality_dropout, tuple(encoders))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = None
        self.scheduler = None

    @property
    def stream_names(self) -> tuple[str, ...]:
        """Names of the streams, in the order of forward's arguments."""
        return tuple(self.encoders.keys())  # PyTorch 2.6 compiles around a ModuleDict that is iterated itself

    @property
    def device(self) -> torch.device:
        """Device of the parameters (of the first, where they differ)."""
        return next(self.parameters()).device

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor [B, ...] per stream, in the order of `stream_names`; returns S tensors [B, F]."""
        return tuple(encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True))

    def head(self, *features: Tensor) -> Tensor:
        """S tensors [B, F]; returns logits [B, num_classes]."""
        logits: Tensor = self.fc(self.dropout(self.fusion(*features)))
        return logits

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """One tensor [B, ...] per stream, by position or by stream name; returns logits [B, num_classes].

        Raises TypeError when the number of tensors or their names are not those of `stream_names`.
        """
        features = self.encode(*self._ordered(inputs, named))
        if self.training and any(self.modality_dropout):
            features = drop_streams(features, self.modality_dropout)
        return self.head(*features)

    def analyze_pathways(
        self, loader: Iterable[Any], num_samples: int | None = None, *, sharded: bool | None = None
    ) -> dict[str, Any]:
        """What each stream contributes to the predictions, over the loader's items (`num_samples`: so many of them).

        `accuracy` and `loss` of `full_model` and of `<stream>_only` (the others' features zero, through fusion and
        head); in `accuracy` also `<stream>_contribution` = only / full (nan where full is 0). `feature_norms`: mean
        and standard deviation (`<stream>_mean`, `<stream>_std`) of the items' L2 norms of the encoder's features,
        and the ratio of two means (`<a>_to_<b>_ratio`). `samples_analyzed`. The default streams stream1 and stream2
        are there as color and brightness too.

        Zeros are what the guide replaces features by: a shift of a stream's features that the head's bias takes back
        changes the figures above. It does not change `shapley`, for two or three streams and at most 512 items: how
        much of the `accuracy`, and of what the `loss` falls, each stream brings, over the orders in which streams could
        join, those that have not yet in exchange with another item's (`evaluation.shapley`, exact).

        Under a process group all ranks must call it; the items are shared out, see `evaluation.Items`. The model is
        left as it was. Comm: an all_gather_object, and twice a broadcast of the buffers, an all_gather_object and one
        all_reduce(SUM). Sync: blocks.
        """
        streams = StreamSet.resolve(self, dict(self.encoders.items()))
        items = Items(loader, "loader", sharded, max_items=num_samples)
        collective = Collective()
        collective.share_data(collective.gather(model_peers(streams, self) or (collective.topology.rank,)))
        zeroed = Plan(each_alone(self.stream_names, Replacement.zero))
        result = measure(streams, collective, {_SPLIT: items}, _pathway_score, zeroed)
        labels = [{name: name for name in self.stream_names}]
        if self.stream_names == tuple(SEED_LABELS.values()):
            labels.append(SEED_LABELS)
        found = _pathways(result.means(_SPLIT), len(result.tables[_SPLIT]), labels)
        if not 1 < len(self.stream_names) <= MOST_COALITIONS:
            return found
        exchanged = Plan(exchanges(self.stream_names, full=True))
        tried = measure(streams, collective, {_SPLIT: items.first(ITEMS)}, _pathway_score, exchanged)
        return found | {keys.SHAPLEY: _shares(tried.tables[_SPLIT], labels)}

    def _ordered(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        names = self.stream_names
        if inputs and named:
            raise TypeError(
                f"inputs are given by position or by name, got {len(inputs)} by position and by name {', '.join(named)}"
            )
        if named:
            if set(named) != set(names):
                raise TypeError(f"inputs by name must be exactly {', '.join(names)}, got {', '.join(named)}")
            return tuple(named[name] for name in names)
        if len(inputs) != len(names):
            raise TypeError(f"the model has {len(names)} streams ({', '.join(names)}), got {len(inputs)} inputs")
        return inputs

    def compile(  # type: ignore[override]
        self,
        optimizer: str = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        loss: str | nn.Module = "cross_entropy",
        scheduler: str | Schedule | None = None,
        **stream_settings: float,
    ) -> MultiStreamModel:
        """Set `criterion`, `optimizer` (one parameter group a stream and one for `shared`) and `scheduler`.

        `optimizer` is adamw, adam or sgd (momentum 0.9); `scheduler` is None, cosine, step or plateau with
        the defaults of `Schedule`, or a `Schedule`. Per stream (or `shared`): `<stream>_lr`,
        `<stream>_weight_decay`, for example `stream1_lr=1e-4` or `depth_weight_decay=0.05`; what is not given
        falls back to `learning_rate` and `weight_decay`. Call it after moving the model to its device.
        Returns the model.

        This replaces `nn.Module.compile`; to compile the model's code, use `torch.compile(model)`.

        Raises TypeError for an unknown keyword, ValueError for an unknown name or a negative figure.
        """
        streams = _stream_optims(stream_settings, (*self.stream_names, SHARED))
        groups = stream_param_groups(self, learning_rate, weight_decay, streams)
        criterion = _loss(loss)
        built = build_optimizer(optimizer, groups)
        schedule = Schedule(scheduler) if isinstance(scheduler, str) else scheduler
        self.criterion = criterion
        self.optimizer = built
        self.scheduler = None if schedule is None else StreamSchedulers(built, schedule)
        return self


def _pathway_score(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    """Loss, correctness, and of each stream's features the L2 norm and its square, per item."""
    assert isinstance(model, MultiStreamModel)
    inputs, named, target = split_batch(batch)
    fused: list[tuple[Tensor, ...]] = []
    handle = model.fusion.register_forward_pre_hook(lambda _, features: fused.append(features))
    try:  # the model's own call: sharded parameters are whole inside of it only
        figures = classified(model, model(*inputs, **named), target)
    finally:
        handle.remove()
    for name, feature in zip(model.stream_names, fused[0], strict=True):
        norm = feature.double().flatten(1).norm(dim=1)
        figures |= {keys.of_stream(name, keys.FEATURE_NORM): norm, _square_of(name): norm.square()}
    return figures


def _square_of(stream: str) -> str:
    return keys.of_stream(stream, f"{keys.FEATURE_NORM}_square")


def _pathways(
    figures: Mapping[str, Mapping[str, float]], count: int, labels: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """The figures of each variant as `analyze_pathways` gives them; `labels`: what a stream is called -> the stream."""
    full = figures[keys.FULL]
    accuracy, loss = {keys.FULL_MODEL: full["correct"]}, {keys.FULL_MODEL: full["loss"]}
    norms: dict[str, float] = {}
    for called in labels:
        means = {label: full[keys.of_stream(name, keys.FEATURE_NORM)] for label, name in called.items()}
        for label, name in called.items():
            accuracy[keys.of_stream(label, keys.ONLY)] = figures[name]["correct"]
            accuracy[keys.of_stream(label, keys.CONTRIBUTION)] = ratio(figures[name]["correct"], full["correct"])
            loss[keys.of_stream(label, keys.ONLY)] = figures[name]["loss"]
            variance = max(full[_square_of(name)] - means[label] ** 2, 0.0)
            norms[keys.of_stream(label, "mean")] = means[label]
            norms[keys.of_stream(label, "std")] = math.sqrt(variance * count / (count - 1)) if count > 1 else math.nan
        for a, b in keys.pairs(called):
            norms[keys.feature_ratio(a, b)] = ratio(means[a], means[b])
    return {"accuracy": accuracy, "loss": loss, "feature_norms": norms, "samples_analyzed": count}


def _shares(table: Table, labels: Sequence[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Each stream's part of what the model achieves, by figure."""
    own = uses(table, list(labels[0].values()), _SPLIT)
    return {
        what: {
            label: own[keys.of_stream(name, f"{_SPLIT}_{keys.SHAPLEY}{suffix}")].value
            for called in labels
            for label, name in called.items()
        }
        for what, suffix in (("accuracy", "_acc"), ("loss", ""))
    }


def check_stream_names(names: Mapping[str, object]) -> None:
    """Raise ValueError unless the names can be keyword arguments and parts of a parameter's name."""
    if not names:
        raise ValueError("streams must name at least one stream, got none")
    empty = nn.ModuleDict()
    for name in names:
        if not name.isidentifier() or name in (SHARED, FULL) or hasattr(empty, name):
            raise ValueError(
                f"a stream's name must be a Python identifier, none of {SHARED}, {FULL} and the attributes "
                f"of nn.ModuleDict (such as keys or type), got {name!r}"
            )


def drop_streams(features: Sequence[Tensor], probabilities: Sequence[float]) -> tuple[Tensor, ...]:
    """Zero each stream's features [B, F] per sample with its probability; at least one stream of a sample
    stays.

    Draws from torch's global generator of the features' device. No host synchronisation.
    """
    first = features[0]
    batch, device = first.shape[0], first.device
    keep = torch.stack([torch.rand(batch, device=device) >= p for p in probabilities], dim=1)
    rescued = torch.randint(len(features), (batch, 1), device=device) == torch.arange(len(features), device=device)
    keep = keep | (rescued & ~keep.any(dim=1, keepdim=True))
    return tuple(f.masked_fill(~keep[:, i : i + 1], 0.0) for i, f in enumerate(features))


def _per_stream(value: float | Mapping[str, float], names: tuple[str, ...]) -> tuple[float, ...]:
    """One probability per stream name, from one for all or a mapping."""
    given = value if isinstance(value, Mapping) else dict.fromkeys(names, value)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"modality_dropout names {', '.join(unknown)}, the streams are {', '.join(names)}")
    for name, p in given.items():
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"modality_dropout must be in [0, 1], got {p} for {name}")
    return tuple(float(given.get(name, 0.0)) for name in names)


def _stream_optims(settings: Mapping[str, float], names: Sequence[str]) -> dict[str, StreamOptim]:
    """`<name>_lr` and `<name>_weight_decay` keywords -> settings per stream."""
    valid = {f"{name}_{key}": (name, key) for name in names for key in ("lr", "weight_decay")}
    unknown = [keyword for keyword in settings if keyword not in valid]
    if unknown:
        raise TypeError(
            f"compile got unknown keywords {', '.join(unknown)}; per stream it takes {', '.join(valid)} "
            "(to compile the model's code use torch.compile(model))"
        )
    fields: dict[str, dict[str, float]] = {}
    for keyword, value in settings.items():
        name, key = valid[keyword]
        fields.setdefault(name, {})[key] = value
    return {name: StreamOptim(**given) for name, given in fields.items()}


def _loss(loss: str | nn.Module) -> nn.Module:
    if isinstance(loss, nn.Module):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be an nn.Module or one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss]()
