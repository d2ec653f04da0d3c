"""The outer search: an Optuna study over how the integer program is built, scored by what really comes out.

Light to import: Optuna and torch are loaded by the modules that need them (`study`, `evaluator`).
"""
