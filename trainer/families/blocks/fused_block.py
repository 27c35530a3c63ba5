"""Settings and shared methods of the transformer blocks, which run as one autograd function where possible.

A block that cannot run as one function runs layer by layer, as diffusers wrote it, with torch's
checkpointing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.attention.ops import default_backend
from halfbyte.quant.layers.autocast import autocast_dtype
from halfbyte.trainer.families.offload.activations import HostStore

# Activations that a block keeps for its backward. inputs: only the block's inputs (full checkpointing).
# attention: also attention's output and the stream after it (selective checkpointing). everything: also the
# outputs of the matrix products. Elementwise results (LN, GELU) are recomputed even then.
Keep = Literal["inputs", "attention", "everything"]


@dataclass(frozen=True)
class BlockSettings:
    """How the blocks of a transformer run. No setting changes a result beyond rounding."""

    keep: Keep = "everything"
    """Activations kept between forward and backward."""
    store: HostStore | None = None
    """Host memory for the blocks' inputs between forward and backward; None keeps them on the device."""
    whole: bool = True
    """Run each block as one autograd function where possible."""
    backend: str | None = None
    """Attention backend, see `halfbyte.kernels.attention.ops`; None: the one that needs no probe."""


class WholeBlock:
    """Methods that the blocks of every family share. Mixed into diffusers' classes."""

    settings: BlockSettings

    @property
    def kept(self) -> Keep:
        """Activations that the fused block keeps; the minimum, "inputs", if there will be no backward."""
        return self.settings.keep if torch.is_grad_enabled() else "inputs"

    @property
    def store(self) -> HostStore | None:
        """Host memory for the block's inputs; None if they stay on the device or no backward follows."""
        return self.settings.store if torch.is_grad_enabled() else None

    def computed_in(self, x: Tensor) -> torch.dtype:
        """Returns the dtype the block computes in: autocast's, or the input's without autocast."""
        dtype = autocast_dtype(x.device.type)
        return x.dtype if dtype is None else dtype

    def attention_backend(self, x: Tensor) -> str:
        """Returns the backend of the settings, or the one that needs no probe."""
        return self.settings.backend or default_backend(x.device, x.dtype)

    def runs_whole(
        self, processor: Any, ours: type[Any], joint_attention_kwargs: dict[str, Any] | None
    ) -> bool:
        """Returns True if the settings ask for a fused block and its attention processor is `ours`."""
        # torch.compile cannot trace a hand-written backward. Without gradients it sees only the forward,
        # which it can.
        return (
            self.settings.whole
            and not joint_attention_kwargs
            and type(processor) is ours
            and not (torch.compiler.is_compiling() and torch.is_grad_enabled())
        )

    def by_layer(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        """Runs `forward(*inputs)` layer by layer; the backward runs it again unless everything is kept."""
        if self.settings.keep == "everything" or not torch.is_grad_enabled():
            return forward(*inputs)
        # Random state cannot be read while a CUDA graph is captured. Nothing is lost by not saving it: a step
        # that draws random numbers is never captured.
        recorded = inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=not recorded)
