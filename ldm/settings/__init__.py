"""What a run is asked for: its settings, with their flags, defaults and checks.

setting     one setting, and a group of them
subjects    several subjects in one run
data, training, loss, output, validation        the groups
settings    every setting of a run, and whether a run that resumes may change it
toml        writes them as TOML, from which the run can be repeated
"""

from ldm.settings.setting import flag
from ldm.settings.settings import SAVES_MEMORY, Settings
from ldm.settings.subjects import FOLDERS, SubjectSettings, read_tables
from ldm.settings.toml import ONCE, SETTINGS, run_of, to_toml
from ldm.settings.training import LORA_RATE, LOW_LORA_RATE, LR_SCHEDULES

__all__ = [
    "FOLDERS",
    "LORA_RATE",
    "LOW_LORA_RATE",
    "LR_SCHEDULES",
    "ONCE",
    "SAVES_MEMORY",
    "SETTINGS",
    "Settings",
    "SubjectSettings",
    "flag",
    "read_tables",
    "run_of",
    "to_toml",
]
