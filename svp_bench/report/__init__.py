"""The HTML report: one self-contained page with tables, plots and all records behind them.

`view` derives the data of the page (`model`) from tables, `figures` builds Plotly specifications, `curves` reads the
event files of runs, `assets` loads the inlined libraries, and `page` renders the page.
"""
