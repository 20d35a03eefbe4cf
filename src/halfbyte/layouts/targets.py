r"""Sets of module paths as short lists of patterns.

model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, ...   →   (?:.*\.)?layers\.\d+\.mlp\.up_proj$

What stands before the list of blocks is left open, because clients rename it (`model.` becomes
`model.language_model.`, and the like) and would no longer find the module.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Paths that differ in their numbers only, from the last name before the first number on."""

    parts: tuple[str, ...]

    def pattern(self, blocks: Sequence[str] | None = None) -> str:
        """A regular expression for `re.match`; the first number is one of `blocks`, if they are given."""
        pieces, open_blocks = [], blocks
        for part in self.parts:
            if part != "#":
                pieces.append(re.escape(part))
            elif open_blocks is None:
                pieces.append(r"\d+")
            else:
                pieces.append(f"(?:{'|'.join(open_blocks)})")
                open_blocks = None
        return r"(?:.*\.)?" + r"\.".join(pieces) + "$"


def family(path: str) -> tuple[Family, str] | None:
    """The family of a path and the number of its block; None for a path without numbers."""
    parts = path.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return None
    return Family(tuple("#" if part.isdigit() else part for part in parts[max(first - 1, 0) :])), parts[first]


def patterns(wanted: Iterable[str], others: Iterable[str]) -> tuple[list[str], list[str]]:
    """Regular expressions and single paths that together match every path `wanted` and none of the `others`."""
    rest = set(others)
    taken = {found for found in map(family, rest) if found}
    taken_families = {found[0] for found in taken}
    blocks: dict[Family, dict[str, list[str]]] = {}
    single = []
    for path in wanted:
        found = family(path)
        if found is None or found in taken:
            single.append(path)
        else:
            blocks.setdefault(found[0], {}).setdefault(found[1], []).append(path)
    expressions = []
    for kin, members in blocks.items():
        pattern = kin.pattern(sorted(members, key=int) if kin in taken_families else None)
        compiled = re.compile(pattern)
        if any(compiled.match(other) for other in rest):
            single += [path for paths in members.values() for path in paths]
        else:
            expressions.append(pattern)
    return expressions, single
