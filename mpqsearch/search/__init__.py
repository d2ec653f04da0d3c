"""The outer search: an Optuna study over how the integer program is built, scored by samples of the quantized model.

Light to import: Optuna and torch are loaded by the functions that need them.
"""

from mpqsearch._verbs import make_callable

make_callable(__name__)
