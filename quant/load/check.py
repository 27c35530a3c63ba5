"""Checks the weights of a diffusers model before they are loaded, from its configuration and the files' headers."""

from pathlib import Path

from diffusers import ModelMixin

from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.load.fill import check_headers
from halfbyte.quant.load.limits import refuse_oversized
from halfbyte.quant.load.on_meta import built_on_meta
from halfbyte.quant.load.serialize import CONFIG_FILE
from halfbyte.quant.load.tensor_names import own_names
from halfbyte.quant.load.transformer import blame_config, read_config, stored_quantization


def check_model(model_cls: type[ModelMixin], folder: Path) -> None:
    """Checks that `load_quantized` would find every tensor of the model in its shape, and no others.

    Takes a fraction of a second, whatever the size of the model. Raises ValueError, naming the file.
    """
    config, stored = read_config(folder, model_cls.__name__), stored_quantization(folder)
    with ShardedWeights(folder) as weights:
        refuse_oversized(config, folder / CONFIG_FILE, most_layers=len(weights.names))
        with built_on_meta():
            with blame_config(folder / CONFIG_FILE, model_cls):
                model: ModelMixin = model_cls.from_config(config)
            if stored is not None:
                convert(model, stored, check_skip=False)
        weights.use_names(own_names(weights.names, model.state_dict()))
        check_headers(model, weights, packed=stored is not None)
