"""Blocks of models computed with less kept for the backward pass, where their form is known."""

from lit_adapters.blocks.forms import make_lean, make_stock

__all__ = ["make_lean", "make_stock"]
