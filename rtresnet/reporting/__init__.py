"""Terminal tables, plots and HTML pages."""
