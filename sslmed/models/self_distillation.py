"""What self-distillation is made of: the head over prototypes, the centre, the teacher's schedule, the loss."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed import distributed
from sslmed.config import Config
from sslmed.models.momentum import MomentumRule
from sslmed.models.pending import Pending
from sslmed.models.unit_length import unit

Temperature = Annotated[float, Field(gt=0, le=1)]


class DistillationConfig(Config):
    """The knobs of head and teacher (DINO, arXiv 2104.14294; reference facebookresearch/dino, main_dino.py).

    Attributes:
        out: prototypes, the width of the output. On a few thousand images a thousand are plenty.
        hidden: width of the head's two hidden layers.
        bottleneck: width of what is normalised before the last layer.
        norm_last_layer: keep the last layer's rows of length 1; ``false`` lets their lengths train, as the reference
            does for its smallest transformer.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, after its warm-up.
        first_temperature: of the teacher's in the first epoch.
        warmup_epochs: until when it climbs from the one to the other, epoch by epoch.
        centre_momentum: of the running mean of the teacher's outputs, which is taken from them.
        momentum: of the teacher at the start; a cosine leads it to 1. Quoted for a batch of 256, like learning rates.
            The reference has 0.996 at batch 1024, which is 0.999 at 256; a set a thousand times smaller than ImageNet
            needs a shorter memory.
        momentum_rule: ``scaled``, momentum ** (B / 256) at global batch B (Busbridge et al., arXiv 2307.13813), so
            that the memory is one of samples; ``constant``.
        freeze_last_layer: epochs during which the last layer stays as it was drawn.
        clip: greatest norm of the gradient of each tensor by itself; 0 is no limit.
    """

    out: Annotated[int, Field(ge=2)] = 65536
    hidden: Annotated[int, Field(ge=1)] = 2048
    bottleneck: Annotated[int, Field(ge=2)] = 256
    norm_last_layer: bool = True
    student_temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.07
    first_temperature: Temperature = 0.04
    warmup_epochs: Annotated[int, Field(ge=0)] = 30
    centre_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.996
    momentum_rule: MomentumRule = "scaled"
    freeze_last_layer: Annotated[int, Field(ge=0)] = 1
    clip: Annotated[float, Field(ge=0)] = 3.0

    def freeze_notes(self, epochs: int) -> list[str]:
        """What to say before a training of so many epochs if the last layer is never set free."""
        if self.freeze_last_layer < epochs:
            return []
        return [
            f"warning: method.freeze_last_layer is {self.freeze_last_layer} epochs, and {epochs} are begun: the last "
            "layer stays as it is drawn"
        ]

    def temperature(self, epoch: int) -> float:
        """The teacher's temperature in an epoch, counted from 0: on a line to the last epoch of the warm-up."""
        if epoch >= self.warmup_epochs:
            return self.teacher_temperature
        share = epoch / max(1, self.warmup_epochs - 1)
        return self.first_temperature + share * (self.teacher_temperature - self.first_temperature)


class DistillationHead(nn.Module):
    """Three linear layers with GELU between them, normalised to length 1, then a layer of rows of length 1.

    Features (..., features) become cosines with ``out`` prototypes, times each one's length where that trains (paper,
    section 3, "Network architecture", and appendix C). Linear layers are drawn from N(0, 0.02^2), truncated, biases 0.

    Args:
        batchnorm: put BatchNorm after the hidden layers.
    """

    def __init__(self, features: int, config: DistillationConfig, batchnorm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (features, config.hidden):
            layers.append(nn.Linear(width, config.hidden))
            if batchnorm:
                layers.append(nn.BatchNorm1d(config.hidden))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(config.hidden, config.bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last: nn.Linear = nn.Linear(config.bottleneck, config.out, bias=False)
        self.lengths = None if config.norm_last_layer else nn.Parameter(torch.ones(config.out, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (..., out)."""
        return self.logits(self.embed(features))

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """The bottleneck (..., bottleneck), of length 1, in fp32 or better."""
        narrow = self.mlp(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return unit(narrow)

    def logits(self, embedded: torch.Tensor) -> torch.Tensor:
        """Logits (..., out) of what ``embed`` gives. bf16 would round cosines that a temperature of 0.04 enlarges."""
        with torch.autocast(embedded.device.type, enabled=False):
            rows = F.normalize(self.last.weight, dim=1)
            return F.linear(embedded, rows if self.lengths is None else rows * self.lengths)

    def last_layer(self) -> list[nn.Parameter]:
        """The parameters behind the bottleneck."""
        return [*self.last.parameters()] + ([] if self.lengths is None else [self.lengths])


class Centre(nn.Module):
    """The running mean of the teacher's outputs over all processes (arXiv 2104.14294, equation 4).

    It moves after a performed step, to the mean over everything that the step has seen.
    """

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.value: torch.Tensor
        self.register_buffer("value", torch.zeros(width))
        self._sums, self._counts = Pending(), Pending()

    def note(self, module: nn.Module, outputs: torch.Tensor) -> None:
        """Keep the sum of outputs (..., width) that ``loss`` of ``module`` has seen; as many on every process."""
        rows = outputs.detach().flatten(0, -2).to(self.value.dtype)
        self._sums.add(module, rows.sum(dim=0))
        self._counts.add(module, rows.new_tensor(len(rows)))

    def move(self) -> None:
        """value <- momentum * value + (1 - momentum) * mean of what was noted since the last step."""
        sums, counts = self._sums.take(), self._counts.take()
        if sums:
            mean = distributed.mean(torch.stack(sums).sum(dim=0)) / torch.stack(counts).sum()
            self.value.lerp_(mean, 1 - self.momentum)


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """Cross-entropy of each view's student with each other view's teacher, mean over pairs and images.

    arXiv 2104.14294, equations 1 to 3: the student sees all views, the teacher the first ones. In fp32 or better.

    Args:
        student: logits (N, V, K).
        teacher: logits (N, G, K) of the first G of the V views; no gradient reaches them.
        centre: (K,), taken from the teacher's.
    """
    with torch.autocast(student.device.type, enabled=False):
        target = targets(teacher, centre, teacher_temperature)
        prediction = log_softmax(student, student_temperature)
        pairs = -torch.einsum("ngk,nvk->gv", target.to(prediction.dtype), prediction) / len(student)
        same = pairs.diagonal()  # a view with itself
        return (pairs.sum() - same.sum()) / (pairs.numel() - same.numel())


@torch.no_grad()
def targets(teacher: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """The teacher's distributions (..., K): softmax((t - centre) / temperature), in fp32 or better."""
    wide = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
    return F.softmax((wide - centre.to(wide.dtype)) / temperature, dim=-1)


def log_softmax(student: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logarithms of the student's distributions (..., K), in fp32 or better."""
    return F.log_softmax(student.to(torch.promote_types(student.dtype, torch.float32)) / temperature, dim=-1)


def entropy(distributions: torch.Tensor) -> torch.Tensor:
    """Mean entropy of distributions (..., K), nats: 0 when each has one outcome, log K when all are alike."""
    mean: torch.Tensor = torch.special.entr(distributions).sum(dim=-1).mean()
    return mean
