"""What is told of a module that was quantized: a line of the closing table, of the report and of the journal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.scheme import ActivationFormat


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """One line of the closing table."""

    path: str
    format: str
    method: str
    shape: tuple[int, int]
    weight_snr: float  # dB
    output_snr: float | None  # dB over the calibration tokens; None where nothing was observed
    tokens: int
    seconds: float
    activations: dict[str, Any] | None = None  # the ActivationFormat of the input; None: 16 bit

    @property
    def input_format(self) -> ActivationFormat | None:
        """How the input is quantized; None: not at all."""
        return None if self.activations is None else ActivationFormat.model_validate(self.activations)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModuleRecord":
        """The record that a journal holds."""
        return cls(**{**values, "shape": tuple(values["shape"])})
