"""SimCLR: a simple framework for contrastive learning (Chen et al., arXiv 2002.05709; version 2, arXiv 2006.10029)."""

import itertools
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed import config, distributed
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Method
from sslmed.models.backbones import Backbone


class SimCLRConfig(config.Config):
    """The knobs of SimCLR.

    Attributes:
        temperature: of the softmax. The paper's best is 0.1 for ImageNet at batch 4096, and 0.5 for CIFAR-10
            (reference README); MoCo-CXR (arXiv 2010.05352) uses 0.2 on chest X-rays.
        head_layers: linear layers of the projection head; 2 in version 1, 3 in version 2.
        hidden: width between them; 2048 is ResNet-50's feature width.
        out: width of the projection.
        pool_batchnorm: normalise both views together, as the reference does (its global BatchNorm sees the
            concatenated views).
    """

    name: Literal["simclr"] = "simclr"
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.2
    head_layers: Annotated[int, Field(ge=1, le=4)] = 2
    hidden: Annotated[int, Field(ge=1)] = 2048
    out: Annotated[int, Field(ge=2)] = 128
    pool_batchnorm: bool = True


class SimCLR(Method):
    """Two views of an image attract each other; every other image of the global batch repels."""

    Config = SimCLRConfig
    compares_views = True
    sync_batchnorm = True  # global_bn is on by default (google-research/simclr, run.py; paper, section 2.2)
    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = projection_head(backbone.num_features, config.hidden, config.out, config.head_layers)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """Both views come from the same distribution."""
        return modality.view, modality.view

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """NT-Xent between the projections of the two views."""
        first, second = self._project(batch.views[0], batch.views[1])
        return {"loss": nt_xent(first, second, self.config.temperature, batch.groups), "embeddings": first}

    def _project(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.config.pool_batchnorm:
            return self.projector(self.backbone(first)), self.projector(self.backbone(second))
        both = self.projector(self.backbone(torch.cat([first, second])))
        return both[: len(first)], both[len(first) :]


def nt_xent(
    first: torch.Tensor, second: torch.Tensor, temperature: float, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """The normalised temperature-scaled cross-entropy (arXiv 2002.05709, equation 1), mean over all 2N views.

    Negatives come from every process; positives are row i of the two (N, D) inputs. The reference code returns twice
    this. Rows of equal ``groups`` (N,) are no negatives of each other: they leave the denominator.
    """
    precision = torch.promote_types(first.dtype, torch.float32)  # exp(1 / temperature) overflows half precision
    with torch.autocast(first.device.type, enabled=False):
        local = torch.stack([F.normalize(first.to(precision)), F.normalize(second.to(precision))], dim=1)
        anchors = local.flatten(0, 1)  # a1 b1 a2 b2 ...: rank blocks stay contiguous
        everyone = distributed.gather(anchors)
        logits = anchors @ everyone.T / temperature
        here = torch.arange(len(anchors), device=logits.device)
        offset = distributed.rank() * len(anchors)
        positive = (here ^ 1) + offset
        logits = logits.index_put((here, here + offset), torch.full_like(logits[:, 0], -torch.inf))
        if groups is not None:
            own = groups.repeat_interleave(2)
            friends = own[:, None] == distributed.gather(own)[None]
            friends[here, positive] = False
            logits = logits.masked_fill(friends, -torch.inf)
        return F.cross_entropy(logits, positive)


def projection_head(features: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU ... Linear, BatchNorm without shift; no biases; weights from N(0, 0.01^2).

    As in the reference (google-research/simclr, model_util.py).
    """
    widths = [features, *[hidden] * (layers - 1), out]
    modules: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        linear = nn.Linear(before, after, bias=False)
        nn.init.normal_(linear.weight, std=0.01)
        norm = nn.BatchNorm1d(after)
        modules += [linear, norm]
        if number < layers:
            modules.append(nn.ReLU(inplace=True))
        else:
            norm.register_parameter("bias", None)
    return nn.Sequential(*modules)
