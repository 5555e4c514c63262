"""Push to the Hub: a model card of measured values, a reload check before the upload, and the upload itself."""

from .card import build_card
from .push import PushResult, push
from .reload import check_reload

__all__ = ["PushResult", "build_card", "check_reload", "push"]
