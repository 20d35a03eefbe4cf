"""Every weight matrix of a block as an nn.Linear, so that hooks, methods and packing meet one kind of module.

    in transformers                            here
    Conv1D, weight [in, out]                   TransposedLinear, weight [out, in]
    fused experts, gate_up_proj [E, 2I, H]     ExpertList of E experts: gate_proj [I, H], up_proj [I, H],
                   down_proj [E, H, I]         down_proj [H, I]

Works alike on weights in memory and on the meta device. What is not recognised is refused or reported, never skipped.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from halfbyte.errors import ModelError

ROUTED_FORWARD = ["hidden_states", "top_k_index", "top_k_weights"]


class TransposedLinear(nn.Linear):
    """An nn.Linear whose tensor lies transposed, [in, out], in the checkpoint (GPT-2's Conv1D)."""


class Expert(nn.Module):
    """One gated feed-forward network of a mixture."""

    def __init__(
        self, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, hidden_states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ExpertList(nn.ModuleList):
    """The experts of a mixture one by one: the signature and the result of the fused module they replace.

    Every expert is called, with [0, hidden] inputs where no token was routed to it. With `calibrate_all` every expert
    is called with all tokens, so that hooks see inputs for the rare ones too; the output stays the routed one.
    """

    def __init__(self, experts: Iterable[Expert]) -> None:
        super().__init__(experts)
        self.calibrate_all = False

    @property
    def num_experts(self) -> int:
        return len(self)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        # Routers hand out float32 weights: sum in the wider of the two dtypes and round once.
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        output = torch.zeros_like(hidden_states, dtype=dtype)
        for index, expert in enumerate(self):
            token, choice = torch.where(top_k_index == index)
            written = expert(hidden_states)[token] if self.calibrate_all else expert(hidden_states[token])
            output.index_add_(0, token, (written * top_k_weights[token, choice, None]).to(dtype))
        return output.to(hidden_states.dtype)


def linearize(block: nn.Module) -> None:
    """Turn every weight matrix below `block` into an nn.Linear with the same results. Edits in place.

    ModelError, naming the module, for fused experts in a layout that is not known (transposed, interleaved, gated in
    another way).
    """
    for name, module in list(block.named_modules()):
        if is_transposed(module):
            own = _own(module)
            _replace(block, name, _linear(TransposedLinear, own["weight"].T, own["bias"]))
        elif isinstance(getattr(module, "num_experts", None), int) and any(p.dim() == 3 for p in _own(module).values()):
            _require_known_layout(name, module)
            _replace(block, name, _expert_list(module))


def unlinearized(block: nn.Module) -> list[str]:
    """The names of weights with two or more axes that no nn.Linear, embedding or router holds."""
    return [
        f"{path}.{name}" if path else name
        for path, module in block.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding) and not is_router(module)
        for name, parameter in _own(module).items()
        if parameter.dim() >= 2
    ]


def is_router(module: nn.Module) -> bool:
    """Whether this scores experts, with a bare weight [experts, hidden] and no nn.Linear. Routers stay as they are."""
    weight = _own(module).get("weight")
    experts = getattr(module, "num_experts", None)
    return weight is not None and weight.dim() == 2 and weight.shape[0] == experts and hasattr(module, "top_k")


def is_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told by its shape: weight [nx, nf] and bias [nf]."""
    own = _own(module)
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    return own.keys() == {"weight", "bias"} and tuple(own["weight"].shape) == sizes


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _replace(block: nn.Module, name: str, replacement: nn.Module) -> None:
    if not name:
        raise ModelError(f"{type(block).__name__} is itself what linearize would replace: pass the block that holds it")
    replacement.train(block.get_submodule(name).training)
    block.set_submodule(name, replacement)


def _linear(kind: type[nn.Linear], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None) -> nn.Linear:
    """A linear that owns copies of these."""
    linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    copy = weight.detach().clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(copy, requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _expert_list(fused: Any) -> ExpertList:
    own = _own(fused)

    def linear(name: str, expert: int, rows: slice) -> nn.Linear:
        bias = own.get(f"{name}_bias")
        return _linear(nn.Linear, own[name][expert, rows], None if bias is None else bias[expert, rows])

    experts, width = len(own["down_proj"]), own["down_proj"].shape[2]
    gate, up, every = slice(width), slice(width, None), slice(None)
    return ExpertList(
        Expert(
            linear("gate_up_proj", expert, gate),
            linear("gate_up_proj", expert, up),
            linear("down_proj", expert, every),
            fused.act_fn,
        )
        for expert in range(experts)
    )


def _require_known_layout(name: str, module: nn.Module) -> None:
    if reason := _unknown_layout(module):
        raise ModelError(
            f"the fused experts {name!r} ({type(module).__name__}) {reason}: only gate_up_proj [experts, 2*inner, "
            "hidden] and down_proj [experts, hidden, inner] with activation(gate) * up are known; this architecture "
            "needs a rule in models/linearize.py"
        )


def _unknown_layout(module: nn.Module) -> str | None:
    """What keeps the fused experts from being taken apart, if anything does."""
    own = {name: tuple(parameter.shape) for name, parameter in _own(module).items()}
    experts, hidden, width = own.get("down_proj", (0, 0, 0))
    expected = {
        "gate_up_proj": (experts, 2 * width, hidden),
        "down_proj": (experts, hidden, width),
        "gate_up_proj_bias": (experts, 2 * width),
        "down_proj_bias": (experts, hidden),
    }
    required = {"gate_up_proj", "down_proj"}
    if not required <= own.keys() <= expected.keys() or any(own[key] != expected[key] for key in own):
        return f"hold {', '.join(f'{key} {list(shape)}' for key, shape in own.items())}"
    if list(inspect.signature(module.forward).parameters) != ROUTED_FORWARD:
        return f"are called with {inspect.signature(module.forward)}"
    if not getattr(module, "is_concatenated", True):
        return "interleave gate and up"
    if getattr(module, "has_post_expert_norm", False):
        return "normalise what an expert writes"
    if not hasattr(module, "act_fn") or not _gates_plainly(module):
        return "gate in a way of their own"
    return None


def _gates_plainly(module: Any) -> bool:
    """Whether the module's gate is activation(gate) * up, seen at values large enough to meet any clamp."""
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is None:
        return True
    probe = torch.linspace(-1e3, 1e3, 64, device="cpu", dtype=torch.float64).view(2, 32)
    gate, up = probe.chunk(2, dim=-1)
    return torch.equal(apply_gate(probe), module.act_fn(gate) * up)
