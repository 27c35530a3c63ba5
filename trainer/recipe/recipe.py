"""The recipe: all settings of a run in one frozen object, with the checks that span several sections."""

from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.optim.optimizers import OPTIMIZERS, AdamW, OptimizerChoice
from halfbyte.trainer.optim.schedules import SCHEDULES, Constant, Schedule
from halfbyte.trainer.recipe.batch_sizes import scaled_by_area
from halfbyte.trainer.recipe.data_section import DataSection
from halfbyte.trainer.recipe.document import KeyPath, dotted
from halfbyte.trainer.recipe.fields import Section
from halfbyte.trainer.recipe.output_sections import (
    CheckpointSection,
    EmaSection,
    OutputSection,
    SampleSection,
    ValidationSection,
)
from halfbyte.trainer.recipe.sections import (
    LoraSection,
    ModelSection,
    ObjectiveSection,
    QuantSection,
    TrainSection,
)
from halfbyte.trainer.recipe.yaml12 import RecipeDumper
from halfbyte.trainer.registry import conflict
from halfbyte.trainer.wording import shown


class Recipe(Section):
    """A halfbyte recipe: how to fine-tune FLUX or SD3 with LoRA over a quantized base."""

    model: ModelSection
    quant: QuantSection = Field(default_factory=QuantSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    optimizer: Annotated[OptimizerChoice, OPTIMIZERS] = AdamW(name="adamw")
    """The optimizer that updates the adapters, with its learning rate."""
    lr_schedule: Annotated[Schedule, SCHEDULES] = Constant(name="constant")
    """The course of the learning rate over the run."""
    ema: EmaSection = Field(default_factory=EmaSection)
    train: TrainSection = Field(default_factory=TrainSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    output: OutputSection

    @model_validator(mode="after")
    def _every_resolution_has_a_batch_size(self) -> Self:
        batch, resolutions = self.train.batch_size, self.data.resolutions
        if isinstance(batch, int) or set(batch) == set(resolutions):
            return self
        raise conflict(
            "train.batch_size",
            f"got numbers for the resolutions {sorted(batch)}, but the data have {list(resolutions)}; expected one"
            f" for each, such as {scaled_by_area(batch, resolutions)}",
        )

    @model_validator(mode="after")
    def _the_family_takes_references(self) -> Self:
        sets = [given for given in self.data.resolved_sets if given.references.source != "none"]
        # A family is imported only if it matters: that takes seconds.
        if not sets or FAMILIES[self.model.family].max_references > 0:
            return self
        taking = [name for name in FAMILIES.names if FAMILIES[name].max_references > 0]
        setting = sets[0].setting if self.data.references.source == "none" else "data"
        raise conflict(
            f"{setting.replace('[', '.').replace(']', '')}.references",
            f"got the source {sets[0].references.source}, expected {{source: none}} because models of the family"
            f" {self.model.family} take no reference images; families that do: {', '.join(taking) or 'none yet'}",
        )

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.lr_schedule.warmup_steps > self.train.steps:
            raise conflict(
                "lr_schedule.warmup_steps",
                f"got {self.lr_schedule.warmup_steps}, expected at most train.steps ({self.train.steps})",
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_settle(self) -> Self:
        """Refuses a falling learning rate or an EMA for an optimizer that averages the weights itself."""
        if not self.optimizer.averages:
            return self
        reason = f"because optimizer.name is {self.optimizer.name}, which averages the weights itself"
        if self.lr_schedule.falls:
            raise conflict("lr_schedule.name", f"got {self.lr_schedule.name}, expected constant {reason}")
        if self.ema.decay is not None:
            raise conflict("ema.decay", f"got {self.ema.decay}, expected null {reason}")
        return self

    @model_validator(mode="after")
    def _dora_is_fused(self) -> Self:
        if self.lora.dora and not self.train.fused_adapters:
            raise conflict(
                "train.fused_adapters",
                "got false, expected true because lora.dora is true: PEFT's own DoRA layers dequantize the base through"
                " bitsandbytes",
            )
        return self

    @model_validator(mode="after")
    def _packed_blocks_stream(self) -> Self:
        if self.train.stream_blocks and self.quant.type == "none":
            raise conflict(
                "train.stream_blocks",
                "got true, expected false because quant.type is none: only quantized weights can be streamed",
            )
        if self.train.stream_blocks and self.lora.dora:
            raise conflict(
                "train.stream_blocks",
                "got true, expected false because lora.dora is true: DoRA reads the base's weights outside the blocks",
            )
        return self

    @model_validator(mode="after")
    def _whole_blocks_are_recorded(self) -> Self:
        excluded = {
            "lora.dora is true": self.lora.dora,
            "lora.dropout is not 0": self.lora.dropout > 0,
            "quant.type is int8": self.quant.type == "int8",
        }
        for reason, holds in excluded.items():
            if self.train.cuda_graphs and holds:
                raise conflict(
                    "train.cuda_graphs",
                    f"got true, expected false because {reason}: such blocks do not run as one function",
                )
        return self

    @model_validator(mode="after")
    def _dora_is_for_diffusers(self) -> Self:
        if self.lora.dora and self.output.formats not in (None, ("diffusers",)):
            raise conflict(
                "output.formats",
                f"got {shown(list(self.output.formats or ()))}, expected null or [diffusers] because lora.dora is"
                " true: the other formats merge several layers into one, which has no place for each layer's magnitude",
            )
        return self

    def dump(self) -> dict[str, Any]:
        """Returns the recipe with every default filled in, as plain values that JSON and YAML can hold."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the text of a recipe file that loads as an equal recipe."""
        return yaml.dump(self.dump(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Returns one line per field that differs, such as `train.steps: 100 -> 200`.

    A list of texts or numbers counts as one field; of sections in a list, each field counts.
    """
    old, new = _flat(before.dump()), _flat(after.dump())
    changed = [name for name in old | new if (name in old, old.get(name)) != (name in new, new.get(name))]
    old_text = {name: shown(old[name]) if name in old else "absent" for name in changed}
    new_text = {name: shown(new[name]) if name in new else "absent" for name in changed}
    return [f"{name}: {old_text[name]} -> {new_text[name]}" for name in changed]


def _flat(values: dict[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in values.items():
        inner = (*path, key)
        if isinstance(value, dict):
            fields |= _flat(value, inner)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                fields |= _flat(item, (*inner, index))
        else:
            fields[dotted(inner)] = value
    return fields
