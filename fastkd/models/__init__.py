"""Students, teachers, and the taps that read their features.

Importing this registers the DeiT-Tiny students in timm. Built from timm's and torch's own pieces;
knows nothing of training, and of losses the lifting projector alone.
"""

from fastkd.losses.lift import Lift
from fastkd.models.factory import create_student
from fastkd.models.released import load_released_checkpoint
from fastkd.models.students import (
    LiftVisionTransformer,
    WideLastBlock,
    WideLastVisionTransformer,
)
from fastkd.models.taps import TapOutput, Taps
from fastkd.models.teacher import Teacher, create_teacher

__all__ = [
    "Lift",
    "LiftVisionTransformer",
    "TapOutput",
    "Taps",
    "Teacher",
    "WideLastBlock",
    "WideLastVisionTransformer",
    "create_student",
    "create_teacher",
    "load_released_checkpoint",
]
