"""Fixtures of the tests of plans."""

import json
from pathlib import Path

import pytest

from halfbyte.trainer.plan.published_configs import write_configurations

_SMALLER = {
    "transformer": {"num_layers": 4, "num_single_layers": 8},
    "text_encoder_2": {"num_layers": 2},
    "vae": {"block_out_channels": [32] * 4},
}


@pytest.fixture(scope="session")
def shallow_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations of FLUX.1-dev at full width with a fifth of the blocks, so dry runs are five times faster.

    T5 and the VAE are small, so that the training step takes the most memory, as in the full model.
    """
    folder = write_configurations(tmp_path_factory.mktemp("shallow") / "flux", "black-forest-labs/FLUX.1-dev")
    for component, fields in _SMALLER.items():
        config = folder / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return folder
