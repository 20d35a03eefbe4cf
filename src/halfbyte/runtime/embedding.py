"""QuantizedEmbedding: a table of embeddings whose rows stay int8 until they are looked up."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from halfbyte.numerics.quantized import QuantizedWeight


class QuantizedEmbedding(nn.Module):
    """y = codes[ids] · scale of the row, or of each of its groups, in the dtype that it was made for."""

    weight: Tensor
    embedding_scale: Tensor

    def __init__(self, table: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.codes.shape
        self.register_buffer("weight", table.codes)
        self.register_buffer("embedding_scale", table.grid.scales.to(dtype))
        self.format = table.format

    def forward(self, ids: Int[Tensor, "*leading"]) -> Float[Tensor, "*leading dim"]:
        scales = self.embedding_scale[ids]
        groups = self.weight[ids].unflatten(-1, (scales.shape[-1], -1))
        return (groups.to(scales.dtype) * scales[..., None]).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


def replace_tables(model: nn.Module, tables: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
    """Put quantized tables in the place of those at these paths; a head that shares one gets its values. Edits in place."""
    for path, table in tables.items():
        shared = model.get_parameter(f"{path}.weight")
        model.set_submodule(path, QuantizedEmbedding(table.to(shared.device), dtype))
        for module in model.modules():
            if module._parameters.get("weight") is shared:
                values = table.decode().to(shared.device, dtype)
                module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
