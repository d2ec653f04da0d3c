"""What a sample is asked to show: prompts and classes from local files, in splits that share nothing; needs no torch.

prompts = read_prompts(PromptsSpec(file="prompts.txt"))
prompts.of(0)  # the report's first prompt
prompts.of(1_000_000)  # one of calibration, which the report never shows
"""

from mpqsearch.prompts.reading import Prompt
from mpqsearch.prompts.splits import BANDS, Prompts, band_of, prompts_of, read_prompts

__all__ = ["BANDS", "Prompt", "Prompts", "band_of", "name_seed", "prompts_of", "read_file", "read_prompts", "split_of"]
