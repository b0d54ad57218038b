"""How the families of published weights call their tensors: one table, and what each family's licence usually is.

Facts from torchvision's, lightly's and timm's modules and from the reference repositories of the papers.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from sslmed.config import UsageError

State = dict[str, torch.Tensor]
Changes = list[tuple[str, str, str]]  # the tensor's name, what it was, what it became
Convert = Callable[[State, State], tuple[State, Changes]]
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

CLASSIFIERS = ("fc", "head", "heads", "classifier")  # as torchvision, timm and others call theirs

# What no backbone has, wherever it stands: parts of the pretext task, and buffers that a network makes anew.
_NO_BACKBONE = (
    r"(^|\.)(projector|predictor|decoder|mask_token|prototypes|queue|queue_ptr|centers?)(\.|_|$)",
    r"(^|_)(projection|prediction|student|teacher|target|momentum)_(head|projector|predictor|classifier)",
    r"^(momentum|target|teacher|ema)_(backbone|encoder|network)\.",
    r"\.(relative_position_index|relative_coords_table|attn_mask)$",
)


@dataclass(frozen=True)
class Names:
    """How one architecture is called: patterns and what they become in timm, in turn.

    ``convert`` changes tensors under timm's names where another name is not all; it gets those that were found and
    the network's, and returns all that were found, with a line for each change.
    """

    rules: tuple[Rule, ...] = ()
    convert: Convert | None = None

    def renamed(self, name: str) -> str:
        """The name in timm; what has no rule stays."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class KeyLayout:
    """One family of files.

    Attributes:
        name: as ``--layout`` takes it.
        files: what it is of, for people.
        signs: patterns; a file is of this family when each is found in some name. Without signs, only when asked for.
        wrappers: keys of a checkpoint that hold the tensors, the preferred first.
        prefixes: what the names have before them, the preferred first; ``module.`` and ``_orig_mod.`` do not count.
        names: of its architectures.
        dropped: patterns of names that are left out by design, beside what no backbone has.
        licence: usual one of its published files; empty where they differ.
        source: where that is said.
        note: what a user should know.
    """

    name: str
    files: str
    signs: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    names: tuple[Names, ...] = (Names(),)
    dropped: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    note: str = ""

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is of this family."""
        listed = list(names)
        return bool(self.signs) and all(any(re.search(sign, name) for name in listed) for sign in self.signs)

    @property
    def usual_licence(self) -> str:
        """The licence that nobody has stated, in words; empty where files of the family differ."""
        return f"{self.licence} (usual for the files of {self.name}; not stated)" if self.licence else ""

    def drops(self, name: str, prefix: str = "") -> bool:
        """Whether a tensor is left out by design, where the network is the one under ``prefix``."""
        copies = tuple(other for other in self.prefixes if other not in ("", prefix))
        if name.startswith(copies) and not name.startswith(prefix):
            return True
        return any(re.search(pattern, name) for pattern in (*_NO_BACKBONE, *self.dropped))


def named(name: str) -> KeyLayout:
    """The layout of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in KEY_LAYOUTS:
        near = difflib.get_close_matches(name, KEY_LAYOUTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"'{name}' is no layout that it knows{hint}\nallowed: {', '.join(KEY_LAYOUTS)}")
    return KEY_LAYOUTS[name]


# Rules.


def _stage(form: str) -> Callable[[re.Match[str]], str]:
    """torchvision counts downsampling too: 1, 3, 5, 7 are the stages 0 to 3, and 2, 4, 6 lead to the stages 1 to 3."""
    return lambda found: form.format(int(found[1]) // 2, *found.groups()[1:])


def _reshaped(tensors: State, wanted: State) -> tuple[State, Changes]:
    """Drop or add axes of length one: layer scales (C, 1, 1), and linear layers that are convolutions of one pixel."""
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".gamma", ".mlp.fc1.weight", ".mlp.fc2.weight")) and name in wanted:
            shape = wanted[name].shape
            if [side for side in tensor.shape if side != 1] == [side for side in shape if side != 1]:
                changed[name] = tensor.reshape(shape)
    return changed, []


def _folded(tensors: State, wanted: State) -> tuple[State, Changes]:
    """Add the class token's position to it, where the network has positions of patches alone.

    DINOv2 puts registers between the two, after positions were added; timm adds positions before either is there
    (arXiv 2309.16588).
    """
    cls, table, registers = (tensors.get(name) for name in ("cls_token", "pos_embed", "reg_token"))
    if cls is None or table is None or registers is None or "reg_token" not in wanted or table.ndim != 3:
        return tensors, []
    folded = {"cls_token": cls + table[:, :1], "pos_embed": table[:, 1:]}
    return tensors | folded, [("cls_token", "apart", "with its position")]


_BLOCK_MLP: tuple[Rule, ...] = ((r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.3\.", ".mlp.fc2."))
_TORCHVISION_VIT = Names(
    (
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.linear_([12])\.", r".mlp.fc\1."),  # of files older than torchvision 0.12
        *_BLOCK_MLP,
    )
)
_TORCHVISION_CONVNEXT = Names(
    (
        (r"^features\.0\.([01])\.", r"stem.\1."),
        (r"^features\.([1357])\.(\d+)\.", _stage("stages.{}.blocks.{}.")),
        (r"^features\.([246])\.([01])\.", _stage("stages.{}.downsample.{}.")),
        (r"\.layer_scale$", ".gamma"),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"^classifier\.0\.", "head.norm."),
    ),
    _reshaped,
)
_TORCHVISION_SWIN = Names(
    (
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.([1357])\.(\d+)\.", _stage("layers.{}.blocks.{}.")),
        (r"^features\.([246])\.", _stage("layers.{}.downsample.")),
        *_BLOCK_MLP,
    )
)
_OLD_DENSENET = Names(((r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),))  # torchvision's published files
# The children of a torchvision or timm ResNet without its last: ReLU and pooling, 2 and 3, have no tensors.
_SEQUENTIAL_RESNET = Names(
    ((r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^([4567])\.", lambda found: f"layer{int(found[1]) - 3}."))
)
# Averaged tokens have their norm after the mean.
_AVERAGED = Names(((r"^norm\.", "fc_norm."),))
_DINOV2 = Names(
    (
        (r"^register_tokens$", "reg_token"),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # in chunks; the second number counts through
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    _folded,
)

_NC = "CC-BY-NC-4.0"
_FAMILIES = (
    KeyLayout(
        "sslmed",
        "checkpoints of sslmed",
        (r"^backbone\.network\.",),
        ("state_dict",),
        ("backbone.network.",),
        dropped=(r"^(target|teacher|momentum)_", r"^(head|loss|tokens?|encoder|queue)(\.|$)"),
        note="an artifact of a run needs no import, and knows more",
    ),
    KeyLayout(
        "moco",
        "MoCo v1 and v2",
        (r"^encoder_[qk]\.",),
        ("state_dict",),
        ("encoder_q.", "encoder_k."),
        dropped=(r"^queue", r"^encoder_[qk]\.(fc|head)\.\d"),
        licence=_NC,
        source="LICENSE of facebookresearch/moco",
    ),
    KeyLayout(
        "moco-v3",
        "MoCo v3",
        (r"^base_encoder\.",),
        ("state_dict",),
        ("base_encoder.", "momentum_encoder."),
        dropped=(r"^(base|momentum)_encoder\.(fc|head)\.\d",),
        licence=_NC,
        source="LICENSE of facebookresearch/moco-v3",
    ),
    KeyLayout(
        "dinov2",
        "DINOv2, with and without registers",
        (r"(^|\.)mask_token$", r"\.ls1\.gamma$"),
        ("teacher", "student", "model"),
        ("", "teacher.backbone.", "backbone.", "student.backbone."),
        (_DINOV2,),
        (r"(^|\.)(dino|ibot)_head\.",),
        "Apache-2.0",
        "README of facebookresearch/dinov2; its models for X-rays and cells have other licences",
    ),
    KeyLayout(
        "dino",
        "DINO's full checkpoints; its other files have timm's names",
        (r"(^|\.)head\.(last_layer|mlp)\.",),
        ("teacher", "student"),
        ("backbone.", "teacher.backbone.", "student.backbone."),
        dropped=(r"^((teacher|student)\.)?head\.",),
        licence="Apache-2.0",
        source="LICENSE of facebookresearch/dino",
    ),
    KeyLayout(
        "mae",
        "MAE; files without the decoder have timm's names",
        (r"^decoder_(blocks|embed)\.",),
        ("model",),
        names=(Names(), _AVERAGED),
        dropped=(r"^decoder_", r"^mask_token$"),
        licence=_NC,
        source="LICENSE of facebookresearch/mae",
        note="--pool avg puts its last norm after the mean of the tokens, where fine-tuning of the paper begins anew",
    ),
    KeyLayout(
        "medical-mae",
        "Medical MAE: ViTs as MAE's, DenseNets in a U-Net",
        (r"^model\.segmentation_head\.", r"^model\.encoder\.features\."),
        ("model",),
        ("", "model.encoder."),
        (Names(), _AVERAGED),
        (r"^decoder_", r"^mask_token$", r"^model\.(decoder|segmentation_head)\."),
        _NC,
        "lambert-x/medical_mae states none, but its code is made from MAE's, which has this one",
        "trained on images of ImageNet's mean and deviation",
    ),
    KeyLayout(
        "torchxrayvision",
        "torchxrayvision's DenseNets and ResNets",
        (r"^op_threshs$",),
        ("state_dict",),
        ("", "model."),
        dropped=(r"^op_threshs$",),
        licence="Apache-2.0",
        source="LICENSE of mlmed/torchxrayvision; the licences of its training images differ",
        note="trained on intensities in [-1024, 1024]: see docs/importing.md",
    ),
    KeyLayout(
        "lightly",
        "models written like lightly's examples",
        (
            r"^(student_|teacher_)?backbone(_momentum)?\.((0|1|4)\.|vit\.)|^(student|teacher)_backbone\."
            r"|^(student_|teacher_)?(projection_|prediction_)?head(_momentum)?\.layers\.",
        ),
        ("state_dict",),
        tuple(
            f"{part}{inner}"
            for part in ("teacher_backbone.", "backbone.", "student_backbone.", "backbone_momentum.")
            for inner in ("vit.", "")
        ),
        (Names(), _SEQUENTIAL_RESNET, _TORCHVISION_VIT),
        (r"^(student_|teacher_)?(projection_|prediction_)?head(_momentum)?\.", r"\.vit\.heads?\."),
        source="weights are of whoever trained them",
    ),
    KeyLayout(
        "solo-learn",
        "solo-learn",
        (r"^(backbone|encoder)\.", r"^(projector|classifier|predictor|prototypes|momentum_(backbone|encoder))(\.|$)"),
        ("state_dict",),
        ("backbone.", "encoder.", "momentum_backbone.", "momentum_encoder."),
        dropped=(r"^(momentum_)?(projector|predictor|classifier|prototypes)(\.|$)", r"^queue", r"^dino_loss"),
        licence="MIT",
        source="LICENSE of vturrisi/solo-learn",
    ),
    KeyLayout(
        "torchvision",
        "torchvision's ViT, Swin, ConvNeXt and DenseNet files; its ResNets have timm's names",
        (r"^encoder\.layers\.encoder_layer_0\.|^features\.1\.0\.(layer_scale$|attn\.qkv\.)|\.denselayer1\.norm\.1\.",),
        ("state_dict", "model_ema", "model"),
        names=(Names(), _TORCHVISION_VIT, _TORCHVISION_CONVNEXT, _TORCHVISION_SWIN, _OLD_DENSENET),
        dropped=(r"^heads\.", r"^head\.(weight|bias)$", r"^classifier\."),
        source="each file's own, in torchvision's documentation; SWAG's are CC-BY-NC-4.0",
    ),
    KeyLayout(
        "timm",
        "timm, and whoever has its names: torchvision's ResNets, DINO, encoders of MAE",
        wrappers=("state_dict_ema", "state_dict", "model"),
        source="each file's own, on its page at the hub",
    ),
)

KEY_LAYOUTS = {layout.name: layout for layout in _FAMILIES}
PLAIN = KEY_LAYOUTS["timm"]
# Where a file's family is not known yet; averaged weights first, as timm takes them, and teachers before students.
WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model", "teacher", "target_encoder", "student")
