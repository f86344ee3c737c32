"""Rungway: a local daemon that speaks the OpenAI API and answers from a ladder of models."""

__version__ = "0.1.0"
