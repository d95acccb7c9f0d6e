"""Pictures: SVG plots, self-contained HTML pages, and the live curve in the terminal."""

from groundup.figure.plots import Series, bar_plot, dot_plot, histograms, line_plot
from groundup.figure.terminal import LiveTraining, curve

__all__ = ["LiveTraining", "Series", "bar_plot", "curve", "dot_plot", "histograms", "line_plot"]
