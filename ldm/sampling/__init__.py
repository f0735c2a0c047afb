"""What sample.py is asked for, and the sheets of pictures that it and train.py make.

contact_sheet   pictures in rows with labels, as one picture
flags           the command line, --from-picture, and the prompts
"""

from ldm.sampling import contact_sheet
from ldm.sampling.flags import check_flags, parse, parser, read_prompts

__all__ = ["check_flags", "contact_sheet", "parse", "parser", "read_prompts"]
