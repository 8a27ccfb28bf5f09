"""Figures of an evaluation, as SVG and PNG; the only files of this folder's parent that need matplotlib."""
