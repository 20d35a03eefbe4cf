"""Moving a per-channel scale from a writer to its readers: the block computes what it computed before.

    readers(writer(x)) = (readers·diag s)((diag s⁻¹·writer)(x))

SmoothQuant (https://arxiv.org/abs/2211.10438, equation 3) and AWQ (https://arxiv.org/abs/2306.00978, section 3.2)
choose the scale; here it is moved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from halfbyte.errors import ModelError, WeightError
from halfbyte.models.architecture import Architecture, Link, Rows
from halfbyte.models.linearize import is_router


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResolvedLink:
    """A link whose modules were found in a block, with names relative to it."""

    writer_name: str
    writer: nn.Module  # a norm, or an nn.Linear
    readers: Mapping[str, nn.Module]  # by name; nn.Linear, and the router of a mixture
    rows: Rows
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    norm_offset: float  # what the writer, where it is a norm, adds to its weight

    @property
    def weights(self) -> list[Float[Tensor, "_ in"]]:
        """What reads the writer."""
        return [_weight(reader) for reader in self.readers.values()]

    @property
    def scale_width(self) -> int:
        """The length of a scale: the inputs of every reader."""
        return self.weights[0].shape[1]

    @property
    def repeats(self) -> int:
        """How many neighbouring heads of the readers' inputs one head of the writer feeds."""
        return self.heads // self.kv_heads if self.rows in (Rows.VALUES, Rows.VALUES_PER_HEAD) else 1

    @property
    def written(self) -> Int64[Tensor, "written"]:
        """The writer's output channels that the readers read, in their order."""
        channels = torch.arange(len(_weight(self.writer)), device="cpu")
        match self.rows:
            case Rows.ALL:
                return channels
            case Rows.LAST_HALF:
                return channels[len(channels) // 2 :]
            case Rows.VALUES:
                return channels[len(channels) - self.kv_heads * self.head_dim :]
            case Rows.VALUES_PER_HEAD:
                return channels.view(self.kv_heads, self.repeats + 2, self.head_dim)[:, -1].flatten()


def find_links(
    block: nn.Module, architecture: Architecture, heads: int, kv_heads: int, head_dim: int
) -> list[ResolvedLink]:
    """The table's links as they are in this linearized block.

    ModelError, naming the module, where the block lacks what the table names (unless the table says that variants do),
    or where the widths of writer and readers do not belong together.
    """
    if heads % kv_heads:
        raise ModelError(f"{kv_heads} KV heads cannot share {heads} query heads evenly: the heads are not this model's")
    found = []
    for link in architecture.links:
        if not _holds(block, link):
            continue
        for writer, readers in _expand(block, link):
            resolved = ResolvedLink(
                writer_name=writer,
                writer=block.get_submodule(writer),
                readers={name: block.get_submodule(name) for name in readers},
                rows=link.rows,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                norm_offset=architecture.norm_offset,
            )
            _check_modules(resolved)
            found.append(resolved)
    return found


def tie(scale: Float[Tensor, "in"], link: ResolvedLink) -> Float[Tensor, "in"]:
    """The nearest scale that can be moved: the geometric mean over the query heads that share a KV head."""
    if link.repeats == 1:
        return scale
    shared = scale.view(link.kv_heads, link.repeats, link.head_dim)
    mean = shared.log().mean(dim=1, keepdim=True).exp()
    return mean.expand_as(shared).reshape(scale.shape)


@torch.no_grad()
def move_scale(link: ResolvedLink, scale: Float[Tensor, "in"]) -> None:
    """writer/scale, readers·scale: the block computes what it computed before. Edits in place.

    Products are formed in float32, or wider where scale or weight is, and rounded once. WeightError, before anything is
    edited, for a scale of another length, one that is not positive and finite, or one that is not tied (see `tie`).
    """
    _check_scale(link, scale)
    offset = link.norm_offset if _weight(link.writer).dim() == 1 else 0.0
    own = scale.view(-1, link.repeats, link.head_dim)[:, 0].flatten() if link.repeats > 1 else scale
    _divide(_weight(link.writer), link.written, own, offset)
    bias = getattr(link.writer, "bias", None)
    if bias is not None:
        _divide(bias, link.written, own, 0.0)
    for weight in link.weights:
        weight.copy_(_wide(weight, scale) * scale.to(weight.device))


def _divide(parameter: Tensor, channels: Int64[Tensor, "in"], scale: Float[Tensor, "in"], offset: float) -> None:
    """Divide the given first-axis entries of `parameter`, counted from -`offset`, by `scale`. Edits in place."""
    channels, divisor = channels.to(parameter.device), scale.to(parameter.device)
    divisor = divisor.view(-1, *[1] * (parameter.dim() - 1))
    moved = (_wide(parameter[channels], scale) + offset) / divisor - offset
    parameter[channels] = moved.to(parameter.dtype)


def _wide(parameter: Tensor, scale: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(torch.promote_types(parameter.dtype, scale.dtype), torch.float32))


def _check_scale(link: ResolvedLink, scale: Tensor) -> None:
    if scale.shape != (link.scale_width,):
        raise WeightError(
            f"a scale of shape {list(scale.shape)} cannot move out of {link.writer_name!r}, whose readers have "
            f"{link.scale_width} inputs: give one positive number per input"
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise WeightError(
            f"the scale to move out of {link.writer_name!r} lies between {float(scale.min()):g} and "
            f"{float(scale.max()):g}: every entry must be positive and finite, clamp it first"
        )
    if link.repeats > 1:
        shared = scale.view(-1, link.repeats, link.head_dim)
        if not torch.equal(shared, shared[:, :1].expand_as(shared)):
            raise WeightError(
                f"{link.repeats} query heads share each of the {link.kv_heads} heads that {link.writer_name!r} writes, "
                "and this scale differs between them: tie(scale, link) first"
            )


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"a {type(module).__name__} has no weight that a scale could move into or out of")
    return weight


def _holds(block: nn.Module, link: Link) -> bool:
    """Whether this variant of the family has the link."""
    for path, value in link.when.items():
        try:
            found = attrgetter(path)(block)
        except AttributeError as cause:
            raise ModelError(f"the table asks a {type(block).__name__} for its {path!r}, which it lacks") from cause
        if found != value:
            return False
    return link.through is None or isinstance(block.get_submodule(link.through), nn.ReLU)


def _expand(block: nn.Module, link: Link) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of the link's writer and readers, once per expert where the writer is one of an expert's."""
    writers, readers = _names(block, link.writer), [_names(block, reader) for reader in link.readers]
    if link.optional and (not writers or not any(readers)):
        return
    for pattern, names in zip((link.writer, *link.readers), (writers, *readers), strict=True):
        if not names:
            have = ", ".join(name for name, _ in block.named_children())
            raise ModelError(
                f"the table names {pattern!r}, which this {type(block).__name__} lacks (it has {have}): linearize the "
                "block first, or mend the table in models/tables.py"
            )
    if "*" in link.writer:
        yield from ((writer, tuple(of_one)) for writer, *of_one in zip(writers, *readers, strict=True))
    else:
        yield writers[0], tuple(name for names in readers for name in names)


def _names(block: nn.Module, pattern: str) -> list[str]:
    """The modules of the block that a pattern names; several where it has a `*`, which stands for every child."""
    parent, star, rest = pattern.partition(".*.")
    candidates = [pattern]
    if star:
        children = block.get_submodule(parent).named_children() if _has(block, parent) else ()
        candidates = [f"{parent}.{child}.{rest}" for child, _ in children]
    return [name for name in candidates if _has(block, name)]


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_modules(link: ResolvedLink) -> None:
    """ModelError where the modules are not of the kinds and widths that a scale can move between."""
    for name, module in ((link.writer_name, link.writer), *link.readers.items()):
        norm = module is link.writer and _weight(module).dim() == 1
        if not (norm or isinstance(module, nn.Linear) or is_router(module)):
            raise ModelError(f"{name!r} is a {type(module).__name__}, not an nn.Linear: linearize the block first")
    heads, kv_heads, head_dim = link.heads, link.kv_heads, link.head_dim
    fused, rows = (heads + 2 * kv_heads) * head_dim, len(_weight(link.writer))
    known = {Rows.VALUES: (kv_heads * head_dim, fused), Rows.VALUES_PER_HEAD: (fused,)}.get(link.rows)
    if known and rows not in known:
        raise ModelError(
            f"{link.writer_name!r} has {rows} outputs; {heads} query heads and {kv_heads} KV heads of {head_dim} make "
            f"{' or '.join(map(str, known))}: the heads are not this model's"
        )
    written = len(link.written) * link.repeats
    for name, weight in zip(link.readers, link.weights, strict=True):
        if weight.shape[1] != written:
            raise ModelError(
                f"{name!r} has {weight.shape[1]} inputs and {link.writer_name!r} feeds it {written}: no scale can move "
                "between them; mend the table in models/tables.py, or the numbers of heads"
            )
