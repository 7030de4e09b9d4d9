"""From records and curves to comparisons: tables, plots and the report."""
