"""The picture that lives without a kernel: a record as a page that answers the hand."""

from .javascript import arithmetic, script, widget_module
from .packing import compressed, packed
from .pages import page, show

__all__ = ["arithmetic", "compressed", "packed", "page", "script", "show", "widget_module"]
