"""Distil an ensemble of speech acoustic models into one (Hinton, Vinyals & Dean 2015, section 4)."""

__version__ = "0.1.0"
