"""Trains runs from a base on a loopback Hub, for the tests of pushes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hub_store import Repository, Store, account
from loopback_hub import State, serving
from push_worker import PushWorker
from runs import write_recipe

TOKEN = "hf_aVerySecretTokenOfTheTests"
PROMPTS = ["a gradient", "another | one"]
BASE = "black-forest/toy"
BASE_CARD = """---
license: other
license_name: toy-non-commercial
license_link: LICENSE.md
---
# A toy
"""


@dataclass
class PushedTo:
    """A Hub with a base, an account that may write, and a worker process that runs commands against it."""

    hub: State
    worker: PushWorker
    folder: Path

    @property
    def store(self) -> Store:
        return self.hub.store


@contextmanager
def hub_with_base(folder: Path, base: Path) -> Iterator[PushedTo]:
    """Serves a Hub with the pipeline in folder `base` as repository BASE, which gets its own model card."""
    store = Store(accounts={TOKEN: account("ann", orgs={"we": "write", "readers": "read"})})
    repository = store.add(Repository.of_folder(BASE, base))
    tree = dict(repository.tree)
    tree["README.md"] = type(next(iter(tree.values())))(BASE_CARD.encode(), large=False)
    repository.commit(tree)
    with serving(store) as state, PushWorker(state.endpoint, folder / "home", TOKEN) as worker:
        yield PushedTo(state, worker, folder)


def train(to: PushedTo, *overrides: str, name: str = "dog") -> Path:
    """Trains a few steps with the base on the Hub and returns the run's folder."""
    recipe = write_recipe(to.folder, Path("./base"), name=name)
    answer = to.worker.run("train", str(recipe), f"model.path={BASE}", *overrides)
    assert answer.code == 0, answer.output
    return to.folder / name
