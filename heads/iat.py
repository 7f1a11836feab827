"""One level of HAG-MIL, the Integrated Attention Transformer: see hagmil.py."""

from .hagmil import IAT

build = IAT
