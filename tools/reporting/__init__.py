"""What ``tools/report.py`` is made of: results in groups that may be compared, figures, cautions, tables, pages."""
