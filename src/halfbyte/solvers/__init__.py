"""The numerical inner loops that methods share, each with a plain reference and a fast path.

A solver knows tensors only: no formats, no models, no calibration. The methods bring the grid.
"""

from halfbyte.solvers.columns import ColumnRounding, Grid, Segment, round_columns, round_segment

__all__ = ["ColumnRounding", "Grid", "Segment", "round_columns", "round_segment"]
