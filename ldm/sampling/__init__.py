"""What sample.py is asked for.

flags           the command line, --from-picture, and the prompts
"""

from ldm.sampling.flags import check_flags, parse, parser, read_prompts

__all__ = ["check_flags", "parse", "parser", "read_prompts"]
