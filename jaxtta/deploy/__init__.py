"""What runs an adapter in production: sessions, their log, bundles and servers."""
