"""The comparison as an application: its data sets, runs, results, figures and report."""
