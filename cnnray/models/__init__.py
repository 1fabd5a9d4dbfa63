"""Networks and bundles: building, loading, predicting and exporting on one machine. No Ray here."""
