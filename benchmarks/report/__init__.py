"""What stored results say: a report and plots for each device, and the tables of docs/results.md and README.md.

Each module uses those above it alone:

    rows.py      stored rows, the newest for each question
    targets.py   what shall be reached, and which rows say whether it is
    tables.py    tables in Markdown: a device's report.md
    pages.py     the parts of docs/results.md and README.md
    plots.py     what to draw, and the drawing
"""
