"""What fine-tuning starts from, and the recipe with what a card decides filled in: what runs is what is recorded."""

import json
from dataclasses import dataclass
from pathlib import Path

from sslmed import artifact
from sslmed.config import UsageError
from sslmed.data import modality
from sslmed.data.loading import DataConfig
from sslmed.data.modality import Modality
from sslmed.data.store import Store
from sslmed.models.backbones import BackboneConfig
from sslmed.recipe import FinetuneRecipe
from sslmed.training.starts import Start, start, worded

RANDOM, IMAGENET = "random", "imagenet"


@dataclass(frozen=True)
class Begun:
    """Start weights, the architecture that has them as its card will say it, and the recipe as it will run."""

    start: Start
    backbone: BackboneConfig
    settings: FinetuneRecipe


def begin(settings: FinetuneRecipe, store: Store, source: str | Path) -> Begun:
    """The backbone with the weights that ``source`` names, and what a card decides filled into the recipe.

    Args:
        source: ``random``, ``imagenet``, a run or artifact, or a weight file.

    Raises:
        UsageError: the recipe names no backbone where the source has none, or another than the artifact's.
        MissingInputError: nothing is there.
        DataError: an artifact that does not fit the store, or weights that do not fill the network.
    """
    named = settings.backbone
    if named is not None and named.init != RANDOM:
        raise UsageError(
            f"backbone.init is {named.init}, but fine-tuning starts from what --from names; remove backbone.init, "
            f"and give --from {named.init}"
        )
    held = Path(source)
    if str(source) not in (RANDOM, IMAGENET) and not held.is_file():
        config, settings = _of_card(settings, store, source)
    elif named is None or "name" not in named.model_fields_set:
        raise UsageError(f"--from {source} needs a backbone in the recipe; add backbone.name=resnet18")
    else:
        config = named
    wanted = config.model_copy(update={"init": str(source)})
    begun = start(wanted, settings.data.size, policy_of(settings, store), settings.train.seed)
    return Begun(begun, config if begun.card else worded(config, begun.kind), settings)


def policy_of(settings: FinetuneRecipe, store: Store) -> Modality:
    """The store's modality with the windows and views of the recipe."""
    policy = modality.with_windows(modality.named(store.modality), settings.data.windows)
    return modality.with_views(policy, settings.views)


def _of_card(settings: FinetuneRecipe, store: Store, source: str | Path) -> tuple[BackboneConfig, FinetuneRecipe]:
    card, named = artifact.read_card(source), settings.backbone
    config = card.backbone
    if named is not None:
        given = named.model_fields_set
        if "name" in given and named.name != card.backbone.name:
            raise UsageError(
                f"the recipe names backbone {named.name}, but {source} holds {card.backbone.name}; "
                "remove backbone from the recipe, or use --from random"
            )
        if "drop_path" in given:  # it has no weights
            config = config.model_copy(update={"drop_path": named.drop_path})
        settings = settings.model_copy(update={"backbone": config.model_copy(update={"init": RANDOM})})
    artifact.check_fits(card, store.modality, int(store.index.channels.max()))
    artifact.policy(card)  # refuses one that normalises otherwise
    return config, settings.model_copy(update={"data": _data(settings.data, card, source)})


def _data(data: DataConfig, card: artifact.Card, source: str | Path) -> DataConfig:
    for key, given, held in (("windows", data.windows, card.windows), ("slices", data.slices, card.slices)):
        if key in data.model_fields_set and given != held:
            raise UsageError(
                f"data.{key} is {json.dumps(given)}, but {source} was trained with {json.dumps(held)}; "
                f"remove data.{key}"
            )
    size = data.size if "size" in data.model_fields_set else card.size
    return data.model_copy(update={"size": size, "windows": card.windows, "slices": card.slices})
