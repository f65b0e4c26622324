"""The picture that lives without a kernel: a record as a page that answers the hand."""

from .javascript import script
from .packing import compressed, packed

__all__ = ["compressed", "packed", "script"]
