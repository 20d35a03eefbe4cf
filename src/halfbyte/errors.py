"""Every error that halfbyte raises on purpose. Each message names the value, the limit and the remedy."""


class HalfbyteError(Exception):
    """The base of all of them: catch this to catch what a user can mend."""


class RecipeError(HalfbyteError):
    """The recipe asks for something that does not exist or that does not fit together."""


class ModelError(HalfbyteError):
    """The model has no table, or not the modules that its table names."""


class CheckpointError(HalfbyteError):
    """A checkpoint is missing, truncated, corrupted, unfinished, or not what its configuration says."""


class CalibrationError(HalfbyteError):
    """The calibration data are missing, too few, or do not suffice for the method."""


class WeightError(HalfbyteError):
    """A weight cannot be quantized as asked: NaN or Inf, or a shape that the format does not divide."""


class FormatError(HalfbyteError):
    """A file format cannot say what the checkpoint holds."""


class OutputError(HalfbyteError):
    """The output folder cannot be written, is in the way, or belongs to another run."""
