"""The report of a run: one HTML file that needs nothing else, and a picture of predictions."""

from oneshot_ednas.report.page import write_report
from oneshot_ednas.report.plots import RunPictures
from oneshot_ednas.report.sharing_page import write_sharing_report

__all__ = ["RunPictures", "write_report", "write_sharing_report"]
