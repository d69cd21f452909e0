"""Students, teachers, and the taps that read their features.

Importing this registers the students in timm: `timm.create_model("deit_tiny_lift_patch16_224")`.
"""

from fastkd.losses.projectors import Lift
from fastkd.models.architectures import (
    LiftVisionTransformer,
    WideLastBlock,
    WideLastVisionTransformer,
)
from fastkd.models.factory import create_student
from fastkd.models.paper_checkpoints import load_released_checkpoint
from fastkd.models.taps import TapOutput, Taps
from fastkd.models.teacher import Teacher

__all__ = [
    "Lift",
    "LiftVisionTransformer",
    "TapOutput",
    "Taps",
    "Teacher",
    "WideLastBlock",
    "WideLastVisionTransformer",
    "create_student",
    "load_released_checkpoint",
]
