"""MoCo v2: momentum contrast (He et al., arXiv 1911.05722; version 2: Chen et al., arXiv 2003.04297)."""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslmed import config, distributed
from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone
from sslmed.models.masking import keyed_noise
from sslmed.models.momentum import MomentumRule, follow, follower, momentum_at, momentum_notes
from sslmed.models.pending import Pending
from sslmed.models.twins import twin_accuracy
from sslmed.models.unit_length import unit

NOBODY = -1  # the group of a key that was drawn, not computed
ALONE = -2  # the group of a query that all keys repel


class MoCoV2Config(config.Config):
    """The knobs of MoCo v2.

    Attributes:
        temperature: of the softmax: 0.2 in version 2 (0.07 in version 1), and in MoCo-CXR (arXiv 2010.05352).
        momentum: of the key encoder, the same all through: 0.999 (arXiv 1911.05722, section 4.1). Quoted for a batch of
            256, the paper's. A few hundred steps on a small set want a shorter memory, but one that outlasts the queue:
            0.5 collapsed on X-rays at batch 64 and queue 1,024, where 0.99 learnt.
        momentum_rule: ``scaled``, momentum ** (B / 256) at global batch B (Busbridge et al., arXiv 2307.13813), so
            that the memory is one of samples; ``constant``.
        queue: keys of earlier images that repel, a multiple of the batch size: 65,536 for 1.28 million images. Take
            well below the number of images: an image's own earlier keys repel it like any other.
        hidden: width of the projection head's hidden layer; 2048 is ResNet-50's feature width.
        out: width of the projection.
        shuffle_size: images that BatchNorm sees together, 32 in the paper (256 on 8 GPUs); keys are grouped in another
            order than queries ("Shuffling BN", section 3.3). 0 takes all of a process's images together, unshuffled.
    """

    name: Literal["moco_v2"] = "moco_v2"
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    momentum_rule: MomentumRule = "scaled"
    queue: Annotated[int, Field(ge=1)] = 65536
    hidden: Annotated[int, Field(ge=1)] = 2048
    out: Annotated[int, Field(ge=2)] = 128
    shuffle_size: Annotated[int, Field(ge=0)] = 32

    @field_validator("shuffle_size")
    @classmethod
    def _normalises(cls, size: int) -> int:
        if size == 1:
            raise ValueError("shuffle_size is 1, of which BatchNorm has no statistics; allowed: 0, or 2 and more")
        return size


class MoCoV2(Method):
    """An image's key, by a slowly following encoder, attracts its query; a queue of earlier images' keys repels it."""

    Config = MoCoV2Config
    compares_views = True
    example_settings: ClassVar[dict[str, Any]] = {"queue": 64, "hidden": 64, "out": 32}
    # the queue changes with every step, and with it the loss of guessing
    overfit = Overfit(steps=60, quantity="twin_accuracy", least=0.9)
    config: MoCoV2Config
    queue: torch.Tensor
    queue_groups: torch.Tensor
    pointer: torch.Tensor

    def __init__(self, config: MoCoV2Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, config.hidden), nn.ReLU(inplace=True), nn.Linear(config.hidden, config.out)
        )
        self.key_backbone = follower(self.backbone)
        self.key_projector = follower(self.projector)
        self.register_buffer("queue", F.normalize(torch.randn(config.out, config.queue), dim=0))
        self.register_buffer("queue_groups", torch.full((config.queue,), NOBODY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the oldest key, which goes first
        self._new_keys, self._new_groups = Pending(), Pending()

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """Both views come from the same distribution."""
        return modality.view, modality.view

    def check(self, course: Course) -> None:
        """The queue must hold whole batches, as in the reference.

        Raises:
            UsageError: the queue is no multiple of the batch.
        """
        length, batch_size = self.config.queue, course.batch_size
        if length % batch_size:
            below = length // batch_size * batch_size
            near = " or ".join(str(each) for each in (below, below + batch_size) if each)
            raise UsageError(
                f"method.queue is {length} with train.batch_size {batch_size}; allowed: multiples of the batch size. "
                f"Give method.queue={near}, or another train.batch_size"
            )

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What the momentum becomes at this batch size, and where shuffling cannot help."""
        settings = self.config
        found = momentum_notes(course.batch_size, settings.momentum, settings.momentum_rule)
        if self._shuffles and course.processes * self._groups(course.at_once // course.processes) < 2:
            found.append(
                f"note: {course.at_once} images at a time are one group of method.shuffle_size "
                f"{settings.shuffle_size}, so that BatchNorm may tell a key of this batch from older ones; lower "
                "method.shuffle_size or train.accumulate, or raise train.batch_size"
            )
        return found

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The first views are queries, the second ones keys."""
        projections = self._in_groups(nn.Sequential(self.backbone, self.projector), batch.views[0])
        with torch.no_grad():
            everyone = unit(self._keys(batch))
        start = distributed.rank() * len(projections)
        keys = everyone[start : start + len(projections)]
        self._new_keys.add(self, everyone)
        self._new_groups.add(self, distributed.gather(batch.groups))
        # without positives of other images an image's group is its row, and its own older keys repel, as in the paper
        groups = torch.where((batch.groups != batch.ids).any(), batch.groups, ALONE)
        found = info_nce(projections, keys, self.queue, self.config.temperature, groups, self.queue_groups)
        return found | {"embeddings": projections, "twin_accuracy": twin_accuracy(projections, keys)}

    def after_step(self, progress: Progress) -> None:
        """The key encoder follows, and the step's keys take the place of the oldest.

        The reference moves the encoder before it computes keys, by weights that have not changed since the last step:
        the same.
        """
        settings = self.config
        online, average = self.averaged
        follow(average, online, momentum_at(progress.batch_size, settings.momentum, settings.momentum_rule))
        keys, groups = torch.cat(self._new_keys.take()), torch.cat(self._new_groups.take())
        places = self.pointer + torch.arange(len(keys), device=keys.device)  # whole batches: they never wrap
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.queue_groups[places] = groups
        self.pointer.add_(len(keys)).remainder_(settings.queue)

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """Backbone and projector, and the key encoder's."""
        online = nn.ModuleList([self.backbone, self.projector])
        return online, nn.ModuleList([self.key_backbone, self.key_projector])

    @property
    def _shuffles(self) -> bool:
        return self.config.shuffle_size > 0 and any(isinstance(part, _BatchNorm) for part in self.modules())

    def _keys(self, batch: Batch) -> torch.Tensor:
        """Projections of the second views of all processes, in rank order; BatchNorm has seen them in another order."""
        network, images = nn.Sequential(self.key_backbone, self.key_projector), batch.views[1]
        if not self._shuffles:
            return distributed.gather(network(images))
        noise = keyed_noise(batch.seed, batch.epoch, batch.ids, 1, "shuffle").to(images.device)
        order = distributed.gather(noise)[:, 0].argsort(stable=True)
        mine = order[distributed.rank() * len(images) :][: len(images)]
        shuffled = distributed.gather(self._in_groups(network, distributed.gather(images.contiguous())[mine]))
        return shuffled[order.argsort()]

    def _in_groups(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        groups = self._groups(len(images)) if self._shuffles else 1
        return torch.cat([network(group) for group in images.tensor_split(groups)])

    def _groups(self, images: int) -> int:
        """In how many groups BatchNorm sees as many images of a process."""
        return max(1, images // self.config.shuffle_size)


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    queue: torch.Tensor,
    temperature: float,
    groups: torch.Tensor | None = None,
    queue_groups: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """InfoNCE, mean over queries (arXiv 1911.05722, equation 1).

    Args:
        queries: (N, D); row i's positive is row i of ``keys``.
        keys: (N, D), without gradient.
        queue: (D, K), columns of length 1.
        groups: (N,); keys of the queue in a query's group, ``queue_groups`` (K,), do not repel it.

    Returns:
        ``loss``, and ``accuracy``, the share of queries that are nearest to their own key.
    """
    logits = similarities(queries, unit(keys.detach()), queue, temperature, groups, queue_groups)
    loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return {"loss": loss, "accuracy": (logits[:, :1] > logits[:, 1:]).all(dim=1).float().mean()}


def similarities(
    queries: torch.Tensor,
    keys: torch.Tensor,
    queue: torch.Tensor,
    temperature: float,
    groups: torch.Tensor | None,
    queue_groups: torch.Tensor | None,
) -> torch.Tensor:
    """Cosines over temperature of queries with their own key, then with the queue's: (N, 1 + K), fp32 or better."""
    with torch.autocast(queries.device.type, enabled=False):
        q = unit(queries)
        negative = q @ queue.to(q.dtype)
        if groups is not None and queue_groups is not None:
            negative = negative.masked_fill(groups[:, None] == queue_groups, -torch.inf)
        return torch.cat([(q * keys.to(q.dtype)).sum(dim=1, keepdim=True), negative], dim=1) / temperature
