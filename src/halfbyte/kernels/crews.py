"""How crews of four warps, and what loads for them, share out the registers of a multiprocessor."""

REGISTERS = 65536  # of a multiprocessor
LOADER = 24  # of a thread of the loaders: one or two warps, which have the registers of a crew until they give them up


class Crews:
    """A tiling that has `workers` crews, and registers so that `residents` programs fit side by side."""

    __slots__ = ()
    workers: int
    residents: int

    @property
    def warps(self) -> int:
        return 4 * self.workers + 4

    @property
    def launch_registers(self) -> int | None:
        """Registers per thread at launch, for `residents` to fit; None for all that there are."""
        return None if self.residents == 1 else self._at_launch

    @property
    def worker_registers(self) -> int:
        """Registers per thread of a crew, once the loaders have given up their own."""
        return min((self._at_launch * (self.workers + 1) - LOADER) // self.workers // 8 * 8, 240)

    @property
    def _at_launch(self) -> int:
        return min(REGISTERS // self.residents // (32 * self.warps) // 8 * 8, 248)
