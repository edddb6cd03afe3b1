"""One self-contained HTML page from the records: tables, plots and every record behind them. No torch, no network.

`view` derives plain data (`model`) from tables and records, `figures` draws them as Plotly specifications, `curves`
reads the event files of runs, `assets` holds what is inlined, and `page` puts the page together.
"""
