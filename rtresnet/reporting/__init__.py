"""Results for people: terminal tables, plots, one HTML page. Knows numbers, not how they came."""
