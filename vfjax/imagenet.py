"""ImageNet, streamed: the public path of `vfjax/data/_imagenet.py`."""

from __future__ import annotations

from vfjax.data._imagenet import MEAN as MEAN
from vfjax.data._imagenet import STD as STD
from vfjax.data._imagenet import Streamed as Streamed
from vfjax.data._imagenet import centre as centre
from vfjax.data._imagenet import load as load

__all__ = ["MEAN", "STD", "Streamed", "centre", "load"]
