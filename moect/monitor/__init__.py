"""What training does to the languages: bits per byte, exact answers, routing; tables, curves and a report."""
