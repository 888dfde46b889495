"""TNT: settings (`config`), the optimisation, one image (`image`), and the adapter."""
