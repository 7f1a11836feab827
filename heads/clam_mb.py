"""CLAM with an attention for each class: see clam_sb.py."""

from .clam_sb import CLAM


class CLAMMB(CLAM):
    attention_per_class = True


build = CLAMMB
