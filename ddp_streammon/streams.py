"""Which parameter and which module belongs to which stream. Resolved once; parameters are held as objects."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ddp_streammon import keys

Path: TypeAlias = tuple[str, ...]
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NUMBERED = re.compile(r"(?:^|[._])(stream\d+)(?=$|[._])")
_CHILD_SHARE = 0.01
"""Top-level children below this share of the parameters are no streams (design: "more than 1 %")."""


@dataclass(frozen=True)
class StreamSpec:
    """What a user says of one stream: what its parameters are called, its modules, or only its inputs.

    `patterns`: components of the dotted parameter path, in order and at any depth (`vision.lora` fits
    `model.vision.3.lora.A`); `*` and `?` are wildcards inside a component. `inputs` names what the stream reads
    of a batch; a stream with inputs alone (a shared encoder) has no parameters of its own.
    """

    patterns: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    inputs: tuple[str, ...] = ()


StreamLike: TypeAlias = "str | nn.Module | StreamSpec | Sequence[str | nn.Module]"


@dataclass(frozen=True)
class NamedParameter:
    """A parameter, and its name without the prefixes of wrappers."""

    name: str
    parameter: nn.Parameter


@dataclass(frozen=True)
class Stream:
    """One stream, resolved. `roots` are its largest callable modules, by path; empty if it has none."""

    name: str
    parameters: tuple[NamedParameter, ...]
    roots: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Claim:
    """A stream wants a parameter: `strength` is the length of the path that says so."""

    stream: str
    strength: int


_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch.compile and torch's checkpoint wrapper keep what they wrap."""


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside DDP, DataParallel, torch.compile and activation-checkpoint wrappers."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
            continue
        inner = next((module._modules[name] for name in _TRANSPARENT if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def walk(module: nn.Module, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """Every module with its path, wrappers taken as one with what they wrap; one that is used twice comes twice."""
    yield path, module
    for name, child in unwrap(module)._modules.items():
        if child is not None:
            yield from walk(child, (*path, name))


def _named_parameters(model: nn.Module) -> Iterator[tuple[Path, nn.Parameter]]:
    for path, module in walk(model):
        for name, parameter in unwrap(module)._parameters.items():
            if parameter is not None:
                yield (*path, name), parameter


def _fits(pattern: Path, path: Path) -> bool:
    """Whether the pattern's components occur in the path in this order."""
    remaining = iter(path)
    return all(any(fnmatch.fnmatchcase(component, part) for component in remaining) for part in pattern)


class StreamSet:
    """The streams of a model: the user's, in their order, then `shared` for what no stream claims.

    Build it with `StreamSet.resolve`. `model` is the unwrapped model.
    """

    def __init__(self, model: nn.Module, streams: Sequence[Stream]) -> None:
        self.model = model
        self.streams = tuple(streams)

    @property
    def names(self) -> tuple[str, ...]:
        """All streams, `shared` last where it exists."""
        return tuple(stream.name for stream in self.streams)

    @property
    def user_names(self) -> tuple[str, ...]:
        """The streams without `shared`."""
        return tuple(name for name in self.names if name != keys.SHARED)

    def __getitem__(self, name: str) -> Stream:
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise KeyError(f"no stream {name!r}; streams: {', '.join(self.names)}")

    @classmethod
    def resolve(
        cls,
        model: nn.Module,
        streams: Mapping[str, StreamLike] | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> StreamSet:
        """Find the streams of `model`.

        `streams` maps the user's names to patterns, modules or a `StreamSpec`. None means, the first that there
        is: the `stream` entry of the optimizers' parameter groups; the model's own `stream_names`; names like
        `stream1` found in the parameter names; the top-level children with more than 1 % of the parameters.

        Errors: ValueError for a pattern that matches nothing, a module that is not in the model, a stream
        without parameters, two streams with equal claims to a parameter, names that keys cannot carry, FSDP1, and
        parameters without a shape yet.
        """
        if not isinstance(streams, Mapping | None):
            raise ValueError(f"streams must map names to patterns or modules, e.g. {{'rgb': 'rgb'}}, got {streams!r}")
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters mix streams: not "
                "supported; wrap it in DistributedDataParallel"
            )
        aliases: dict[nn.Parameter, list[Path]] = {}
        for path, parameter in _named_parameters(model):
            aliases.setdefault(parameter, []).append(path)
        if not aliases:
            raise ValueError(f"the model ({type(model).__name__}) has no parameters: there is nothing to monitor")
        lazy = [_dotted(paths[0]) for parameter, paths in aliases.items() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"{lazy[0]} has no shape yet (a lazy module): run one batch through the model, then build the monitor"
            )
        if streams is not None:
            claims, names, inputs = _claims_of_specs(model, aliases, streams)
        else:
            claims, names = _claims_found(model, aliases, optimizers)
            inputs = {}
        owner = {parameter: _winner(claims.get(parameter, []), aliases[parameter]) for parameter in aliases}
        return cls(unwrap(model), tuple(_build(model, aliases, owner, names, inputs)))

    def changes(self) -> tuple[list[str], list[str]]:
        """The names of the parameters that the model has now and had not when it was resolved; and of those it had."""
        known = {item.parameter: item.name for stream in self.streams for item in stream.parameters}
        present = {parameter: path for path, parameter in _named_parameters(self.model)}
        new = [_dotted(path) for parameter, path in present.items() if parameter not in known]
        return new, [name for parameter, name in known.items() if parameter not in present]

    def inventory(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> str:
        """A table: stream, tensors, parameters, of which trainable, learning rate, weight decay, dtype."""
        rows = [("stream", "tensors", "parameters", "trainable", "lr", "weight decay", "dtype")]
        for stream in self.streams:
            parameters = [item.parameter for item in stream.parameters]
            groups = [g for o in optimizers for g in o.param_groups if _holds(g, parameters)]
            rows.append(
                (
                    stream.name,
                    str(len(parameters)),
                    f"{sum(p.numel() for p in parameters):,}",
                    f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
                    _values(group.get("lr") for group in groups),
                    _values(group.get("weight_decay") for group in groups),
                    _values(str(p.dtype).removeprefix("torch.") for p in parameters),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _holds(group: Mapping[str, object], parameters: Sequence[nn.Parameter]) -> bool:
    wanted = {id(parameter) for parameter in parameters}
    members = group["params"]
    assert isinstance(members, list)
    return any(id(parameter) in wanted for parameter in members)


def _values(values: Iterable[object]) -> str:
    """Different values once, in their order; `-` for none."""
    shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values if v is not None]
    return ", ".join(dict.fromkeys(shown)) or "-"


def _dotted(path: Path) -> str:
    return ".".join(path)


def _is_name(name: str) -> bool:
    return name not in keys.RESERVED and _NAME.fullmatch(name) is not None


def _checked_name(name: str) -> str:
    if not _is_name(name):
        reserved = ", ".join(sorted(keys.RESERVED))
        raise ValueError(
            f"{name!r} cannot be a stream's name: use letters, digits, '_' and '-', a letter first, "
            f"and none of the reserved names {reserved}"
        )
    return name


def _as_spec(name: str, value: StreamLike) -> StreamSpec:
    if isinstance(value, StreamSpec):
        return value
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, str | nn.Module) else [value]
    unknown = [item for item in items if not isinstance(item, str | nn.Module)]
    if unknown:
        raise ValueError(
            f"stream {name!r}: expected patterns (str), modules (nn.Module) or a StreamSpec, got {unknown[0]!r}"
        )
    return StreamSpec(
        patterns=tuple(item for item in items if isinstance(item, str)),
        modules=tuple(item for item in items if isinstance(item, nn.Module)),
    )


_Claims: TypeAlias = dict[nn.Parameter, list[_Claim]]


def _claims_of_specs(
    model: nn.Module, aliases: Mapping[nn.Parameter, list[Path]], streams: Mapping[str, StreamLike]
) -> tuple[_Claims, tuple[str, ...], dict[str, tuple[str, ...]]]:
    if not streams:
        raise ValueError("streams={} names no stream; pass None to have them found, or name at least one")
    claims: _Claims = {}
    paths_of = {id(unwrap(module)): path for path, module in walk(model)}
    specs = {_checked_name(name): _as_spec(name, value) for name, value in streams.items()}
    for name, spec in specs.items():
        if not (spec.patterns or spec.modules or spec.inputs):
            raise ValueError(f"stream {name!r} is empty: give it a pattern, a module, or inputs=(...)")
        for pattern in spec.patterns:
            parts = tuple(pattern.split("."))
            hits = [p for p, paths in aliases.items() if any(_fits(parts, path) for path in paths)]
            if not hits:
                known = {part for paths in aliases.values() for path in paths for part in path[:-1] or path}
                near = ", ".join(keys.nearest(pattern, sorted(known)))
                raise ValueError(f"stream {name!r}: pattern {pattern!r} matches no parameter; nearest names: {near}")
            for parameter in hits:
                claims.setdefault(parameter, []).append(_Claim(name, len(parts)))
        for module in spec.modules:
            path = paths_of.get(id(unwrap(module)))
            if path is None:
                raise ValueError(
                    f"stream {name!r}: the module {type(module).__name__} is not part of the model "
                    f"({type(unwrap(model)).__name__}); pass a module taken from it"
                )
            for _, parameter in _named_parameters(module):
                claims.setdefault(parameter, []).append(_Claim(name, len(path)))
    return claims, tuple(specs), {name: spec.inputs for name, spec in specs.items() if spec.inputs}


def _claims_found(
    model: nn.Module,
    aliases: Mapping[nn.Parameter, list[Path]],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[_Claims, tuple[str, ...]]:
    grouped = [g for o in optimizers for g in o.param_groups if g.get("stream") not in (None, keys.SHARED)]
    claims: _Claims = {}
    if grouped:
        for group in grouped:
            for parameter in group["params"]:
                claims.setdefault(parameter, []).append(_Claim(_checked_name(group["stream"]), 1))
        return claims, tuple(dict.fromkeys(group["stream"] for group in grouped))
    declared = getattr(unwrap(model), "stream_names", None)
    if declared is not None:
        declared_claims, names, _ = _claims_of_specs(model, aliases, {name: name for name in declared})
        return declared_claims, names
    for parameter, paths in aliases.items():
        for name in {hit for path in paths for hit in _NUMBERED.findall(_dotted(path))}:
            claims.setdefault(parameter, []).append(_Claim(name, 1))
    if claims:
        found = {claim.stream for wanted in claims.values() for claim in wanted}
        return claims, tuple(sorted(found, key=lambda name: int(name.removeprefix("stream"))))
    total = sum(parameter.numel() for parameter in aliases)
    sizes: dict[str, int] = {}
    for parameter, paths in aliases.items():
        for child in {path[0] for path in paths if len(path) > 1}:
            sizes[child] = sizes.get(child, 0) + parameter.numel()
    children = [child for child, size in sizes.items() if size > _CHILD_SHARE * total and _is_name(child)]
    if not children:
        raise ValueError(
            f"no streams found in {type(unwrap(model)).__name__}: name them, "
            f"e.g. streams={{'rgb': 'rgb_encoder', 'depth': 'depth_encoder'}}"
        )
    for parameter, paths in aliases.items():
        for child in {path[0] for path in paths} & set(children):
            claims.setdefault(parameter, []).append(_Claim(child, 1))
    return claims, tuple(children)


def _winner(claims: Sequence[_Claim], paths: Sequence[Path]) -> str:
    """The stream with the longest claim; `shared` without one. ValueError for a tie."""
    if not claims:
        return keys.SHARED
    best = max(claim.strength for claim in claims)
    streams = list(dict.fromkeys(claim.stream for claim in claims if claim.strength == best))
    if len(streams) > 1:
        names = " = ".join(_dotted(path) for path in paths)
        wanted = " and ".join(repr(name) for name in streams)
        raise ValueError(
            f"parameter {names} is claimed by {wanted} alike; give one of them a longer pattern, "
            f"or leave the parameter to {keys.SHARED!r} by narrower patterns"
        )
    return streams[0]


def _build(
    model: nn.Module,
    aliases: Mapping[nn.Parameter, list[Path]],
    owner: Mapping[nn.Parameter, str],
    names: Sequence[str],
    inputs: Mapping[str, tuple[str, ...]],
) -> Iterator[Stream]:
    members: dict[str, list[NamedParameter]] = {name: [] for name in (*names, keys.SHARED)}
    for parameter, paths in aliases.items():
        members[owner[parameter]].append(NamedParameter(_dotted(paths[0]), parameter))
    roots = _roots(model, owner)
    for name in names:
        if not members[name] and name not in inputs:
            raise ValueError(
                f"stream {name!r} has no parameters: other streams have stronger claims to all it matches, or its "
                f"modules have none; narrow the others, or declare it by its inputs alone, StreamSpec(inputs=...)"
            )
        yield Stream(name, tuple(members[name]), tuple(roots.get(name, ())), inputs.get(name, ()))
    if members[keys.SHARED]:
        yield Stream(keys.SHARED, tuple(members[keys.SHARED]))


def _roots(model: nn.Module, owner: Mapping[nn.Parameter, str]) -> dict[str, list[str]]:
    """For each stream the largest modules that can be called and whose parameters are all the stream's, each once."""
    roots: dict[str, list[str]] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, path: Path) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        streams = {owner[parameter] for _, parameter in _named_parameters(module)}
        callable_ = getattr(type(unwrap(module)), "forward", None) is not nn.Module.forward
        if len(streams) == 1 and callable_:
            roots.setdefault(streams.pop(), []).append(_dotted(path))
        elif streams:
            for name, child in unwrap(module)._modules.items():
                if child is not None:
                    visit(child, (*path, name))

    visit(model, ())
    return roots
