"""Imports the attention mechanisms of the native family, which register by name; a config names the one it uses."""

from .mechanism_base import MECHANISMS, Mechanism, Option, register_mechanism
from .mechanism_bigbird import BigBirdAttention
from .mechanism_landmark import LandmarkAttention
from .mechanism_linear import LinearAttention
from .mechanism_linformer import LinformerAttention
from .mechanism_performer import PerformerAttention
from .mechanism_relative import RelativeAttention
from .mechanism_windows import LocalAttention, StridedAttention

__all__ = [
    "MECHANISMS",
    "BigBirdAttention",
    "LandmarkAttention",
    "LinearAttention",
    "LinformerAttention",
    "LocalAttention",
    "Mechanism",
    "Option",
    "PerformerAttention",
    "RelativeAttention",
    "StridedAttention",
    "register_mechanism",
]
