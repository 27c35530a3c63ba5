"""A transformer block that runs as one function where it can, and layer by layer with checkpointing where not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.attention.ops import default_backend
from halfbyte.quant.layers.autocast import autocast_dtype
from halfbyte.trainer.families.offload.activations import HostStore

# inputs: a block's inputs alone (full checkpointing). attention: also what attention gave and the stream behind it
# (selective). everything: also the outputs of the products; what elementwise work makes is made again even so.
Keep = Literal["inputs", "attention", "everything"]


@dataclass(frozen=True)
class BlockSettings:
    """How the blocks of a transformer run; none of it changes a result beyond rounding."""

    keep: Keep = "everything"
    """What a block keeps between forward and backward."""
    store: HostStore | None = None
    """Where whole blocks leave their inputs between forward and backward; None: on the device."""
    whole: bool = True
    """Run each block as one function where it can be."""
    backend: str | None = None
    """Of attention, see `halfbyte.kernels.attention.ops`; None: what is right without a probe."""


class WholeBlock:
    """What the blocks of every family share; mixed into diffusers' classes."""

    settings: BlockSettings

    @property
    def kept(self) -> Keep:
        """What the whole block keeps for its backward; where there will be none, as little as it can."""
        return self.settings.keep if torch.is_grad_enabled() else "inputs"

    @property
    def store(self) -> HostStore | None:
        """Where its inputs wait for the backward; None: on the device, or for none."""
        return self.settings.store if torch.is_grad_enabled() else None

    def computed_in(self, x: Tensor) -> torch.dtype:
        """What the block computes in: autocast's dtype, or the input's."""
        dtype = autocast_dtype(x.device.type)
        return x.dtype if dtype is None else dtype

    def attention_backend(self, x: Tensor) -> str:
        """The settings', or the one that needs no probe."""
        return self.settings.backend or default_backend(x.device, x.dtype)

    def runs_whole(
        self, processor: Any, ours: type[Any], joint_attention_kwargs: dict[str, Any] | None
    ) -> bool:
        """Whether the settings ask for it and attention is what `ours` computes."""
        # Of a function with a backward of its own compilers see too little; without gradients it is its forward alone.
        return (
            self.settings.whole
            and not joint_attention_kwargs
            and type(processor) is ours
            and not (torch.compiler.is_compiling() and torch.is_grad_enabled())
        )

    def by_layer(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        """`forward(*inputs)`, run again in the backward unless everything is kept."""
        if self.settings.keep == "everything" or not torch.is_grad_enabled():
            return forward(*inputs)
        # Random state cannot be read while a CUDA graph is recorded, and what draws is not recorded.
        recorded = inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=not recorded)
