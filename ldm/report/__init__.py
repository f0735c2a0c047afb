"""The report of a run: one HTML file that tells its story, made from the run's folder alone.

markup       HTML from Python values, everything escaped
numbers      the numbers of curves: read, smoothed, thinned
scale        axes and their round ticks
chart        curves as SVG
pictures     thumbnails inside the page, up to a size
record       what a run's folder says; every file of it may be missing
story        what a run did, in sentences
commands     what to do next: sample, resume, open elsewhere
document     the frame of a page, with style.css and report.js
page         the report of one run
compare      two runs or more, side by side
file         writes the page
upkeep       keeps the report of a run up to date while it trains
"""

from ldm.report.file import write
from ldm.report.upkeep import begin, finish, update

__all__ = ["begin", "finish", "update", "write"]
