"""The plots of a report, in one font and one set of colours."""
