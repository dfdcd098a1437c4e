"""The backbone whose layers tasks share, by its name in a config."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.models.deeplab import ENCODERS, named_encoder
from oneshot_ednas.models.encoder import Encoder, ednas_encoder
from oneshot_ednas.schema import find_file, imported, nearest
from oneshot_ednas.sharing.operators import EDNAS_OPERATORS, PLAIN_OPERATORS, OperatorTypes
from oneshot_ednas.space import named_space

EDNAS = "ednas"
BASE, SEARCH = "base", "search"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone, once for each task at most."""

    name: str = EDNAS
    """`ednas`, or one with DeepLabv3+ decoders: `mobilenet_v2`, `mnasnet`, `resnet34`, `resnet50`;
    or your own as `package.module:NAME`, a function that gives an `Encoder`."""
    space: str | None = None
    """Of `ednas`: name of a shipped search space, or the path of a YAML file."""
    architecture: str = BASE
    """Of `ednas`: `base`, the path of an architecture file, or `search`, where the branching search
    chooses the blocks of each branch too."""
    options: dict[str, float] = field(default_factory=dict)
    """Of the others: keyword arguments, for example `{width: 0.5, output_stride: 8}`."""

    def __post_init__(self) -> None:
        """What belongs to one kind of backbone is not given to the other."""
        if self.name == EDNAS:
            if self.space is None:
                raise ValueError("backbone ednas needs a space, for example space: ednas_tiny")
            if self.options:
                raise ValueError("backbone ednas has no options; its space says what it is")
            return
        if self.space is not None or self.architecture != BASE:
            raise ValueError(
                f"space and architecture belong to the backbone ednas, not to {self.name}"
            )
        if self.name not in ENCODERS and ":" not in self.name:
            raise ValueError(
                f"unknown backbone {self.name}; {nearest(self.name, (EDNAS, *ENCODERS))} "
                f"(your own: package.module:NAME)"
            )

    @property
    def has_choices(self) -> bool:
        """Whether blocks are searched, too."""
        return self.architecture == SEARCH

    @property
    def operator_types(self) -> OperatorTypes:
        """The modules that operator sharing takes as operators."""
        return EDNAS_OPERATORS if self.name == EDNAS else PLAIN_OPERATORS


def make_encoder(config: BackboneConfig) -> Encoder:
    """The encoder of a config.

    Raises:
        FileNotFoundError: if its space or architecture is a file that is not there.
        ValueError: for anything else wrong in it.
    """
    if config.name == EDNAS:
        assert config.space is not None
        space = named_space(config.space)
        if config.architecture == SEARCH:
            return ednas_encoder(space)
        architecture = space.base_architecture
        if config.architecture != BASE:
            architecture = Architecture.load(find_file(Path(config.architecture)))
            space.check(architecture)
        return ednas_encoder(space.fix(architecture))
    is_named = config.name in ENCODERS
    make = ENCODERS[config.name] if is_named else imported(config.name, what="backbone")
    takes = inspect.signature(make)
    options = {name: _number(value, takes, name) for name, value in config.options.items()}
    if is_named:
        return named_encoder(config.name, **options)
    try:
        takes.bind(**options)
    except TypeError as error:
        raise ValueError(f"backbone {config.name}: options: {error}; it takes {takes}") from None
    try:
        encoder = make(**options)
    except Exception as error:
        # What is not of the package may fail in its own way.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"backbone {config.name} cannot be made: {reason}") from error
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"backbone {config.name}: expected an oneshot_ednas.models.encoder.Encoder, got "
            f"{type(encoder).__name__}"
        )
    return encoder


def _number(value: float, takes: inspect.Signature, name: str) -> int | float:
    """The config's numbers are floats; channels and strides are whole."""
    wants = takes.parameters[name].annotation if name in takes.parameters else None
    return int(value) if value.is_integer() and wants not in (float, "float") else value
