"""TNT: settings (`config`), the optimisation (`optimize`), and the adapter (`adapter`)."""
