"""A model of the real shapes with its adapters and optimizer, and the ways to take its training steps."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.trainer.adapters.lora import LoraVariant, add_lora, trained_parameters
from halfbyte.trainer.cuda_graphs.denoiser import GraphedDenoiser
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.settings import KEPT, block_names
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.activations import HostStore
from halfbyte.trainer.families.offload.block_stream import BlockStream, keep_on_host, packed_blocks
from halfbyte.trainer.families.offload.copies import copies_to
from halfbyte.trainer.objective.losses import MSE
from halfbyte.trainer.objective.shift import ResolutionShift
from halfbyte.trainer.objective.timesteps import LogitNormal
from halfbyte.trainer.objective.weighting import NoWeighting
from halfbyte.trainer.optim.optimizers import OPTIMIZERS
from halfbyte.trainer.training.module import DiffusionModule, Objective
from scripts.bench.models import MODELS, family_of, random_denoiser


@dataclass(frozen=True)
class Row:
    """One way to store the base and run the blocks."""

    name: str
    base: str  # ours, bf16 or peer, see scripts/bench/models.py
    whole: bool = True  # fused blocks; the peer uses diffusers' own
    compiled: bool = False  # torch compiles blocks that run layer by layer
    graphs: bool = False  # a step is recorded and launched as a whole
    dora: bool = False  # the adapters are DoRA's, whose blocks run layer by layer

    @property
    def needs_cuda(self) -> bool:
        """True for graphs and for compiled rows, because compiling for a CPU takes minutes."""
        return self.compiled or self.graphs

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The values of train.gradient_checkpointing that this way supports."""
        if not self.whole:
            return "none", "full"
        return ("none", "selective", "full") if self.graphs else tuple(KEPT)


ROWS = (
    Row("ours, graphs", "ours", graphs=True),
    Row("ours", "ours"),
    Row("ours by layer, compiled", "ours", whole=False, compiled=True),
    Row("ours by layer", "ours", whole=False),
    Row("ours, DoRA", "ours", whole=False, dora=True),
    Row("ours, DoRA, compiled", "ours", whole=False, compiled=True, dora=True),
    Row("bf16, graphs", "bf16", graphs=True),
    Row("bf16", "bf16"),
    Row("bf16 by layer, compiled", "bf16", whole=False, compiled=True),
    Row("peer, compiled", "peer", whole=False, compiled=True),
    Row("peer", "peer", whole=False),
)
ROW = {row.name: row for row in ROWS}


def default_objective(family: Family, denoiser: nn.Module) -> DiffusionModule:
    """Returns the default loss of a recipe, in bf16."""
    return DiffusionModule(
        family,
        denoiser,
        Objective(
            LogitNormal(name="logit_normal"),
            ResolutionShift(name="resolution"),
            NoWeighting(name="none"),
            MSE(name="mse"),
            1.0,
        ),
        build_optimizer=torch.optim.AdamW,
        lr_factor=lambda step: 1.0,
        compute_dtype=torch.bfloat16,
        max_grad_norm=None,
        seed=0,
    )


def adapt(denoiser: nn.Module, family: Family, rank: int, *, fused: bool, dora: bool = False) -> None:
    """Adds LoRA or DoRA to every linear of the blocks."""
    add_lora(
        denoiser,
        rank=rank,
        alpha=rank,
        dropout=0.0,
        targets=family.lora_targets("all-linear"),
        init="gaussian",
        seed=0,
        fused=fused,
        variant=LoraVariant(dora=dora),
    )


class TrainedModel:
    """One row's model with its adapters and optimizer, for steps of any size."""

    def __init__(
        self, model: str, row: Row, rank: int, device: torch.device, *, stream: bool, optimizer: str
    ) -> None:
        self.model, self.row, self.device = model, row, device
        self.family = family_of(model)
        place = keep_on_host(block_names(self.family)) if stream else None
        denoiser: Any = random_denoiser(model, self.family, row.base, device, place)
        self.base_gib = gib(torch.cuda.memory_allocated()) if device.type == "cuda" else None
        adapt(denoiser, self.family, rank, fused=row.base != "peer", dora=row.dora)
        self.denoiser = denoiser.to(device)
        self.stream: BlockStream | None = None
        if stream:
            self.stream = BlockStream(packed_blocks(denoiser, block_names(self.family)), copies_to(device))
        choice = OPTIMIZERS[optimizer].model_validate({"name": optimizer})
        self.optimizer = choice.build(list(trained_parameters(denoiser).items()))
        self.module = default_objective(self.family, denoiser)

    def settle(self, checkpoint: str, attention: str | None) -> None:
        """Sets the blocks' checkpointing. Compiled code stays as it is: build a new model for another setting."""
        row = self.row
        if row.base != "peer":
            # torch compiles blocks that run layer by layer; a fused block is one function already.
            settings = BlockSettings(
                "everything" if row.compiled else KEPT[checkpoint],
                store=HostStore() if checkpoint == "offload" else None,
                whole=row.whole,
                backend=attention,
            )
            self.family.fuse_blocks(self.denoiser, settings)
        if row.base == "peer" or row.compiled:
            if checkpoint == "none":
                self.denoiser.disable_gradient_checkpointing()
            else:
                self.denoiser.enable_gradient_checkpointing()
        if row.compiled:
            torch._dynamo.reset()
            self.denoiser.compile_repeated_blocks(fullgraph=row.base != "peer")
        self.denoiser.train()

    def batch(self, number: int, px: int) -> Batch:
        """Returns one sample; its values do not matter, its sizes are the real ones."""
        config, side = self.family.denoiser_config, px // self.family.vae_scale
        tokens, channels = MODELS[self.model][3], self.family.vae_config["latent_channels"]
        return Batch(
            (number,),
            torch.zeros(1, channels, side, side),
            torch.ones(1, channels, side, side),
            torch.ones(1, tokens, config["joint_attention_dim"], dtype=torch.bfloat16),
            torch.ones(1, config["pooled_projection_dim"], dtype=torch.bfloat16),
        ).to(self.device)

    def step(self, number: int, px: int) -> float:
        """Returns the seconds of forward, backward and optimizer."""
        batch = self.batch(number, px)
        _wait(self.device)
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.module.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait(self.device)
        assert torch.isfinite(loss), f"{self.row.name}: the loss is {loss.item()}"
        return time.perf_counter() - began

    def measure(self, px: int, steps: int) -> dict[str, Any]:
        """Returns times and peaks of some steps after three warm-up steps; graphs are recorded in the second."""
        self.module.forward_fn = GraphedDenoiser(self.denoiser) if self.row.graphs else None
        first = self.step(0, px)
        for number in range(1, 3):
            self.step(number, px)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        copied = self.copied
        times = [self.step(number, px) for number in range(3, 3 + steps)]
        return {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "first_s": first,
            "base_gib": self.base_gib,
            "peak_gib": self._peak_gib(),
            "graphs": None if self.module.forward_fn is None else self.module.forward_fn.shapes,
            "copied_gb": (self.copied - copied) / steps / 1e9,
        }

    def launched(self, number: int, px: int) -> float:
        """Returns the seconds of a step that is launched kernel by kernel, recorded or not."""
        called, self.module.forward_fn = self.module.forward_fn, None
        try:
            return self.step(number, px)
        finally:
            self.module.forward_fn = called

    def tokens(self, px: int) -> tuple[int, ...]:
        """Returns the rows of the products in a step: of text, of the image, and of both."""
        side, texts = px // self.family.vae_scale, MODELS[self.model][3]
        pictures = self.family.image_tokens(side, side)
        return texts, pictures, texts + pictures

    def _peak_gib(self) -> float | None:
        if self.device.type != "cuda":
            return None
        # The memory of a recording counts as allocated only while it is made.
        reserved = self.row.graphs
        return gib(torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated())

    @property
    def copied(self) -> int:
        """Returns the bytes of blocks that were copied to the device so far."""
        return 0 if self.stream is None else self.stream.copied


def gib(count: int) -> float:
    """Returns bytes in GiB."""
    return count / 2**30


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
