"""What a program needs from the machine that it runs on, and nothing about diffusion.

cli         the command line: flags, one-line errors, the choice of a device
files       files and folders that are replaced whole or not at all
streams     printing to people who may have left
reading     files, folders, text and JSON that a stranger may have made, within limits
memory      running out of memory, answered in one line
threads     all cores, and the same bits
signals     stopping well when asked
progress    a progress bar over work that a signal ends
processes   several processes as one world
"""

from ldm.runtime import cli, processes
from ldm.runtime.files import check_writable, locked, replacing, written
from ldm.runtime.memory import out_of_memory_named
from ldm.runtime.processes import World
from ldm.runtime.progress import progress_bar
from ldm.runtime.reading import check_file, check_path, list_folder, parse_json, read_json, read_text, read_toml
from ldm.runtime.signals import Stop, Stopped
from ldm.runtime.streams import dropped as dropped_output
from ldm.runtime.threads import at_once, side_by_side

__all__ = [
    "Stop",
    "Stopped",
    "World",
    "at_once",
    "check_file",
    "check_path",
    "check_writable",
    "cli",
    "dropped_output",
    "list_folder",
    "locked",
    "out_of_memory_named",
    "parse_json",
    "processes",
    "progress_bar",
    "read_json",
    "read_text",
    "read_toml",
    "replacing",
    "side_by_side",
    "written",
]
