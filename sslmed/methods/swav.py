"""SwAV: swapping assignments between views (Caron et al., arXiv 2006.09882)."""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed import distributed
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.multi_crop import GLOBAL_VIEWS, MultiCropConfig
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone
from sslmed.models.pending import Pending
from sslmed.models.unit_length import unit
from sslmed.models.view_sizes import accept_scale, of_each_view


class SwAVConfig(MultiCropConfig):
    """The knobs of SwAV. Defaults are the paper's for ImageNet (facebookresearch/swav, main_swav.py), crops aside.

    Attributes:
        prototypes: how many clusters there are. An assignment spreads a batch evenly over them, so that a batch, or
            batch and queue, should have more images than there are prototypes.
        temperature: of the softmax over prototypes.
        epsilon: how soft the assignments are; the larger, the closer to all prototypes alike. Where the loss stays at
            log(prototypes), lower it (reference, README).
        iterations: of Sinkhorn-Knopp.
        freeze_steps: optimizer steps during which the prototypes stay as they were drawn; an epoch of ImageNet at batch
            4096.
        queue: embeddings of earlier batches, of each whole view, that are assigned along with a small batch; the paper
            has 3840 at batch 256. 0 is none.
        queue_from: the epoch, counted from 0, from which the queue is used, if it is full by then.
        hidden: width of the projection head's hidden layer.
        out: width of the projection.
    """

    name: Literal["swav"] = "swav"
    prototypes: Annotated[int, Field(ge=2)] = 3000
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.1
    epsilon: Annotated[float, Field(ge=0.02, le=1)] = 0.05
    iterations: Annotated[int, Field(ge=1, le=100)] = 3
    freeze_steps: Annotated[int, Field(ge=0)] = 313
    queue: Annotated[int, Field(ge=0)] = 0
    queue_from: Annotated[int, Field(ge=0)] = 15
    hidden: Annotated[int, Field(ge=1)] = 2048
    out: Annotated[int, Field(ge=2)] = 128


class SwAV(Method):
    """Each whole view is assigned to prototypes; all other views of the image are to predict its assignment."""

    Config = SwAVConfig
    compares_views = True
    sync_batchnorm = True  # the reference's default (main_swav.py, --sync_bn)
    example_settings: ClassVar[dict[str, Any]] = {
        "prototypes": 6,
        "freeze_steps": 0,
        "hidden": 64,
        "out": 32,
        "local_views": 2,
    }
    overfit = Overfit(steps=30, ratio=0.5)
    config: SwAVConfig

    def __init__(self, config: SwAVConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.local_scale = accept_scale(backbone, config.local_scale) if config.local_views else 1.0
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.out),
        )
        self.prototypes = nn.Linear(config.out, config.prototypes, bias=False)
        self._normalise_prototypes()
        self.queue: torch.Tensor
        self.queued: torch.Tensor
        self.register_buffer("queue", torch.zeros(GLOBAL_VIEWS, config.queue, config.out))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        self._pending = Pending()

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """Two whole views and smaller ones, which differ in nothing else."""
        return self.config.crops(modality, self.local_scale)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What of the views is idle, what never comes, and whether prototypes outnumber the images spread over them."""
        config = self.config
        found = config.crop_notes(modality, self.local_scale)
        if config.prototypes > course.at_once + config.queue:
            found.append(
                f"warning: {course.at_once + config.queue} images are spread over {config.prototypes} prototypes at "
                "a time, so that most stay empty; lower method.prototypes or train.accumulate, or raise "
                "train.batch_size or method.queue"
            )
        if config.freeze_steps >= course.total:
            found.append(
                f"warning: method.freeze_steps is {config.freeze_steps}, and there are {course.total} steps: the "
                "prototypes stay as they are drawn"
            )
        if config.queue and config.queue_from >= course.epochs:
            found.append(
                f"warning: the queue is used from epoch {config.queue_from} (method.queue_from, counted from 0), and "
                f"there are {course.epochs}: it never is"
            )
        return found

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The cross-entropy between the assignments of each whole view and the predictions of all other views."""
        projected = self.projector(of_each_view(self.backbone, batch.views).flatten(0, 1))
        embedded = unit(projected).unflatten(0, (len(batch.views), -1))
        scores = self._scores(embedded).transpose(0, 1)
        config = self.config
        earlier = self._queued_scores(batch.epoch)
        if config.queue:
            whole = embedded[:GLOBAL_VIEWS].detach().transpose(0, 1).contiguous()
            self._pending.add(self, distributed.gather(whole).transpose(0, 1))
        loss = swapped_prediction(scores, config.temperature, config.epsilon, config.iterations, earlier)
        used = torch.zeros_like(scores[0, 0]).index_fill(0, scores[:, 0].detach().argmax(dim=1), 1)
        return {
            "loss": loss,
            "embeddings": embedded[0],
            "prototypes_used": used.float().mean(),
        }

    def before_step(self, progress: Progress) -> None:
        """Frozen prototypes have no gradient, and so no moments and no decay either."""
        if progress.step < self.config.freeze_steps:
            self.prototypes.weight.grad = None

    def after_step(self, progress: Progress) -> None:
        """Prototypes get their length of 1 back, and the step's embeddings enter the queue, the newest first.

        The reference normalises before each forward pass. Only a step changes prototypes, so that this is the same,
        and weights that are saved, or kept by a skipped step, are those that the next forward pass uses.
        """
        if progress.step > self.config.freeze_steps:
            self._normalise_prototypes()
        for arrived in self._pending.take():
            rows = torch.cat([arrived.to(self.queue.dtype), self.queue], dim=1)
            self.queue.copy_(rows[:, : self.config.queue])
            self.queued.add_(arrived.shape[1]).clamp_(max=self.config.queue)

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))

    @torch.no_grad()
    def _queued_scores(self, epoch: int) -> torch.Tensor | None:
        """Scores of this process's part of a full queue: (rows, views, prototypes)."""
        config = self.config
        if not config.queue or epoch < config.queue_from or int(self.queued) < config.queue:
            return None
        mine = self.queue[:, distributed.rank() :: distributed.world_size()]
        return self._scores(mine).transpose(0, 1)

    def _scores(self, embedded: torch.Tensor) -> torch.Tensor:
        """Cosines with the prototypes. bf16 would round them before an epsilon of 0.05 enlarges them."""
        with torch.autocast(embedded.device.type, enabled=False):
            scores: torch.Tensor = self.prototypes(embedded)
            return scores


def swapped_prediction(
    scores: torch.Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """-sum_k q_k log softmax(score / T)_k for each whole view's q and each other view's score; mean over pairs, images.

    arXiv 2006.09882, equations 1, 2 and 6. In fp32 or better.

    Args:
        scores: cosines of embeddings and prototypes (N, V, K); the first two of the V views are whole.
        temperature: T.
        epsilon: see ``assignments``.
        iterations: alike.
        earlier: scores (M, 2, K) of a queue, which are assigned along.
    """
    precision = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(precision)
        prediction = F.log_softmax(scores / temperature, dim=2)
        total = scores.new_zeros(())
        for view in range(GLOBAL_VIEWS):
            rows = scores[:, view] if earlier is None else torch.cat([scores[:, view], earlier[:, view].to(precision)])
            target = assignments(rows, epsilon, iterations)[: len(scores)]
            others = prediction.sum(dim=1) - prediction[:, view]
            total = total - (target * others).sum(dim=1).mean()
        return total / (GLOBAL_VIEWS * (scores.shape[1] - 1))


@torch.no_grad()
def assignments(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Soft assignments (N, K), each row summing to 1, that spread the rows of all processes evenly over K prototypes.

    Sinkhorn-Knopp on exp(scores / epsilon) (arXiv 2006.09882, equations 3 to 5): by turns each prototype's sum, over
    all processes, and each row's are made alike. The reference's constants, and its division by the sum of everything,
    cancel.
    """
    shares = (scores.detach() / epsilon).exp()
    for _ in range(iterations):
        shares = shares / distributed.summed(shares.sum(dim=0))
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares
