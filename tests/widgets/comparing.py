"""What several tests of the panel that compares need."""
from qcal_nb.widgets import ObserverComparison


def feed(session):
    for step in ("initialize", "start", "feed_all"): getattr(session, step)()
    return session


def ready(session, *args, **kwargs):
    panel = ObserverComparison(session, *args, **kwargs)
    panel.wait()
    return panel
