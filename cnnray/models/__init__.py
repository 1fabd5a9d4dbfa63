"""What is learnt, and what can be done with it on one machine; no Ray here."""
