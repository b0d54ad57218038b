"""Pretext tasks. A new one is a file here and a line in METHODS."""

from sslmed import torchvision_ops

torchvision_ops.mend()

from sslmed.methods.barlow_twins import BarlowTwins
from sslmed.methods.byol import BYOL
from sslmed.methods.context_encoder import ContextEncoder
from sslmed.methods.context_restoration import ContextRestoration
from sslmed.methods.denoising import Denoising
from sslmed.methods.dino import DINO
from sslmed.methods.ibot import IBOT
from sslmed.methods.ijepa import IJEPA
from sslmed.methods.jigsaw import Jigsaw
from sslmed.methods.mae import MAE
from sslmed.methods.method import Method
from sslmed.methods.moco_v2 import MoCoV2
from sslmed.methods.moco_v3 import MoCoV3
from sslmed.methods.models_genesis import ModelsGenesis
from sslmed.methods.relative_position import RelativePosition
from sslmed.methods.rotation import Rotation
from sslmed.methods.simclr import SimCLR
from sslmed.methods.simmim import SimMIM
from sslmed.methods.simsiam import SimSiam
from sslmed.methods.swav import SwAV
from sslmed.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "simsiam": SimSiam,
    "byol": BYOL,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
    "dino": DINO,
    "ibot": IBOT,
    "mae": MAE,
    "simmim": SimMIM,
    "ijepa": IJEPA,
    "rotation": Rotation,
    "jigsaw": Jigsaw,
    "relative_position": RelativePosition,
    "denoising": Denoising,
    "context_encoder": ContextEncoder,
    "context_restoration": ContextRestoration,
    "models_genesis": ModelsGenesis,
}
