"""The built-in guide: its corpus, training and examination. Nothing here runs in the appliance."""
