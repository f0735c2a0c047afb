"""What sample.py is asked for, and the sheets of pictures that it and train.py make.

contact_sheet   pictures in rows with labels, as one picture
flags           the command line, --from-picture, and the prompts
recipe          how pictures are made, as their files say it
"""

from ldm.sampling import contact_sheet
from ldm.sampling.flags import check_flags, parse, parser, read_prompts
from ldm.sampling.recipe import check_same, recipe

__all__ = ["check_flags", "check_same", "contact_sheet", "parse", "parser", "read_prompts", "recipe"]
