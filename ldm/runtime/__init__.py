"""Tools for programs: command line, files, memory, threads, signals, processes.

cli         the command line: flags, one-line errors, the choice of a device
files       writes files and folders whole or not at all
streams     output that never raises
reading     reads untrusted files, folders, text and JSON, within limits
memory      reports out of memory in one line
graphs      records the kernels of a function once, and replays them
compiling   compiles the repeated blocks of a network
threads     all cores, same bits for any number
signals     stops cleanly on a signal
progress    a progress bar for work that a signal ends
processes   a small interface to torch.distributed
"""

from ldm.runtime import cli, processes
from ldm.runtime.compiling import compile_blocks, uncompiled
from ldm.runtime.files import check_writable, locked, replacing, written
from ldm.runtime.graphs import captured
from ldm.runtime.memory import out_of_memory_named
from ldm.runtime.processes import World
from ldm.runtime.progress import progress_bar
from ldm.runtime.reading import (
    MAX_PATH,
    check_file,
    check_path,
    exists,
    list_folder,
    parse_json,
    read_json,
    read_text,
    read_toml,
)
from ldm.runtime.signals import Stop, Stopped
from ldm.runtime.streams import dropped as dropped_output
from ldm.runtime.threads import at_once, side_by_side

__all__ = [
    "MAX_PATH",
    "Stop",
    "Stopped",
    "World",
    "at_once",
    "captured",
    "check_file",
    "check_path",
    "check_writable",
    "cli",
    "compile_blocks",
    "exists",
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
    "uncompiled",
    "written",
]
